"""The first page: is all well, where is the run, and how good is the backbone."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from common.mask import Mask
from server import charts, headmap
from server.alerts import HEARD_SECONDS, Alert, alerts
from server.events import events
from server.facts import FarmFacts, RoundFacts, Sources, planned_rounds, worst
from server.markup import Child, node
from server.page_events import event_list
from server.page_rounds import rejected_words
from server.page_shell import bar, empty, farm_link, heading, moment, pill, section, table, tile
from server.rows import RunRow
from server.story import RoundPoint, duration_text, percent

MOST_LINES = 30
"""Farms whose own lines are drawn in the chart of all."""
MOST_CHIPS = 60
MOST_EVENTS = 8


def overview(sources: Sources, now: float) -> list[Element | None]:
    """The parts of the page."""
    facts = sources.facts
    run = facts.newest_run()
    found = alerts(sources, run, now)
    if run is None:
        words = "No run yet. Start one with: fieldfed-server train FOLDER"
        return [heading("Overview"), _alerts(found), empty(words)]
    farms = facts.farm_facts(run.run)
    rounds = facts.round_facts(run.run)
    return [
        heading(f"Run {run.run}", _span(run), pill(run.state)),
        _alerts(found),
        _now(sources, run, rounds, now),
        _figures(sources, run, farms, rounds, now),
        _charts(sources, run, farms),
        node(
            "div",
            _latest(sources),
            node("div", _serving(sources), _runs(sources)),
            class_="two",
        ),
    ]


def told(sources: Sources) -> str:
    """What a screen reader says when it changes."""
    run = sources.facts.newest_run()
    if run is None:
        return ""
    last = sources.facts.round_facts(run.run, most=1)
    if not last:
        return f"Run {run.run} {run.state}"
    row = last[0].row
    return f"Run {run.run} {run.state}, round {row.round} {row.state}"


def _span(run: RunRow) -> Element:
    label = node("b", run.message) if run.message else None
    parts: list[Child] = [label, " · began " if label is not None else "Began "]
    parts.append(moment(run.started))
    if run.finished is not None:
        parts += [", ended ", moment(run.finished)]
    return node("span", *parts)


def _alerts(found: Sequence[Alert]) -> Element:
    lines = [
        node("li", node("b", one.title), node("span", one.words), class_=one.tone) for one in found
    ]
    body = node("ul", *lines, class_="alerts") if lines else None
    return node("div", body, id="alerts", data_live="")


# --- the round -----------------------------------------------------------------------------------


def _now(sources: Sources, run: RunRow, rounds: Sequence[RoundFacts], now: float) -> Element:
    planned = planned_rounds(run)
    if not rounds:
        words = "Farms report on the first backbone; the first round follows."
        said = words if run.state == "running" else "No round was begun."
        return section("now", "Round", empty(said))
    last = rounds[-1]
    number = node("p", str(last.row.round), node("span", f" of {planned}"), class_="round")
    share = (last.row.round - (last.row.state == "open")) / max(planned, 1)
    steps = node(
        "div", number, bar(share, "rounds committed"), _state(run, last, now), class_="stage"
    )
    title = "Round now" if run.state == "running" else "Last round"
    return section("now", title, node("div", steps, _replies(sources, last, run), class_="now"))


def _state(run: RunRow, last: RoundFacts, now: float) -> Element:
    row = last.row
    if row.state == "open" and run.state == "running":
        late = " (over)" if row.deadline < now else ""
        parts: list[Child] = ["Open, began ", moment(row.started), "; deadline ", ""]
        parts += [moment(row.deadline, "left"), late]
        return node("p", *parts, class_="note")
    if row.state == "committed" and row.finished is not None:
        took = duration_text(max(0.0, row.finished - row.started))
        end = "; the farms report on what it made" if run.state == "running" else ""
        return node("p", "Committed ", moment(row.finished), f", took {took}{end}", class_="note")
    return node("p", "Was open when the run ended", class_="note")


def _replies(sources: Sources, last: RoundFacts, run: RunRow) -> Element:
    row = last.row
    share = last.replies / max(row.quorum, 1)
    came = set(sources.facts.answered(run.run, row.round))
    asked = sorted(came | set(sources.facts.asked(run.run, row.round)))
    words = f" of {row.quorum} replies needed"
    count = node("p", node("b", str(last.replies)), words, class_="count")
    note = f"{len(asked)} farms asked" + (f"; {rejected_words(last)}" if last.rejected else "")
    chips = [
        node(
            "li",
            farm_link(farm),
            node("span", "replied" if farm in came else "awaited", class_="unseen"),
            class_="chip done" if farm in came else "chip",
        )
        for farm in asked[:MOST_CHIPS]
    ]
    more = f"and {len(asked) - MOST_CHIPS} more" if len(asked) > MOST_CHIPS else None
    return node(
        "div",
        count,
        bar(share, "replies of the quorum"),
        node("p", note, class_="note"),
        node("ul", *chips, class_="chips", aria_label="Farms asked") if chips else None,
        node("p", more, class_="note") if more else None,
        class_="replies",
    )


# --- figures -------------------------------------------------------------------------------------


def _figures(
    sources: Sources,
    run: RunRow,
    farms: Sequence[FarmFacts],
    rounds: Sequence[RoundFacts],
    now: float,
) -> Element:
    mask = Mask.from_json(sources.facts.mask_now(run))
    kept, heads = sum(map(len, mask.heads)), sum(mask.dense_heads)
    macs = sources.facts.macs_ratio(run.run)
    mean = [one.row.mean_accuracy for one in rounds if one.row.mean_accuracy is not None]
    least = worst(farms)
    heard = sum(now - one.last_seen < HEARD_SECONDS for one in farms)
    minutes = f"heard of in the last {HEARD_SECONDS / 60:.0f} min"
    commit = sources.facts.last_commit()
    tiles = [
        tile("Mean accuracy", percent(mean[-1] if mean else None), _change(mean)),
        tile(
            "Worst farm",
            percent(least.latest if least else None),
            farm_link(least.farm) if least else "no reply yet",
        ),
        tile("Compute left", percent(macs), "of the dense backbone's MACs"),
        tile("Heads left", f"{kept} of {heads}", node("a", "which, and why", href="/heads")),
        tile("Farms online", f"{heard} of {len(farms)}", minutes),
        tile(
            "Last commit",
            moment(commit) if commit is not None else "-",
            "of a round, in any run",
        ),
    ]
    return section("figures", "Figures", node("dl", *tiles, class_="tiles"))


def _change(mean: Sequence[float]) -> str:
    if len(mean) < 2:
        return "over farms, decide part"
    change = round(100 * (mean[-1] - mean[0]), 1)
    sign = "+" if change > 0 else "\N{MINUS SIGN}" if change < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(change):.1f} points since the first round"


def _charts(sources: Sources, run: RunRow, farms: Sequence[FarmFacts]) -> Element:
    points = sources.facts.points(run.run)
    if not points:
        return section("charts", "Round by round", empty("Charts begin with the first commit."))
    names = [one.farm for one in farms] if len(farms) <= MOST_LINES else []
    lines = "; thin lines are the farms" if names else ""
    pair = (
        ("Accuracy", f"Mean over farms, before they train{lines}.", _accuracy(points, names)),
        ("Compute per image", "Share of the dense backbone's MACs.", charts.macs_chart(points)),
    )
    panels = [
        node("figure", node("h3", title), node("p", words), chart, class_="panel")
        for title, words, chart in pair
    ]
    more = node("a", "All rounds", href="/rounds", class_="more")
    return section("charts", "Round by round", node("div", *panels, class_="pair"), aside=more)


def _accuracy(points: Sequence[RoundPoint], names: Sequence[str]) -> Element:
    return charts.accuracy_chart(points, names)


# --- beside the run ------------------------------------------------------------------------------


def _serving(sources: Sources) -> Element:
    more = node("a", "All versions", href="/versions", class_="more")
    if sources.registry is None or not (rows := sources.registry.channels()):
        words = (
            "No channel names a version yet. Make one with: fieldfed-server registry publish FOLDER"
        )
        return section("serving", "What devices are offered", empty(words), aside=more)
    going = {row.channel: row for row in sources.registry.rollouts() if row.going}
    lines: list[list[Child]] = []
    for row in rows:
        on = going.get(row.name)
        state = pill(f"version {on.version} {on.state}", "warn") if on else row.why
        lines.append([row.name, f"version {row.version}", moment(row.issued), state])
    shown = table(
        "serving",
        "What channels name",
        ("Channel", "Names", "Since", "Why"),
        lines,
        words=(1, 2, 3),
    )
    return section("serving", "What devices are offered", shown, aside=more)


def _latest(sources: Sources) -> Element:
    more = node("a", "All events", href="/events", class_="more")
    return section(
        "latest", "Latest events", event_list(events(sources, most=MOST_EVENTS)), aside=more
    )


def _runs(sources: Sources) -> Element | None:
    rows = sources.facts.last_runs()
    if len(rows) < 2:
        return None
    lines: list[list[Child]] = [
        [
            f"Run {row.run}",
            row.message,
            pill(row.state),
            moment(row.started),
            duration_text(max(0.0, row.finished - row.started)) if row.finished else "-",
        ]
        for row in rows
    ]
    columns = ("Run", "Label", "State", "Began", "Took")
    return section(
        "runs", "Runs", table("runs", "The newest runs", columns, lines, words=(1, 2, 3))
    )


def map_of(sources: Sources, run: RunRow) -> tuple[tuple[headmap.Head, ...], ...]:
    """Every head of the run."""
    facts = sources.facts
    after = {
        number: Mask.from_json(facts.mask(row.mask))
        for number, row in facts.candidates(run.run).items()
    }
    mask = Mask.from_json(facts.mask_now(run))
    return headmap.head_map(mask, facts.head_scores(run.run), after)
