"""From the store to a story: what happened in one run, or in several that belong together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from common import backbone
from common.mask import Mask
from common.spec import ModelSpec, spec_of_text
from server.cuts import cuts
from server.models import Models
from server.privacy import combined, finite
from server.rows import CandidateRow, LinkRow, RoundRow, RunRow, TrafficRow, on_the_way
from server.store import Store
from server.story import FarmLine, HeadMap, PrivacyLine, Provenance, RoundPoint, Story

Interval = tuple[float, float]


@dataclass(frozen=True)
class Reports:
    """Test accuracy and macro-F1 by label and farm, over all runs of a story."""

    accuracy: Mapping[str, Mapping[str, float]]
    f1: Mapping[str, Mapping[str, float]]


def summarise(
    store: Store,
    models: Models,
    runs: Sequence[int],
    *,
    title: str,
    provenance: Provenance,
    species: Mapping[str, str] | None = None,
    interval: Interval | None = None,
    seconds: float | None = None,
) -> Story:
    """The story of ``runs``: reports come from all of them, rounds and mask from the last.

    Args:
        store: the server's store.
        models: its backbones, for the spec of the dense one.
        runs: run numbers; the last is the one that prunes (or would).
        title: of the story.
        provenance: how to get it again.
        species: by farm, where it is known; a farm's name stands in for it.
        interval: 95 % interval of dense minus pruned, where both were run.
        seconds: duration to state; by default that of the runs.
    """
    rows = [store.run(run) for run in runs]
    last = rows[-1]
    reports = _reports(store, runs)
    dense = backbone.read_spec(models.path(last.base))
    candidates = store.candidates(last.run)
    final = candidates[max(candidates)] if candidates else None
    mask = Mask.from_json(store.last_mask(last))
    lines = _lines(reports, _final_label(reports, last), species or {})
    spec = _shape(final, dense)
    dense_model = backbone.build(dense)
    return Story(
        title=title,
        farms=tuple(lines),
        mean=_mean(lines),
        ci95_dense_minus_pruned=interval,
        rounds=tuple(_points(store, last, candidates)),
        heads=_head_map(store, last, mask, dense),
        cuts=cuts(store, last),
        neurons_kept=tuple(
            kept / all_ for kept, all_ in zip(spec.neurons, dense.neurons, strict=True)
        ),
        heads_kept_ratio=mask.heads_kept_ratio,
        macs_ratio=(final.macs if final else backbone.macs(dense)) / backbone.macs(dense),
        params_ratio=(final.params if final else backbone.parameters(dense_model))
        / backbone.parameters(dense_model),
        macs=final.macs if final else backbone.macs(dense),
        params=final.params if final else backbone.parameters(dense_model),
        seconds=sum(map(_seconds, rows)) if seconds is None else seconds,
        provenance=provenance,
        privacy=_privacy(store, runs),
    )


def _shape(final: CandidateRow | None, dense: ModelSpec) -> ModelSpec:
    """What is left of the backbone; a run that distils takes nothing from its teacher."""
    spec = spec_of_text(final.spec_json) if final else dense
    return spec if isinstance(spec, ModelSpec) else dense


def _privacy(store: Store, runs: Sequence[int]) -> PrivacyLine | None:
    found = combined(store, runs)
    if found is None:
        return None
    most, delta = found
    return PrivacyLine(
        farm=most.farm,
        epsilon=finite(most.epsilon(delta)),
        delta=delta,
        updates=most.updates,
        scores=most.scores,
    )


def _seconds(run: RunRow) -> float:
    return max(0.0, (run.finished or run.started) - run.started)


def _reports(store: Store, runs: Sequence[int]) -> Reports:
    accuracy: dict[str, dict[str, float]] = {}
    f1: dict[str, dict[str, float]] = {}
    for run in runs:
        for row in (report for report in store.reports(run) if not on_the_way(report.label)):
            accuracy.setdefault(row.label, {})[row.farm] = row.accuracy
            f1.setdefault(row.label, {})[row.farm] = row.f1
    return Reports(accuracy, f1)


def _final_label(reports: Reports, last: RunRow) -> str:
    """The label of the last run's closing report; its message carries it."""
    return last.message if last.message in reports.accuracy else "probe"


def _lines(reports: Reports, final: str, species: Mapping[str, str]) -> list[FarmLine]:
    lines = []
    for farm, pruned in sorted(reports.accuracy.get(final, {}).items()):
        by_label = {label: farms.get(farm) for label, farms in reports.accuracy.items()}
        lines.append(
            FarmLine(
                farm=farm,
                species=species.get(farm, farm),
                probe=by_label.get("probe") or 0.0,
                local=by_label.get("local"),
                dense=by_label.get("dense"),
                pruned=pruned,
                f1_pruned=reports.f1[final][farm],
            )
        )
    return lines


def _mean(lines: Sequence[FarmLine]) -> FarmLine:
    def mean(name: str) -> float | None:
        values = [getattr(line, name) for line in lines]
        return fmean(values) if values and None not in values else None

    return FarmLine(
        farm="mean",
        species="",
        probe=mean("probe") or 0.0,
        local=mean("local"),
        dense=mean("dense"),
        pruned=mean("pruned") or 0.0,
        f1_pruned=mean("f1_pruned") or 0.0,
    )


def _points(store: Store, run: RunRow, candidates: Mapping[int, CandidateRow]) -> list[RoundPoint]:
    traffic, link = store.traffic(run.run), store.link_bytes(run.run)
    points, cuts = [_before(traffic, link)], not store.teaches(run.run)
    heads = 1.0
    for row in store.rounds(run.run):
        if row.kind != "align" or row.state != "committed" or row.round not in candidates:
            continue
        kept = row.heads_kept_ratio or 1.0
        mine = [line for line in traffic if line.round == row.round and line.kind == "align"]
        points.append(
            RoundPoint(
                round=row.round,
                macs_ratio=row.macs_ratio or 1.0,
                heads_kept_ratio=kept,
                mean_accuracy=row.mean_accuracy,
                accuracy={
                    reply.farm: reply.accuracy for reply in store.replies(run.run, row.round)
                },
                **_sizes(mine, [b for b in link if b.round == row.round and b.kind == "align"]),
                seconds=_round_seconds(row),
                event=_event(row, heads, points[-1].macs_ratio) if cuts else None,
            )
        )
        heads = kept
    return points


def _before(traffic: Sequence[TrafficRow], link: Sequence[LinkRow]) -> RoundPoint:
    """Before the first round: reports on the first backbone, and its download."""
    first = [line for line in traffic if line.round == 0]
    return RoundPoint(
        round=0,
        macs_ratio=1.0,
        heads_kept_ratio=1.0,
        **_sizes(first, [row for row in link if row.round == 0]),
    )


def _sizes(traffic: Sequence[TrafficRow], link: Sequence[LinkRow]) -> dict[str, Any]:
    """Bytes of one round by farm, as fields of its point; a farm may have been several nodes."""
    sums: dict[str, Counter[str]] = {
        name: Counter() for name in ("bytes_up", "bytes_down", "link_sent", "link_received")
    }
    for line in traffic:
        sums["bytes_up"][line.farm] += line.bytes_up
        sums["bytes_down"][line.farm] += line.bytes_down
    for row in link:
        sums["link_sent"][row.farm] += row.sent
        sums["link_received"][row.farm] += row.received
    return {name: dict(counter) for name, counter in sums.items()}


def _round_seconds(row: RoundRow) -> float:
    return max(0.0, (row.finished or row.started) - row.started)


def _event(row: RoundRow, heads_before: float, macs_before: float) -> str | None:
    heads, macs = row.heads_kept_ratio or 1.0, row.macs_ratio or 1.0
    if heads >= heads_before and macs >= macs_before:
        return None
    return f"pruned to {100 * heads:.0f} % of heads, {100 * macs:.0f} % of MACs"


def _head_map(store: Store, run: RunRow, mask: Mask, dense: ModelSpec) -> HeadMap:
    """The consensus score of every head when it was last scored, in dense coordinates."""
    scores: list[list[float | None]] = [[None] * count for count in dense.heads]
    rounds = store.scores(run.run).values()
    for row in (row for rows in rounds for row in rows if row.farm is None):
        flat = iter(row.heads.tolist())
        for block, kept in enumerate(Mask.from_json(store.mask(row.mask)).heads):
            for head in kept:
                scores[block][head] = next(flat)
    return HeadMap(
        scores=tuple(tuple(row) for row in scores),
        kept=tuple(
            tuple(head in kept for head in range(count))
            for kept, count in zip(mask.heads, dense.heads, strict=True)
        ),
    )
