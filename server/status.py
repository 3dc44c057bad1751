"""What an operator sees while a run goes on: one snapshot of the store, as JSON or as tables."""

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.mask import Mask
from common.protocols import older
from common.scores import UnitScores
from server import privacy
from server.consensus import rank_correlation
from server.rows import FarmRow, RunRow, TrialRow, on_the_way
from server.store import Store, opened_run
from server.story import percent, size_text
from server.trial import outcome


def snapshot(folder: Path) -> dict[str, Any]:
    """The last run as plain values.

    Raises:
        StateError: there is no run yet, or the store cannot be read.
    """
    with opened_run(folder) as (store, run):
        return _run(store, run)


def _run(store: Store, run: RunRow) -> dict[str, Any]:
    mask = Mask.from_json(store.last_mask(run))
    sizes = {row.round: row.macs_ratio for row in store.rounds(run.run) if row.kind == "align"}
    rejected = {str(reason): count for reason, count in store.rejection_counts(run.run).items()}
    return {
        "run": run.run,
        "label": run.message,
        "state": run.state,
        "detail": run.detail,
        "rounds": _rounds(store, run.run),
        "farms": _farms(store, run.run),
        "paused": {row.farm: row.reason for row in store.pauses()},
        "verdicts": [
            {
                "round": row.event,
                "judged": row.judged,
                "accepted": row.accepted,
                "macs_ratio": sizes.get(row.event),
                "drop_ratio": row.drop_ratio,
                "farms": row.farms,
            }
            for row in store.verdicts(run.run)
        ],
        "tried": [vars(row) for rows in store.trials(run.run).values() for row in rows],
        "privacy": privacy.snapshot(store, run),
        "agreement": _agreement(store, run.run),
        "rejected": {reason: count for reason, count in rejected.items() if count},
        "mask": {
            "heads_kept_ratio": mask.heads_kept_ratio,
            "neurons_kept_ratio": mask.neurons_kept_ratio,
            "text": mask.describe(),
        },
    }


def _agreement(store: Store, run: int) -> float | None:
    """Mean rank correlation of the farms' head scores in the last score round."""
    rounds = store.scores(run)
    if not rounds:
        return None
    last = [row for row in rounds[max(rounds)] if row.farm is not None]
    if len(last) < 2:
        return None
    return rank_correlation([UnitScores(heads=(row.heads,), neurons=()) for row in last])


def _rounds(store: Store, run: int) -> list[dict[str, Any]]:
    return [
        {
            "round": row.round,
            "state": row.state,
            "replies": len(store.replies(run, row.round)),
            "quorum": row.quorum,
            "mean_accuracy": row.mean_accuracy,
            "macs_ratio": row.macs_ratio,
            "heads_kept_ratio": row.heads_kept_ratio,
            "seconds": None if row.finished is None else row.finished - row.started,
        }
        for row in store.rounds(run)
        if row.kind == "align"
    ]


def _farms(store: Store, run: int) -> list[dict[str, Any]]:
    """A line per farm; one that slept or was started again has been several nodes."""
    traffic, link = store.traffic(run), _link(store, run)
    reports: dict[str, dict[str, float]] = {}
    for report in store.reports(run):
        if not on_the_way(report.label):
            reports.setdefault(report.farm, {})[report.label] = report.accuracy
    nodes: dict[str, list[FarmRow]] = {}
    for row in store.farms(run):
        nodes.setdefault(row.farm, []).append(row)
    lines = []
    for farm, rows in nodes.items():
        newest = max(rows, key=lambda row: row.last_seen)
        sent, received = link.get(farm, (None, None))
        lines.append(
            {
                "farm": farm,
                "images": newest.examples,
                "classes": newest.classes,
                "protocol": newest.protocol,
                "reports": reports.get(farm, {}),
                "bytes_up": sum(line.bytes_up for line in traffic if line.farm == farm),
                "bytes_down": sum(line.bytes_down for line in traffic if line.farm == farm),
                "link_sent": sent,
                "link_received": received,
                "rejected": sum(row.rejected for row in rows),
            }
        )
    return lines


def _link(store: Store, run: int) -> dict[str, tuple[int, int]]:
    """Bytes sent and received at the socket, of the farms that count them."""
    totals: dict[str, tuple[int, int]] = {}
    for row in store.link_bytes(run):
        sent, received = totals.get(row.farm, (0, 0))
        totals[row.farm] = sent + row.sent, received + row.received
    return totals


def show(values: dict[str, Any]) -> Group:
    """The snapshot for ``rich.console.Console.print``."""
    head = f"run {values['run']} '{values['label']}': {values['state']}"
    parts: list[RenderableType] = [Text(f"{head}  {values['detail']}".rstrip(), "bold")]
    rounds = table("rounds", "round", "state", "replies", "accuracy", "MACs", "heads", "seconds")
    for row in values["rounds"]:
        rounds.add_row(
            str(row["round"]),
            row["state"],
            f"{row['replies']} (quorum {row['quorum']})",
            percent(row["mean_accuracy"]),
            percent(row["macs_ratio"], 0),
            percent(row["heads_kept_ratio"], 0),
            "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
        )
    columns = ("farm", "images", "classes", "test accuracy", "messages", "at socket", "rejected")
    farms = table("farms", *columns)
    for row in values["farms"]:
        reports = ", ".join(f"{label} {value:.3f}" for label, value in row["reports"].items())
        farms.add_row(
            row["farm"],
            str(row["images"]),
            str(row["classes"]),
            reports or "-",
            _both_ways(row["bytes_up"], row["bytes_down"]),
            _both_ways(row["link_sent"], row["link_received"]),
            str(row["rejected"]),
        )
    parts += [rounds, farms, Text("mask", "bold"), Text(values["mask"]["text"])]
    if values["agreement"] is not None:
        parts.append(
            Text(f"rank correlation of head scores between farms: {values['agreement']:.2f}")
        )
    if values["privacy"] is not None:
        parts.append(Text(privacy.describe(values["privacy"])))
    for event, tried in groupby(values["tried"], key=itemgetter("event")):
        said = outcome([TrialRow(**row) for row in tried])
        parts.append(Text(f"after round {event} {said}"))
    for row in values["verdicts"]:
        parts.append(
            Text(
                f"cut after round {row['round']} to {percent(row['macs_ratio'])} of MACs: "
                f"{'accepted' if row['accepted'] else 'undone'}, "
                f"{100 * row['drop_ratio']:+.1f} points lost over {row['farms']} farms"
            )
        )
    for row in values["farms"]:
        if older(row["protocol"]):
            words = f"{row['farm']} runs an older release (protocol {row['protocol']}); upgrade it"
            parts.append(Text(words, "bold"))
    for farm, reason in values["paused"].items():
        parts.append(Text(f"paused: {farm} ({reason})", "bold"))
    if values["rejected"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in values["rejected"].items())
        parts.append(Text(f"rejected replies: {reasons}"))
    return Group(*parts)


def _both_ways(up: int | None, down: int | None) -> str:
    """Two short lines; at the socket with all that Flower sends around the messages."""
    return "-" if up is None or down is None else f"{size_text(up)} up\n{size_text(down)} down"


def table(title: str, *columns: str) -> Table:
    """An empty table, its columns as wide as they need."""
    made = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
