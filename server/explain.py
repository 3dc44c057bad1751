"""Why a head is still there, or is not: what each farm said of it, and what came of that."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from common.costs import unit_costs
from common.errors import ConfigError
from common.mask import Mask
from common.scores import Floats, invariance
from common.spec import ModelSpec
from server.masks import masks_of
from server.rows import RunRow, ScoreRow
from server.status import table
from server.store import Store
from server.story import percent


@dataclass(frozen=True)
class Opinion:
    """What one farm, or all of them together (``farm`` None), said of a head.

    ``score`` is over the mean score of the heads there were then, ``rank`` counts from 1, the
    best. ``importance`` is over its mean, too; ``invariance`` is exp(-max(mmd2, 0) / tau). Both are
    None where they were not measured or not kept. Of all together, a head that others can stand in
    for has a score below its importance.
    """

    farm: str | None
    score: float
    rank: int
    importance: float | None = None
    invariance: float | None = None


@dataclass(frozen=True)
class Hearing:
    """A score round: how many heads there were, how many were left after it, who said what."""

    round: int
    heads: int
    left: int
    opinions: tuple[Opinion, ...]


@dataclass(frozen=True)
class Case:
    """A head of a run: what it costs, as a share of the dense MACs, and what became of it."""

    run: int
    block: int
    head: int
    criterion: str
    macs_ratio: float
    kept: bool
    fate: str
    hearings: tuple[Hearing, ...]


def explain(store: Store, run: RunRow, dense: ModelSpec, block: int, head: int) -> Case:
    """The case of one head, both counted from 0 in the dense backbone.

    Raises:
        ConfigError: the dense backbone has no such head.
    """
    if not 0 <= block < len(dense.heads) or not 0 <= head < dense.heads[block]:
        raise ConfigError(
            f"no head {head} in block {block}: blocks are 0 to {len(dense.heads) - 1}, heads 0 to "
            f"{dense.heads[min(max(block, 0), len(dense.heads) - 1)] - 1}"
        )
    masks = masks_of(store, run)
    tau = store.tau(run.run)
    hearings = [
        _hearing(number, rows, before, masks.after[number], (block, head), tau)
        for number, rows in store.scores(run.run).items()
        if head in (before := masks.by_digest[rows[0].mask]).heads[block]
    ]
    total, head_cost, _ = unit_costs(dense)
    return Case(
        run=run.run,
        block=block,
        head=head,
        criterion=json.loads(run.config_json)["config"]["plan"]["criterion"],
        macs_ratio=head_cost / total,
        kept=head in Mask.from_json(store.last_mask(run)).heads[block],
        fate=_fate(masks.after, hearings, block, head),
        hearings=tuple(hearings),
    )


def _hearing(
    number: int,
    rows: Sequence[ScoreRow],
    before: Mask,
    after: Mask,
    unit: tuple[int, int],
    tau: float | None,
) -> Hearing:
    block, head = unit
    at = sum(map(len, before.heads[:block])) + before.heads[block].index(head)
    return Hearing(
        round=number,
        heads=sum(map(len, before.heads)),
        left=sum(map(len, after.heads)),
        opinions=tuple(_opinion(row, at, tau) for row in rows),
    )


def _opinion(row: ScoreRow, at: int, tau: float | None) -> Opinion:
    seen = None
    if row.mmd2 is not None and row.mmd2.any() and tau is not None:
        seen = float(invariance(row.mmd2, tau)[at])
    return Opinion(
        farm=row.farm,
        score=_over_mean(row.heads, at),
        rank=1 + int((row.heads > row.heads[at]).sum()),
        importance=None if row.importance is None else _over_mean(row.importance, at),
        invariance=seen,
    )


def _over_mean(values: Floats, at: int) -> float:
    mean = float(np.mean(values, dtype=np.float64))
    return float(values[at]) / mean if mean > 0 else 1.0


def _fate(after: Mapping[int, Mask], hearings: Sequence[Hearing], block: int, head: int) -> str:
    """In words: removed in which round, or kept and by how much."""
    there = True
    removed = returned = 0
    for number, mask in after.items():
        now = head in mask.heads[block]
        removed = number if there and not now else removed
        returned = number if now and not there else returned
        there = now
    heard = {hearing.round: hearing for hearing in hearings}
    if not there:
        return f"removed after round {removed}{_because(heard.get(removed))}"
    back = f"; it was gone after round {removed} and came back" if returned else ""
    cuts = [hearing for hearing in hearings if hearing.left < hearing.heads]
    if not cuts:
        return f"kept: no cut so far removed a head{back}"
    last = cuts[-1]
    place = next(one.rank for one in last.opinions if one.farm is None)
    if place > last.left:
        return (
            f"kept after round {last.round} although only {place} of {last.heads}, and {last.left} "
            f"stayed: block {block} had no better one, and every block keeps one{back}"
        )
    return f"kept after round {last.round}: {place} of {last.heads}, and {last.left} stayed{back}"


def _because(hearing: Hearing | None) -> str:
    if hearing is None:
        return ""
    place = next(one.rank for one in hearing.opinions if one.farm is None)
    return f": {place} of {hearing.heads} by all farms together, and {hearing.left} stayed"


def show(case: Case) -> Group:
    """The case for ``rich.console.Console.print``."""
    cost = percent(case.macs_ratio, 2)
    title = f"block {case.block} head {case.head}, {cost} of the dense MACs: {case.fate}"
    parts: list[RenderableType] = [Text(title, "bold")]
    for hearing in case.hearings:
        said = table(
            f"round {hearing.round}: {hearing.heads} heads, {hearing.left} after it",
            *("farm", "score", "rank", "importance", "invariance"),
        )
        for one in hearing.opinions:
            said.add_row(
                one.farm or "all together",
                f"{one.score:.2f}",
                str(one.rank),
                "-" if one.importance is None else f"{one.importance:.2f}",
                "-" if one.invariance is None else f"{one.invariance:.2f}",
            )
        parts.append(said)
    if case.hearings:
        note = f"criterion {case.criterion}; score and importance over the mean of all heads"
        parts.append(Text(note))
    return Group(*parts)
