"""Merging updates when some farms lie: a few rules by name, a chunk of numbers at a time.

    median    coordinate-wise median                                (Yin et al., 2018)
    trimmed   coordinate-wise mean without the lowest and highest k (Yin et al., 2018)
    krum      multi-Krum: the weighted mean of the n - f updates that lie closest to their
              n - f - 2 nearest neighbours                          (Blanchard et al., 2017)

with f = ceil(liars * n) farms that may say anything. Coordinate-wise rules hide what only few
farms learn; multi-Krum keeps whole updates, and is fooled by liars that lie close together.

Shapes: F farms, n numbers.
"""

import math
from collections.abc import Iterator
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from common.config import Aggregation
from common.errors import ConfigError

Doubles: TypeAlias = npt.NDArray[np.float64]
Floats: TypeAlias = npt.NDArray[np.float32]


class Stack(Protocol):
    """Updates side by side; every pass over it yields the same slices of the n numbers."""

    @property
    def count(self) -> int:
        """How many numbers an update has, n."""
        ...

    def __iter__(self) -> Iterator[tuple[slice, Doubles]]:
        """Where, and the numbers there: (F, part)."""
        ...


def merge(updates: Stack, weights: Doubles, rule: Aggregation, liars: float) -> Floats:
    """One update (n,) from those of ``updates``, rows in the order of farms, with ``weights`` (F,).

    Raises:
        ConfigError: ``liars`` is not in [0, 1/2), or the rule is not one of these.
    """
    if not 0 <= liars < 0.5:
        raise ConfigError(f"no rule withstands a share of {liars} lying farms; give less than 0.5")
    farms = len(weights)
    # never so many that nothing would be left to agree
    wrong = min(math.ceil(liars * farms), (farms - 1) // 2)
    if rule == "krum":
        chosen = _closest(updates, farms, wrong)
        shares = np.where(chosen, weights, 0.0)
        return _each(updates, lambda part: (shares / shares.sum()) @ part)
    if rule == "median":
        return _each(updates, lambda part: np.median(part, axis=0))
    if rule == "trimmed":
        kept = slice(wrong, farms - wrong)
        return _each(updates, lambda part: np.sort(part, axis=0)[kept].mean(axis=0))
    raise ConfigError(f"rounds.aggregation '{rule}' is unknown; choose mean, median, trimmed, krum")


class _Rule(Protocol):
    def __call__(self, part: Doubles, /) -> Doubles: ...


def _each(updates: Stack, rule: _Rule) -> Floats:
    merged = np.empty(updates.count, dtype=np.float32)
    for where, part in updates:
        merged[where] = rule(part)
    return merged


def _closest(updates: Stack, farms: int, wrong: int) -> npt.NDArray[np.bool_]:
    """Which farms multi-Krum keeps: (F,). Ties go to the earlier farm."""
    neighbours = max(1, farms - wrong - 2)
    if farms <= 2:
        return np.ones(farms, dtype=bool)
    squares = np.zeros((farms, farms))
    for _, part in updates:
        for row in range(farms):
            # differences, not a Gram matrix: two nearly equal updates would cancel out
            squares[row] += np.square(part - part[row]).sum(axis=1)
    np.fill_diagonal(squares, np.inf)
    distance = np.sort(squares, axis=1)[:, :neighbours].sum(axis=1)
    chosen = np.zeros(farms, dtype=bool)
    chosen[np.argsort(distance, kind="stable")[: farms - wrong]] = True
    return chosen
