"""How long things take, compared fairly on a machine that is not quiet.

All take turns, in another order each time, so that whatever slows the machine down slows all of
them. A turn begins with a run that does not count: it brings weights back into the caches, and
lets the threads of whoever was before go to sleep. Ratios are those of the same turn, their median
over turns.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

RUNS = 4
"""That count, in a turn."""
WARM_UP_TURNS, LEAST_TURNS = 1, 3

Work = Callable[[], object]


class Latency(NamedTuple):
    """Seconds, and the ratio to the first one of a comparison."""

    p50: float
    p95: float
    ratio: float

    @classmethod
    def of(cls, seconds: npt.NDArray[np.float64], first: npt.NDArray[np.float64]) -> Self:
        """From (turns, runs) of both."""
        ratios = np.median(seconds, axis=1) / np.median(first, axis=1)
        p50, p95 = np.quantile(seconds, [0.5, 0.95])
        return cls(float(p50), float(p95), float(np.median(ratios)))


def compared(
    works: Sequence[Work], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[Latency]:
    """Let all take turns.

    Args:
        works: what is measured, the first of them being what the others are compared with.
        seconds: no turn begins after that, for all together; three turns are taken at least.
        clock: tells seconds.
    """
    measured: list[list[list[float]]] = [[] for _ in works]
    order, until = np.random.default_rng(0), clock() + seconds
    turn = 0
    while turn < WARM_UP_TURNS + LEAST_TURNS or clock() < until:
        for number in order.permutation(len(works)):
            taken = [_seconds(works[number], clock) for _ in range(1 + RUNS)]
            if turn >= WARM_UP_TURNS:
                measured[number].append(taken[1:])
        turn += 1
    arrays = [np.array(one) for one in measured]
    return [Latency.of(one, arrays[0]) for one in arrays]


def _seconds(work: Work, clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin
