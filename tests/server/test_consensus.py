"""Consensus: what many farms' scores become, and what must not change it."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, ProtocolError, RejectReason, StateError
from common.scores import UnitScores
from common.spec import ModelSpec
from server.consensus import Rule, consensus, farm_scores, median_tau, rank_correlation

Floats = npt.NDArray[np.float32]

SPEC = ModelSpec(name="any", image_size=32, heads=(2, 3), neurons=(4, 4), head_width=4, width=8)
RULES: tuple[Rule, ...] = ("mean", "median", "trimmed")


def scores(heads: list[float], neurons: list[float] | None = None) -> UnitScores:
    flat = np.array(heads, np.float32)
    other = np.array(neurons or [1.0] * 8, np.float32)
    return UnitScores((flat[:2], flat[2:]), (other[:4], other[4:]))


def drawn(seed: int) -> UnitScores:
    rng = np.random.default_rng(seed)
    return scores(rng.random(5).tolist(), rng.random(8).tolist())


def numbers(seed: int, count: int) -> Floats:
    return np.random.default_rng(seed).random(count, dtype=np.float32)


# --- one farm ------------------------------------------------------------------------------------


def test_scores_are_transferability_and_sum_to_one() -> None:
    importance, mmd2 = numbers(0, 5), np.array([-0.1, 0.0, 0.2, 0.5, 1.0], np.float32)
    found = farm_scores(importance, mmd2, numbers(1, 8), tau=0.4, exponent=2.0, spec=SPEC)
    expected = importance * np.exp(-np.maximum(mmd2, 0) / 0.4) ** 2
    np.testing.assert_allclose(found.flat_heads(), expected / expected.sum(), rtol=1e-5)
    assert found.flat_neurons().sum() == pytest.approx(1, abs=1e-6)
    assert [len(block) for block in found.heads] == [2, 3]
    assert [len(block) for block in found.neurons] == [4, 4]
    assert found.heads[0].dtype == np.float32


def test_exponent_zero_is_plain_importance() -> None:
    importance = numbers(0, 5)
    found = farm_scores(importance, 100 * numbers(2, 5), numbers(1, 8), 0.1, 0.0, SPEC)
    np.testing.assert_allclose(found.flat_heads(), importance / importance.sum(), rtol=1e-6)


def test_a_distant_species_does_not_lose_every_head() -> None:
    """exp(-5000) is 0 in float64; relative to the nearest head it is not."""
    mmd2 = np.array([5.0, 5.001, 6, 7, 4], np.float32)
    importance = np.array([1, 1, 1, 1, 0], np.float32)
    found = farm_scores(importance, mmd2, numbers(1, 8), 0.001, 1.0, SPEC).flat_heads()
    assert found[1] / found[0] == pytest.approx(np.exp(-1), rel=1e-3)
    assert found[4] == 0


def test_a_farm_that_needs_nothing_has_no_preference() -> None:
    found = farm_scores(
        np.zeros(5, np.float32), numbers(1, 5), np.zeros(8, np.float32), 0.1, 1.0, SPEC
    )
    np.testing.assert_allclose(found.flat_heads(), np.full(5, 0.2), rtol=1e-6)
    np.testing.assert_allclose(found.flat_neurons(), np.full(8, 0.125), rtol=1e-6)


def test_bad_scores_are_refused_with_the_reason() -> None:
    good, neurons = numbers(0, 5), numbers(1, 8)
    bad, negative = good.copy(), good.copy()
    bad[2], negative[2] = np.nan, -1
    cases = [
        (good[:4], good, neurons, RejectReason.SHAPE),
        (good, good[:4], neurons, RejectReason.SHAPE),
        (good, good, neurons[:7], RejectReason.SHAPE),
        (bad, good, neurons, RejectReason.NOT_FINITE),
        (good, bad, neurons, RejectReason.NOT_FINITE),
        (negative, good, neurons, RejectReason.MALFORMED),
    ]
    for importance, mmd2, flat, reason in cases:
        with pytest.raises(ProtocolError) as caught:
            farm_scores(importance, mmd2, flat, 0.1, 1.0, SPEC)
        assert caught.value.reason is reason
    farm_scores(good, -good, neurons, 0.1, 1.0, SPEC)  # unbiased mmd2 may be negative


# --- many farms ----------------------------------------------------------------------------------


@given(st.permutations(range(5)), st.floats(0, 1), st.sampled_from(RULES))
def test_the_order_of_farms_changes_no_bit(order: list[int], kappa: float, rule: Rule) -> None:
    farms = [(10 + 7 * (i % 3), drawn(i)) for i in range(5)]
    one = consensus(farms, kappa, rule)
    other = consensus([farms[i] for i in order], kappa, rule)
    assert one.flat_heads().tobytes() == other.flat_heads().tobytes()
    assert one.flat_neurons().tobytes() == other.flat_neurons().tobytes()


@given(st.permutations([1.0, 2**-24, 2**-53, 2**-53]))
def test_the_mean_is_the_same_where_the_order_of_a_sum_shows(column: list[float]) -> None:
    """The two small numbers tip the rounding to fp32 only when they are added first."""
    found = consensus([(1, scores([x, 0, 0, 0, 0])) for x in column], 0.0).flat_heads()[0]
    first_small = np.float32((1 + 2**-24 + 2**-52) / 4)
    assert found == first_small


@given(st.integers(1, 6), st.sampled_from(RULES))
def test_kappa_one_is_the_maximum(count: int, rule: Rule) -> None:
    farms = [drawn(i) for i in range(count)]
    found = consensus([(i + 1, farm) for i, farm in enumerate(farms)], 1.0, rule)
    stacked = np.stack([farm.flat_neurons() for farm in farms])
    np.testing.assert_array_equal(found.flat_neurons(), stacked.max(axis=0))


@given(st.integers(1, 6), st.floats(0, 1), st.sampled_from(RULES))
def test_farms_that_agree_are_their_own_consensus(count: int, kappa: float, rule: Rule) -> None:
    farm = drawn(3)
    found = consensus([(i + 1, farm) for i in range(count)], kappa, rule)
    np.testing.assert_allclose(found.flat_heads(), farm.flat_heads(), rtol=1e-6)


def test_weights_are_roots_of_examples() -> None:
    found = consensus([(100, scores([1, 0, 0, 0, 0])), (400, scores([0, 1, 0, 0, 0]))], 0.0)
    np.testing.assert_allclose(found.flat_heads()[:2], [1 / 3, 2 / 3], rtol=1e-6)


def test_a_giant_farm_weighs_three_times_the_median() -> None:
    others = [(100, scores([1, 0, 0, 0, 0]))] * 4
    giants = [
        consensus([*others, (examples, scores([0, 1, 0, 0, 0]))], 0.0).flat_heads()[1]
        for examples in (900, 90_000, 10**9)
    ]
    np.testing.assert_allclose(giants, 3 / 7, rtol=1e-6)


def test_a_unit_that_one_farm_needs_survives_with_kappa() -> None:
    """Nine farms like head 0 a little more than head 4; one needs head 4 badly."""
    common, single = scores([0.2, 0, 0, 0, 0.15]), scores([0.2, 0, 0, 0, 0.5])
    farms = [(50, common)] * 9 + [(50, single)]
    without, with_kappa = consensus(farms, 0.0).flat_heads(), consensus(farms, 0.25).flat_heads()
    assert without[4] < without[0]
    assert with_kappa[4] > with_kappa[0]


@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_a_lying_farm_does_not_move_robust_rules(rule: Rule) -> None:
    honest = [(50, scores([0.1, 0.2, 0.3, 0.4, 0.5])) for _ in range(4)]
    liar = (10**9, scores([1000, 0, 0, 0, 0]))
    found = consensus([*honest, liar], 0.0, rule).flat_heads()
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    assert consensus([*honest, liar], 0.0, "mean").flat_heads()[0] > 1


def test_the_trimmed_mean_drops_one_at_either_end_of_five() -> None:
    farms = [(1, scores([x, 0, 0, 0, 0])) for x in (1, 2, 4, 6, 100)]
    assert consensus(farms, 0.0, "trimmed").flat_heads()[0] == pytest.approx(4)


def test_blocks_keep_their_shape() -> None:
    found = consensus([(1, drawn(0)), (1, drawn(1))], 0.5)
    assert [len(block) for block in found.heads] == [2, 3]
    assert [len(block) for block in found.neurons] == [4, 4]
    assert found.heads[0].dtype == found.neurons[0].dtype == np.float32


def test_what_has_no_consensus_is_refused() -> None:
    with pytest.raises(StateError):
        consensus([], 0.5)
    with pytest.raises(ConfigError):
        consensus([(1, drawn(0))], 1.5)
    with pytest.raises(ConfigError):
        consensus([(1, drawn(0))], 0.5, "mode")  # type: ignore[arg-type]
    smaller = UnitScores((numbers(0, 2), numbers(1, 2)), drawn(0).neurons)
    with pytest.raises(ProtocolError) as caught:
        consensus([(1, drawn(0)), (1, smaller)], 0.5)
    assert caught.value.reason is RejectReason.FOREIGN_MASK


# --- figures over farms --------------------------------------------------------------------------


def test_rank_correlation_of_known_cases() -> None:
    up, down = scores([1, 2, 3, 4, 5]), scores([5, 4, 3, 2, 1])
    assert rank_correlation([up, scores([1, 10, 100, 1000, 10_000])]) == pytest.approx(1)
    assert rank_correlation([up, down]) == pytest.approx(-1)
    assert rank_correlation([up, up, down]) == pytest.approx(-1 / 3)
    assert rank_correlation([up]) == 1
    assert rank_correlation([up, scores([2, 2, 2, 2, 2])]) == 0


def test_ties_share_their_mean_rank() -> None:
    """Ranks 1, 2.5, 2.5, 4, 5 against 1..5: Spearman is 9.5 / sqrt(10 * 9.5)."""
    found = rank_correlation([scores([1, 2, 2, 3, 4]), scores([1, 2, 3, 4, 5])])
    assert found == pytest.approx(np.sqrt(0.95))


def test_tau_is_the_median_of_the_mean_shift() -> None:
    farms = [np.array(row, np.float32) for row in ([0.1, 0.4, -0.5], [0.3, 0.6, -0.1])]
    assert median_tau(farms) == pytest.approx(0.2)


@given(st.permutations(range(20)))
def test_tau_does_not_depend_on_the_order_of_farms(order: list[int]) -> None:
    # small and large numbers in turn: the order of their sum shows in float64
    farms = [numbers(seed, 7) * np.float32(2.0 ** (-30 * (seed % 2))) for seed in range(20)]
    assert median_tau([farms[i] for i in order]) == median_tau(farms)


def test_tau_stays_above_zero() -> None:
    assert median_tau([np.full(5, -0.2, np.float32)]) > 0
    with pytest.raises(StateError):
        median_tau([])
