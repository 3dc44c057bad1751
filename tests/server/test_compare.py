import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from server.compare import Interval, Outcomes, paired_bootstrap, verdict

Farms = dict[str, Outcomes]


def outcomes(
    seed: int, accuracy: float, sizes: tuple[int, ...] = (40, 25, 60), seeds: int = 1
) -> Farms:
    rng = np.random.default_rng(seed)
    return {
        f"farm{number}": [rng.random(size) < accuracy for _ in range(seeds)]
        for number, size in enumerate(sizes)
    }


def as_float(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 5))
def test_swapping_the_models_only_changes_the_sign(data: int, seeds: int, seed: int) -> None:
    first, second = outcomes(data, 0.8, seeds=seeds), outcomes(data + 1, 0.7, seeds=seeds)
    there = paired_bootstrap(first, second, draws=200, seed=seed)
    back = paired_bootstrap(second, first, draws=200, seed=seed)
    np.testing.assert_allclose(there, back.reversed(), atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_equal_models_differ_by_exactly_nothing(data: int, seeds: int) -> None:
    same = outcomes(data, 0.8, seeds=seeds)
    assert paired_bootstrap(same, same, draws=50) == Interval(0.0, 0.0, 0.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_the_interval_surrounds_the_point_and_ignores_the_order_of_farms(data: int) -> None:
    first, second = outcomes(data, 0.9), outcomes(data + 1, 0.6)
    interval = paired_bootstrap(first, second, draws=200)
    assert interval.low <= interval.point <= interval.high
    assert paired_bootstrap(dict(reversed(first.items())), second, draws=200) == interval


def test_every_farm_weighs_the_same() -> None:
    first: Farms = {"small": np.ones(10, bool), "large": np.zeros(1000, bool)}
    second: Farms = {"small": np.zeros(10, bool), "large": np.zeros(1000, bool)}
    assert paired_bootstrap(first, second, draws=50) == Interval(0.5, 0.5, 0.5)


def test_images_stay_paired() -> None:
    # equally accurate on different images: resampled apart, or paired wrongly, this would be wide
    rng = np.random.default_rng(0)
    second = rng.random(400) < 0.5
    first = second.copy()
    first[:8] = ~first[:8]
    interval = paired_bootstrap({"farm": first}, {"farm": second})
    assert -0.02 < interval.low <= interval.high < 0.02


def test_seeds_are_resampled_too() -> None:
    better, worse = np.ones(50, bool), np.zeros(50, bool)
    first, second = {"farm": [better, worse]}, {"farm": [worse, worse]}
    assert paired_bootstrap(first, second) == Interval(0.5, 0.0, 1.0)


def test_two_equal_seeds_tell_no_more_than_one() -> None:
    first, second = outcomes(3, 0.8), outcomes(4, 0.7)
    twice = [{name: [*rows, *rows] for name, rows in one.items()} for one in (first, second)]
    once = paired_bootstrap(first, second, draws=4000)
    np.testing.assert_allclose(paired_bootstrap(*twice, draws=4000), once, atol=0.02)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    hits, trials = 0, 300
    for trial in range(trials):
        first, second = {}, {}
        for farm in ("a", "b", "c"):
            common = rng.random(80)
            first[farm] = common + 0.1 * rng.standard_normal(80) < 0.80
            second[farm] = common + 0.1 * rng.standard_normal(80) < 0.75
        interval = paired_bootstrap(first, second, draws=400, seed=trial)
        hits += interval.low <= TRUE_DIFFERENCE <= interval.high
    assert 0.90 <= hits / trials <= 0.985


def _true_difference() -> float:
    rng = np.random.default_rng(1)
    common = rng.random(2_000_000)
    noise = 0.1 * rng.standard_normal(2_000_000)
    return float((common + noise < 0.80).mean() - (common + noise < 0.75).mean())


TRUE_DIFFERENCE = _true_difference()


@pytest.mark.parametrize(
    ("interval", "claim"),
    [
        (Interval(0.03, 0.01, 0.05), "better"),
        (Interval(0.001, -0.01, 0.012), "at most 0.5 point below"),
        (Interval(-0.005, -0.019, 0.009), "at most 0.5 point below"),
        (Interval(-0.0051, -0.019, 0.009), "not distinguishable"),
        (Interval(-0.005, -0.02, 0.009), "not distinguishable"),
        (Interval(-0.004, -0.006, -0.002), "at most 0.5 point below"),
        (Interval(-0.03, -0.05, -0.01), "worse"),
        (Interval(0.0, -0.04, 0.04), "not distinguishable"),
        (Interval(0.02, 0.0, 0.04), "at most 0.5 point below"),
    ],
)
def test_a_verdict_says_what_the_interval_allows(interval: Interval, claim: str) -> None:
    assert verdict(interval) == claim


def test_a_verdict_names_its_own_margin() -> None:
    assert verdict(Interval(-0.009, -0.012, 0.0), margin=0.01) == "at most 1 point below"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {}, "same farms"),
        ({"a": np.ones(3, bool)}, {"b": np.ones(3, bool)}, "a, b"),
        ({"a": np.ones(3, bool)}, {"a": np.ones(4, bool)}, "farm a"),
        ({"a": np.ones(0, bool)}, {"a": np.ones(0, bool)}, "farm a"),
        ({"a": np.ones(3)}, {"a": np.ones(3)}, "booleans"),
        ({"a": [np.ones(3, bool), np.ones(2, bool)]}, {"a": np.ones(3, bool)}, "farm a"),
        (
            {"a": np.ones(3, bool), "b": [np.ones(3, bool)] * 2},
            {"a": np.ones(3, bool), "b": [np.ones(3, bool)] * 2},
            "number of seeds",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(first: Farms, second: Farms, words: str) -> None:
    with pytest.raises(DataError, match=words):
        paired_bootstrap(first, second, draws=10)
