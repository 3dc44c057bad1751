"""Rounds, one a line."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from server import charts
from server.facts import MOST_ROUNDS, RoundFacts, Sources, planned_rounds
from server.markup import Child, node
from server.page_shell import empty, heading, moment, pill, section, table
from server.story import duration_text, percent, size_text

COLUMNS = (
    "Round",
    "State",
    "Began",
    "Took",
    "Replies",
    "Rejected",
    "Accuracy",
    "Compute",
    "Heads",
    "Up",
    "Down",
)


def rounds_page(sources: Sources, before: int | None) -> list[Element | None]:
    """The parts of the page."""
    run = sources.facts.newest_run()
    if run is None:
        return [heading("Rounds"), empty("No run yet.")]
    rows = sources.facts.round_facts(run.run, before)
    note = f"Run {run.run}, {planned_rounds(run)} rounds planned. Accuracy is on the farms' decide "
    note += "parts, of the backbone that the round began with."
    if not rows:
        return [heading("Rounds", note), empty("No round was begun yet.")]
    return [
        heading("Rounds", note, pill(run.state)),
        section("rounds", "Rounds", _table(rows), _pages(rows, before)),
        _traffic(rows),
        _accuracies(sources, run.run),
    ]


def rejected_words(one: RoundFacts) -> str:
    """Rejections by reason."""
    return ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in one.rejected.items()
    )


def _table(rows: Sequence[RoundFacts]) -> Element:
    lines: list[list[Child]] = []
    for one in reversed(rows):
        row = one.row
        took = "-" if row.finished is None else duration_text(max(0.0, row.finished - row.started))
        again = f" (begun {row.attempt} times)" if row.attempt > 1 else ""
        lines.append(
            [
                str(row.round),
                pill(row.state, "good" if row.state == "committed" else "warn"),
                moment(row.started),
                took + again,
                f"{one.replies} of {row.quorum}",
                rejected_words(one) or "none",
                percent(row.mean_accuracy),
                percent(row.macs_ratio),
                percent(row.heads_kept_ratio, 0),
                size_text(one.bytes_up),
                size_text(one.bytes_down),
            ]
        )
    return table("rounds", "Rounds, newest first", COLUMNS, lines, words=(1, 2, 5))


def _pages(rows: Sequence[RoundFacts], before: int | None) -> Element | None:
    links = []
    if before is not None:
        links.append(node("a", "Newest rounds", href="/rounds"))
    if len(rows) == MOST_ROUNDS and rows[0].row.round > 1:
        links.append(node("a", "Earlier rounds", href=f"/rounds?before={rows[0].row.round}"))
    return node("p", *links, class_="pages") if links else None


def _traffic(rows: Sequence[RoundFacts]) -> Element:
    done = [one for one in rows if one.row.state == "committed"]
    if not done:
        return section("traffic", "What crossed the network", empty("Nothing yet."))
    panels = []
    for way, words, size in (
        ("Up", "From farms: updates and scores, never an image.", "bytes_up"),
        ("Down", "To farms: steps of the backbone.", "bytes_down"),
    ):
        # per farm that answered: what the chart's columns stand for
        sizes = [
            (one.row.round, {"farm": round(getattr(one, size) / max(one.replies, 1))})
            for one in done
        ]
        chart = charts.traffic_chart(f"{way} per farm and round", sizes)
        panels.append(node("figure", node("h3", way), node("p", words), chart, class_="panel"))
    return section(
        "traffic",
        "What crossed the network",
        node("div", *panels, class_="pair"),
        note="Messages, mean per farm that answered.",
    )


def _accuracies(sources: Sources, run: int) -> Element | None:
    points = sources.facts.points(run)
    farms = sorted({farm for point in points for farm in point.accuracy})
    if not farms or len(farms) > 24:  # wider than anybody reads
        return None
    lines: list[list[Child]] = [
        [
            str(point.round),
            percent(point.mean_accuracy),
            *(percent(point.accuracy.get(farm)) for farm in farms),
        ]
        for point in reversed(points)
    ]
    shown = table("accuracies", "Accuracy of every farm", ("Round", "Mean", *farms), lines)
    return section("accuracies", "Accuracy of every farm", shown)
