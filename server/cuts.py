"""The prune events of a run as its report shows them: who was just below the line, who just above.

The same figures as ``mask explain`` gives of one head (server/explain.py), of all heads that a cut
removed and of the closest that stayed.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.mask import Mask
from server.masks import masks_of
from server.rows import RunRow, ScoreRow
from server.store import Store
from server.story import CutHead, CutPoint
from server.trial import outcome

CLOSEST = 6
"""Heads that stayed, beside those that went."""


def cuts(store: Store, run: RunRow) -> tuple[CutPoint, ...]:
    """The events of a run that removed heads, in order."""
    masks = masks_of(store, run)
    undone = {row.event for row in store.verdicts(run.run) if not row.accepted}
    trials = store.trials(run.run)
    found = []
    for number, rows in store.scores(run.run).items():
        together = next((row for row in rows if row.farm is None), None)
        if together is None or number not in masks.after:
            continue
        before, kept = masks.by_digest[together.mask], masks.after[number]
        if kept.heads != before.heads:
            own = [row for row in rows if row.farm is not None and row.mask == together.mask]
            tried = outcome(trials[number]) if number in trials else ""
            cut = _cut(number, together, own, before, kept)
            found.append(cut.model_copy(update={"undone": number in undone, "tried": tried}))
    return tuple(found)


def _cut(
    number: int,
    together: ScoreRow,
    own: Sequence[ScoreRow],
    before: Mask,
    after: Mask,
) -> CutPoint:
    units = [(block, head) for block, kept in enumerate(before.heads) for head in kept]
    stays = np.array([head in after.heads[block] for block, head in units])
    worth = over_mean(together)
    farms = {row.farm or "": over_mean(row) for row in own}
    threshold = _threshold(worth, stays)
    near = np.flatnonzero(stays)
    near = near[np.argsort(np.abs(worth[near] - threshold), kind="stable")][:CLOSEST]
    shown = sorted([*np.flatnonzero(~stays), *near], key=lambda at: (worth[at], units[at]))
    return CutPoint(
        round=number,
        heads=len(units),
        left=int(stays.sum()),
        threshold=threshold,
        rows=tuple(
            CutHead(
                block=units[at][0],
                head=units[at][1],
                removed=not stays[at],
                together=float(worth[at]),
                farms={farm: float(of[at]) for farm, of in farms.items()},
            )
            for at in shown
        ),
    )


def _threshold(worth: npt.NDArray[np.float64], stays: npt.NDArray[np.bool_]) -> float:
    """Half-way from the best head that went to the next one above it that stayed."""
    best = float(worth[~stays].max())
    above = worth[stays & (worth > best)]
    return (best + float(above.min())) / 2 if len(above) else best


def over_mean(row: ScoreRow) -> npt.NDArray[np.float64]:
    """Head scores over the mean of all heads of that round; 1 for all where nothing matters."""
    values = row.heads.astype(np.float64)
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)
