"""Every attention head of a run at once: kept or gone, what it was worth, and who needed it.

The same figures as ``mask explain`` gives for one head (server/explain.py), for all of them, from
the round in which each was scored last. Blocks and heads count from 0, as there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.mask import Mask
from server.facts import HeadScores

MOST_NEEDED = 3
"""Farms that are named beside a head."""


@dataclass(frozen=True)
class Need:
    """A farm that a head is worth more to than the mean head."""

    farm: str
    score: float
    rank: int


@dataclass(frozen=True)
class Head:
    """One head; ``score`` over the mean of its round, ``rank`` from 1, both by all together.

    ``needs`` are the farms to which it was worth most, ``needed`` is how many it was worth more to
    than the mean head, of ``farms``. ``gone`` is the round after which it was removed.
    """

    block: int
    head: int
    kept: bool
    score: float | None = None
    rank: int | None = None
    heads: int = 0
    round: int | None = None
    needs: tuple[Need, ...] = ()
    needed: int = 0
    farms: int = 0
    gone: int | None = None

    @property
    def words(self) -> str:
        """In a sentence or two."""
        fate = "kept" if self.kept else "removed"
        fate += f" after round {self.gone}" if self.gone is not None else ""
        if self.score is None or self.rank is None:
            return f"{fate}, not scored yet"
        worth = f"{self.score:.2f} times the mean head, {self.rank} of {self.heads}"
        return f"{fate}; worth {worth} in round {self.round}. {self.whose}"

    @property
    def whose(self) -> str:
        """Who needed it."""
        if not self.farms:
            return "No farm's own scores are there."
        if not self.needed:
            return f"Worth less than the mean head to each of {self.farms} farms."
        names = ", ".join(f"{one.farm} ({one.score:.1f})" for one in self.needs)
        return f"Worth more than the mean head to {self.needed} of {self.farms} farms: {names}."


def head_map(
    mask: Mask, scores: Sequence[HeadScores], after: Mapping[int, Mask]
) -> tuple[tuple[Head, ...], ...]:
    """The heads of every block.

    Args:
        mask: what is kept now.
        scores: of farms and of all together, oldest first.
        after: the mask that each committed round ended with, in order.
    """
    last: dict[tuple[int, int], Head] = {
        (block, head): Head(block, head, head in mask.heads[block])
        for block, count in enumerate(mask.dense_heads)
        for head in range(count)
    }
    rounds: dict[int, list[HeadScores]] = {}
    for row in scores:
        rounds.setdefault(row.round, []).append(row)
    for number, rows in rounds.items():
        last.update(_heard(last, number, rows))
    for unit, head in last.items():
        if not head.kept:
            last[unit] = replace(head, gone=_gone(after, *unit))
    return tuple(
        tuple(last[block, head] for head in range(count))
        for block, count in enumerate(mask.dense_heads)
    )


def _heard(
    heads: Mapping[tuple[int, int], Head], number: int, rows: Sequence[HeadScores]
) -> dict[tuple[int, int], Head]:
    """What one score round said of the heads that there were."""
    together = next((row for row in rows if row.farm is None), None)
    if together is None:
        return {}
    units = [(block, head) for block, kept in enumerate(together.mask.heads) for head in kept]
    own = [row for row in rows if row.farm is not None and row.mask == together.mask]
    values = {row.farm or "": _over_mean(row) for row in own}
    worth, found = _over_mean(together), {}
    for at, unit in enumerate(units):
        needs = sorted(
            (
                Need(farm, float(of[at]), 1 + int((of > of[at]).sum()))
                for farm, of in values.items()
                if of[at] > 1
            ),
            key=lambda one: (-one.score, one.farm),
        )
        found[unit] = replace(
            heads[unit],
            score=float(worth[at]),
            rank=1 + int((worth > worth[at]).sum()),
            heads=len(units),
            round=number,
            needs=tuple(needs[:MOST_NEEDED]),
            needed=len(needs),
            farms=len(own),
        )
    return found


def _over_mean(row: HeadScores) -> np.typing.NDArray[np.float64]:
    values = row.heads.astype(np.float64)
    mean = values.mean() if len(values) else 0.0
    return values / mean if mean > 0 else np.ones_like(values)


def _gone(after: Mapping[int, Mask], block: int, head: int) -> int | None:
    there, gone = True, None
    for number, mask in after.items():
        now = head in mask.heads[block]
        gone = number if there and not now else gone
        there = now
    return gone
