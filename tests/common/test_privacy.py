"""The noise: its law, its secrecy, its grid; and scores that stay scores."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.config import PrivacyConfig, ServerConfig
from common.errors import ConfigError, QualityError
from common.plan import PlanConfig
from common.privacy import (
    GRID_BITS,
    Floats,
    length,
    normals,
    privatise,
    privatise_scores,
)
from common.scores import decode_neurons, encode_neurons
from common.settings import validate

KEY, OTHER = bytes(range(32)), bytes(32)
updates = arrays.arrays(
    np.float32, st.integers(1, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


def hidden(values: Floats, clip: float = 1.0, noise: float = 1.0, **changes: Any) -> Floats:
    return privatise(values, clip=clip, noise=noise, **({"key": KEY, "what": "a"} | changes))


def drawn(count: int, norm: float = 1.0, seed: int = 0) -> Floats:
    values = np.random.default_rng(seed).standard_normal(count)
    return np.asarray(values * norm / np.linalg.norm(values), dtype=np.float32)


def shares(count: int, seed: int = 0, shape: float = 1.0) -> Floats:
    values = np.random.default_rng(seed).gamma(shape, size=count)
    return np.asarray(values / values.sum(), dtype=np.float32)


# --- cut -----------------------------------------------------------------------------------------


@given(updates, st.floats(1e-3, 1e3))
def test_an_update_is_never_longer_than_clip(values: Floats, clip: float) -> None:
    assert length(hidden(values, clip, noise=0.0)) <= clip * (1 + 1e-6)


def test_a_short_update_is_left_alone_and_a_long_one_keeps_its_direction() -> None:
    values = drawn(100, norm=3.0)
    np.testing.assert_array_equal(hidden(values, clip=4.0, noise=0.0), values)
    np.testing.assert_allclose(hidden(values, clip=1.5, noise=0.0), values / 2, rtol=1e-6)
    np.testing.assert_array_equal(privatise(values, clip=None, noise=0.0, key=KEY, what=""), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    values = np.array([1.0, bad], np.float32)
    with pytest.raises(QualityError, match="not finite"):
        hidden(values)
    with pytest.raises(QualityError, match="not finite"):
        privatise_scores(values, clip=1.0, noise=1.0, key=KEY, what="a")


# --- the law of the noise ------------------------------------------------------------------------


def test_noise_has_the_promised_deviation_and_the_shape_of_a_gaussian() -> None:
    count = 200_000
    noise = hidden(np.zeros(count, np.float32), clip=0.5, noise=3.0).astype(np.float64) / 1.5
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert noise.std() == pytest.approx(1, abs=5 / math.sqrt(2 * count))
    # Kolmogorov and Smirnov: beyond 2 / sqrt(n) about once in a thousand draws; the key is fixed
    levels = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.sort(noise)[::10]])
    assert np.abs(levels - np.arange(0, count, 10) / count).max() < 2 / math.sqrt(count)
    assert abs(np.corrcoef(noise[::2], noise[1::2])[0, 1]) < 5 / math.sqrt(count / 2)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_draws_can_be_had(count: int) -> None:
    assert normals(b"seed", count).shape == (count,)


def test_a_long_draw_repeats_nothing() -> None:
    values = normals(b"seed", 1_100_000)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) > 1_099_990


# --- whose noise it is ---------------------------------------------------------------------------


def test_the_same_values_in_the_same_reply_have_the_same_noise() -> None:
    values = drawn(50)
    assert hidden(values).tobytes() == hidden(values.copy()).tobytes()


@pytest.mark.parametrize(
    "changes", [{"key": OTHER}, {"what": "b"}, {"clip": 2.0}, {"noise": 1.5}], ids=str
)
def test_another_key_reply_or_strength_has_independent_noise(changes: dict[str, Any]) -> None:
    values = np.zeros(20_000, np.float32)
    one, other = hidden(values), hidden(values, **changes)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(values))


def test_two_replies_that_differ_in_one_number_do_not_show_which() -> None:
    values = np.zeros(20_000, np.float32)
    changed = values.copy()
    changed[7] = 1e-3
    gap = hidden(values).astype(np.float64) - hidden(changed)
    assert gap.std() == pytest.approx(math.sqrt(2), abs=0.05)


# --- the grid ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(updates, st.floats(1e-3, 1e3), st.floats(0.1, 100))
def test_what_is_sent_is_a_whole_number_of_steps_whatever_the_values(
    values: Floats, clip: float, noise: float
) -> None:
    sent = hidden(values, clip, noise)
    step = 2.0 ** (math.floor(math.log2(noise * clip)) - GRID_BITS)
    steps = sent.astype(np.float64) / step
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert np.abs(steps).max() < 2**24, "fp32 would have to round"


def test_truncation_costs_less_than_a_step() -> None:
    values = drawn(1000)
    noise = hidden(np.zeros(1000, np.float32)).std()
    many = np.mean([hidden(values, what=str(n)) for n in range(400)], axis=0)
    assert np.abs(many - values).max() < 6 * noise / math.sqrt(400)
    assert abs(float(np.dot(many - values, values))) < 6 / math.sqrt(400)


# --- scores --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 99), st.floats(0.01, 100), st.floats(0.01, 10))
def test_hidden_scores_are_still_scores(count: int, seed: int, noise: float, clip: float) -> None:
    found = privatise_scores(shares(count, seed), clip=clip, noise=noise, key=KEY, what="a")
    assert found.shape == (count,)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, rel=1e-5)
    decode_neurons(encode_neurons(found), count)


def test_without_noise_scores_are_left_alone() -> None:
    values = shares(20)
    assert privatise_scores(values, clip=0.1, noise=0, key=KEY, what="a") is values


def test_faint_noise_keeps_the_order() -> None:
    values = shares(72)
    found = privatise_scores(values, clip=10.0, noise=1e-6, key=KEY, what="a")
    assert (np.diff(found[np.argsort(values)]) >= -1e-9).all()
    assert np.corrcoef(found, values)[0, 1] > 0.9999


@pytest.mark.parametrize("count", [1, 2, 72])
def test_no_two_score_vectors_are_further_apart_than_the_accountant_assumes(count: int) -> None:
    # all weight on one unit is the furthest from equal shares; nothing may exceed its cut
    one = np.zeros(count, np.float32)
    one[0] = 1
    for clip in (0.3, 1.0, 100.0):
        radius = min(clip / math.sqrt(count), 1.0)
        deviation = (one - 1 / count) * min(1, radius / max(length(one - 1 / count), 1e-30))
        mean = np.mean(
            [
                privatise_scores(one, clip=clip, noise=0.01, key=KEY, what=str(n)).astype(float)
                for n in range(50)
            ],
            axis=0,
        )
        scale = 1 / (1 + count * 6 * 0.01 * radius)  # of the affine map that all farms share
        expected = (deviation + 1 / count + 6 * 0.01 * radius) * scale
        np.testing.assert_allclose(mean, expected, atol=0.02 * radius)


@pytest.mark.parametrize("farms", [9, 100, 900])
def test_the_mean_over_farms_finds_the_scores_again_as_their_number_grows(farms: int) -> None:
    values, noise = shares(72), 2.0
    sent = [
        privatise_scores(values, clip=1.0, noise=noise, key=KEY, what=str(n)) for n in range(farms)
    ]
    found = np.corrcoef(np.mean(sent, axis=0), values)[0, 1]
    signal = math.sqrt(farms / len(values)) / noise  # both are as long as the cut
    assert found == pytest.approx(signal / math.sqrt(1 + signal**2), abs=0.15)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"noise": 1.0}, "clip"),
        ({"clip": 1.0, "max_epsilon": 3.0}, "max_epsilon"),
        ({"clip": 0.0}, "clip"),
        ({"clip": 1.0, "noise": math.nan}, "noise"),
        ({"clip": math.inf, "noise": 1.0}, "clip"),
        ({"delta": 0.0}, "delta"),
        ({"nois": 1.0}, "nois"),
    ],
)
def test_settings_that_promise_nothing_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        validate(PrivacyConfig, values, "server.toml")


@pytest.mark.parametrize(
    ("privacy", "plan", "fault"),
    [
        ({"score_noise": 1.0}, {"criterion": "taha"}, "taha"),
        ({"clip": 1.0, "noise": 1.0, "max_epsilon": 2.0}, {}, "score_noise"),
    ],
)
def test_a_plan_that_needs_what_privacy_keeps_back_is_refused(
    privacy: dict[str, Any], plan: dict[str, Any], fault: str
) -> None:
    values = {"privacy": privacy, "plan": {"prune_heads": 0.4} | plan}
    with pytest.raises(ConfigError, match=fault):
        validate(ServerConfig, values, "server.toml")
    validate(ServerConfig, {"privacy": privacy, "plan": plan}, "server.toml")


def test_privacy_is_off_unless_asked_for() -> None:
    assert ServerConfig().privacy is None
    assert ServerConfig(plan=PlanConfig(), privacy=PrivacyConfig()).privacy == PrivacyConfig()
