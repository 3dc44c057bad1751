"""Paired comparison of two models on the same test images.

Two accuracies measured on the same images are correlated, so their difference is resampled,
never each one alone: a percentile bootstrap over the images within every farm and over the seeds
(Efron and Tibshirani 1993, chapter 13). Every farm weighs the same however many images it has.

Shape legend: S seeds (whole runs), N images of one farm, R draws.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import DataError

Outcomes: TypeAlias = npt.NDArray[np.bool_] | Sequence[npt.NDArray[np.bool_]]
"""Whether each image was classified correctly: (N,), or one (N,) per seed."""


class Interval(NamedTuple):
    """A difference of accuracies as ratios, and its 95 % interval."""

    point: float
    low: float
    high: float

    def reversed(self) -> "Interval":
        """The same difference seen from the other side."""
        return Interval(-self.point, -self.high, -self.low)


def paired_bootstrap(
    first: Mapping[str, Outcomes],
    second: Mapping[str, Outcomes],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Accuracy of ``first`` minus accuracy of ``second``, averaged over farms, with 95 % bounds.

    A draw takes N images with replacement within every farm (the same for both models and for all
    seeds) and, when there are several, S seeds with replacement (the same for all farms).
    Swapping the two arguments changes nothing but the sign.

    Args:
        first: farm name -> (N,) bool, or a sequence of S such arrays.
        second: the same farms, images in the same order, and the same seeds.
        draws: bootstrap draws R.
        seed: of the bootstrap's own generator.

    Raises:
        DataError: no farm, farms that differ, or outcomes that cannot be paired; names the farm.
    """
    differences = _differences(first, second)
    seeds = len(differences[0])
    rng = np.random.default_rng(seed)
    weights_RS = np.full((draws, 1), 1.0)
    if seeds > 1:
        weights_RS = rng.multinomial(seeds, [1 / seeds] * seeds, size=draws) / seeds
    total_R = np.zeros(draws)
    for difference_SN in differences:
        total_R += np.einsum("rs,rs->r", weights_RS, _resampled_means(difference_SN, draws, rng))
    low, high = np.quantile(total_R / len(differences), [0.025, 0.975])
    point = float(np.mean([difference_SN.mean() for difference_SN in differences]))
    return Interval(point, float(low), float(high))


def verdict(interval: Interval, *, margin: float = 0.005, floor: float = -0.02) -> str:
    """What an interval of ``first - second`` allows to be said of ``first``.

    Args:
        interval: from :func:`paired_bootstrap`, as ratios.
        margin: the largest deficit of the point estimate that counts as no loss.
        floor: the interval must stay above this for that claim.

    Returns:
        ``"better"`` when the interval lies above 0; else ``"at most 0.5 point below"`` (for the
        default margin) when point estimate and interval support it; else ``"worse"`` when the
        interval lies below 0; else ``"not distinguishable"``.
    """
    if interval.low > 0:
        return "better"
    if interval.point >= -margin and interval.low > floor:
        return f"at most {100 * margin:g} point below"
    return "worse" if interval.high < 0 else "not distinguishable"


def _differences(
    first: Mapping[str, Outcomes], second: Mapping[str, Outcomes]
) -> list[npt.NDArray[np.int8]]:
    """Per farm, in name order: (S,N) of -1, 0 and 1."""
    if not first or set(first) != set(second):
        odd = ", ".join(sorted(set(first) ^ set(second))) or "there is none"
        raise DataError(f"a paired comparison needs the same farms on both sides; differing: {odd}")
    found = [_paired(farm, first[farm], second[farm]) for farm in sorted(first)]
    if len({len(difference) for difference in found}) > 1:
        raise DataError("a paired comparison needs the same number of seeds at every farm")
    return found


def _paired(farm: str, first: Outcomes, second: Outcomes) -> npt.NDArray[np.int8]:
    try:
        one_SN, other_SN = np.atleast_2d(np.asarray(first)), np.atleast_2d(np.asarray(second))
    except ValueError as error:
        raise DataError(f"farm {farm}: every seed needs the outcomes of the same images") from error
    if one_SN.dtype != np.bool_ or other_SN.dtype != np.bool_ or one_SN.ndim != 2:
        raise DataError(f"farm {farm}: outcomes must be booleans, one per image and seed")
    if one_SN.shape != other_SN.shape or one_SN.size == 0:
        raise DataError(
            f"farm {farm}: outcomes of {one_SN.shape} and {other_SN.shape} (seeds, images) "
            "cannot be paired; evaluate both models on the same images"
        )
    return one_SN.astype(np.int8) - other_SN.astype(np.int8)


def _resampled_means(
    difference: npt.NDArray[np.int8], draws: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """(S,N) -> (R,S): means over N images drawn with replacement, the same for all seeds."""
    images = difference.shape[1]
    chosen_RN = rng.integers(images, size=(draws, images), dtype=np.int32)
    return np.stack([row_N[chosen_RN].mean(axis=1) for row_N in difference], axis=1)
