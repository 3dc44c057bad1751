"""Farms that do not agree on heads, and a mask for each group of those that do.

Farms are alike as far as they rank heads alike: Spearman's correlation of their scores in the last
round that ended with a cut of heads. Groups are merged, the two most alike first, while the mean
over their pairs is not below a threshold (average linkage). For each group the mask is chosen as
the shared one was: from the same heads, as many of them, by the consensus of the group's farms
alone, lowered where other heads can stand in as it was for all (server/redundancy.py; the factor of
each head is taken over from the shared consensus, for the moments of that round are gone).

What a group would gain is estimated by its farms' own scores: the share that a mask keeps of what
the heads are worth to a farm, the mean over its farms. It is an estimate, before compensation and
recovery, and of heads alone. The shared mask stays what the run goes by.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from common.budget import Budget, choose_mask
from common.errors import StateError
from common.mask import Mask
from common.scores import UnitScores
from common.spec import ModelSpec
from server.consensus import consensus, rank_correlation
from server.masks import masks_of
from server.rows import RunRow, ScoreRow
from server.store import Store

THRESHOLD = 0.5


@dataclass(frozen=True)
class Cluster:
    """Farms that agree: mean correlation of their pairs, and the mask that they would choose.

    ``shared`` and ``own`` are the shares of their own head scores that the shared mask and theirs
    keep, mean over the farms; ``other`` counts the heads that theirs keeps and the shared does not.
    """

    farms: tuple[str, ...]
    agreement: float
    shared: float
    own: float
    other: int
    mask: Mask

    @property
    def gain(self) -> float:
        """Share of their own score that they would keep more."""
        return self.own - self.shared


@dataclass(frozen=True)
class Clusters:
    """What was found in the scores of ``round``; ``agreement`` is that of all pairs of farms."""

    run: int
    round: int
    threshold: float
    agreement: float
    kept: int
    heads: int
    found: tuple[Cluster, ...]


def clusters(store: Store, run: RunRow, dense: ModelSpec, threshold: float = THRESHOLD) -> Clusters:
    """Group the farms of a run by what they said of heads.

    Args:
        store: the server's store.
        run: that cut heads.
        dense: the backbone that its masks refer to.
        threshold: mean rank correlation between two groups, -1 to 1, from which they are one.

    Raises:
        StateError: the run has cut no heads yet, or no two farms sent scores.
    """
    number, rows, before, after = _last_cut(store, run)
    together = next(row for row in rows if row.farm is None)
    own = {row.farm: _as_scores(row, before) for row in rows if row.farm is not None}
    if len(own) < 2:
        raise StateError(f"run {run.run}: fewer than two farms sent scores, nobody can disagree")
    plan = json.loads(run.config_json)["config"]["plan"]
    examples = {row.farm: row.examples for row in store.farms(run.run)}
    kept = sum(map(len, after.heads))
    budget = Budget(
        heads_kept=kept / sum(dense.heads), whole_attention=plan.get("whole_attention", False)
    )
    found = []
    for group in grouped(own, threshold):
        weighed = [(examples.get(farm, 1), own[farm]) for farm in group]
        agreed = consensus(weighed, kappa=plan["kappa"], rule=plan["consensus"])
        mask = choose_mask(_counted(agreed, together, before), before, dense, budget)
        found.append(
            Cluster(
                farms=group,
                agreement=rank_correlation([own[farm] for farm in group]),
                shared=_mean_mass(own, group, before, after),
                own=_mean_mass(own, group, before, mask),
                other=len(_units(mask) - _units(after)),
                mask=mask,
            )
        )
    all_agree = rank_correlation(list(own.values()))
    heads = sum(map(len, before.heads))
    return Clusters(run.run, number, threshold, all_agree, kept, heads, tuple(found))


def _last_cut(store: Store, run: RunRow) -> tuple[int, list[ScoreRow], Mask, Mask]:
    """The last round whose cut of heads still stands: its scores, and the masks around it."""
    masks = masks_of(store, run)
    undone = {row.event for row in store.verdicts(run.run) if not row.accepted}
    for number, rows in sorted(store.scores(run.run).items(), reverse=True):
        if number in masks.after and number not in undone and rows:
            before, after = masks.by_digest[rows[0].mask], masks.after[number]
            if before.heads != after.heads:
                return number, rows, before, after
    raise StateError(
        f"run {run.run} has removed no heads that are still gone, so no mask can be compared"
    )


def _as_scores(row: ScoreRow, mask: Mask) -> UnitScores:
    """Scores of heads; neurons, which are not kept on record, count for nothing."""
    counts = tuple(map(len, mask.heads))
    heads = tuple(np.split(row.heads.astype(np.float32), np.cumsum(counts)[:-1]))
    return UnitScores(heads, tuple(np.zeros(len(kept), np.float32) for kept in mask.neurons))


def _counted(agreed: UnitScores, together: ScoreRow, mask: Mask) -> UnitScores:
    """The consensus of a group, lowered as that of all farms was."""
    if together.importance is None:
        return agreed
    plain = together.importance.astype(np.float64)
    factor = np.divide(together.heads, plain, out=np.ones_like(plain), where=plain > 0)
    lowered = (agreed.flat_heads() * factor).astype(np.float32)
    return _as_scores(ScoreRow(None, mask.digest, lowered), mask)


def grouped(own: Mapping[str, UnitScores], threshold: float) -> list[tuple[str, ...]]:
    """Farms by name in groups, the largest first; average linkage of rank correlations."""
    alike = {
        frozenset(pair): rank_correlation([own[farm] for farm in pair])
        for pair in combinations(sorted(own), 2)
    }
    groups: list[tuple[str, ...]] = [(farm,) for farm in sorted(own)]

    def between(one: tuple[str, ...], other: tuple[str, ...]) -> float:
        return float(np.mean([alike[frozenset((a, b))] for a in one for b in other]))

    while len(groups) > 1:
        pairs = list(combinations(groups, 2))
        values = [between(*pair) for pair in pairs]
        at = int(np.argmax(values))
        if values[at] < threshold:
            break
        merged = tuple(sorted(pairs[at][0] + pairs[at][1]))
        groups = sorted([group for group in groups if group not in pairs[at]] + [merged])
    return sorted(groups, key=lambda group: (-len(group), group))


def _mean_mass(
    own: Mapping[str, UnitScores], group: Sequence[str], before: Mask, after: Mask
) -> float:
    """The share of its own score that a mask keeps of a farm, the mean over these."""
    keep = np.concatenate(
        [np.isin(had, has) for had, has in zip(before.heads, after.heads, strict=True)]
    )
    shares = []
    for farm in group:
        values = own[farm].flat_heads().astype(np.float64)
        total = values.sum()
        shares.append(values[keep].sum() / total if total > 0 else keep.mean())
    return float(np.mean(shares))


def _units(mask: Mask) -> set[tuple[int, int]]:
    return {(block, head) for block, kept in enumerate(mask.heads) for head in kept}


def words(found: Clusters) -> str:
    """For people."""
    head = (
        f"run {found.run}, round {found.round}: {found.kept} of {found.heads} heads kept, rank "
        f"correlation between farms {found.agreement:.2f}"
    )
    if len(found.found) == 1:
        return f"{head}\nall farms agree (at least {found.threshold:g}): the shared mask is theirs"
    lines = [head, f"{len(found.found)} groups below {found.threshold:g} of each other:"]
    for number, one in enumerate(found.found, start=1):
        lines.append(
            f"  {number}  {', '.join(one.farms)}: keeps {100 * one.own:.1f} % of what heads are "
            f"worth to them with a mask of their own, {100 * one.shared:.1f} % with the shared one "
            f"({100 * one.gain:+.1f} points; {one.other} other heads)"
        )
    lines.append("an estimate, before compensation and recovery; the run keeps the shared mask")
    return "\n".join(lines)
