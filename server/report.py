"""The report of a run: one self-contained HTML page.

Style, charts and sample leaves are inside the file; it asks for nothing and runs no script, and
its content security policy says so. Every chart also exists as a table under "All figures".
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from xml.etree.ElementTree import Element

from common.errors import DataError
from common.files import write_atomically
from server import charts
from server.compare import Interval, verdict
from server.cut_chart import cut_panel
from server.markup import document, node, panel, scrolled
from server.report_style import STYLE
from server.story import (
    FarmLine,
    Story,
    count_text,
    duration_text,
    epsilon_text,
    percent,
    size_text,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LEAF = "M21 3C9 3 4 8 4 15c0 1 .2 2 .5 2.9L3 21h2.4l1-1.8C14 20 21 15 21 3zM8 16c2-4 5-6.5 9-8z"


def write_report(story: Story, out: Path, samples: Mapping[str, Sequence[bytes]]) -> None:
    """Write the report to ``out``, atomically.

    Args:
        story: what happened.
        out: the HTML file.
        samples: farm name -> JPEG files as bytes; farms the story does not know are left out.

    Raises:
        DataError: a sample is not a JPEG file; names the farm.
        StateError: the file cannot be written.
    """
    write_atomically(out, document(_page(story, samples)).encode(errors="replace"))


def _page(story: Story, samples: Mapping[str, Sequence[bytes]]) -> Element:
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("title", story.title),
        node("style", STYLE),
    )
    sections = [
        _results(story),
        _removed(story),
        *([_rounds(story), _traffic(story)] if story.rounds else []),
        *_leaves(story, samples),
    ]
    body = node("body", _header(story), node("main", *sections), node("footer", _provenance(story)))
    return node("html", head, body, lang="en")


def _name(line: FarmLine) -> tuple[str, Element | None]:
    """A farm, and its species beside it where that says more."""
    told = line.species not in ("", line.farm)
    return line.farm, node("span", line.species, class_="species") if told else None


def _section(title: str, note: str, *children: Element | None) -> Element:
    return node("section", node("h2", title), node("p", note, class_="note"), *children)


# --- headline ----------------------------------------------------------------------------------


def _header(story: Story) -> Element:
    leaf = node("svg", node("path", d=LEAF), viewBox="0 0 24 24", aria_hidden="true")
    return node(
        "header",
        node("p", leaf, "fieldfed", class_="mark"),
        node("h1", story.title),
        _lead(story),
        _figures(story),
    )


def _lead(story: Story) -> Element:
    farms, rounds = len(story.farms), len(story.played())
    who = f"{farms} farms" if farms > 1 else "One farm"
    kept, heads = story.heads.counts()
    words: list[Element | str] = [
        f"{who} aligned one backbone" + (f" over {rounds} rounds. " if rounds > 1 else ". "),
        node("b", f"{heads - kept} of {heads} attention heads"),
        " were removed and ",
        node("b", percent(story.macs_ratio, 0) + " of the compute"),
        " is left",
    ]
    if story.mean.dense is not None:
        gap = story.mean.pruned - story.mean.dense
        claim = f" ({_claim(story, gap)})" if story.ci95_dense_minus_pruned else ""
        words += ["; mean accuracy changed by ", node("b", _points(gap))]
        words += [f" against the dense backbone{claim}"]
    return node("p", *words, ".", class_="lead")


def _claim(story: Story, gap: float) -> str:
    assert story.ci95_dense_minus_pruned is not None
    low, high = story.ci95_dense_minus_pruned
    return verdict(Interval(-gap, low, high).reversed())


def _points(difference: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    value = round(100 * difference, 1)
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(value):.1f} points"


def _figures(story: Story) -> Element:
    up, down = story.mean_bytes()
    usual = [f"{size_text(size)} in an ordinary one" for size in story.usual_bytes()]
    kept, heads = story.heads.counts()
    dense = percent(story.mean.dense)
    figures = [
        ("Mean accuracy, pruned", percent(story.mean.pruned), f"dense {dense}"),
        ("Compute left", percent(story.macs_ratio), f"{count_text(story.macs)} MACs per image"),
        ("Heads left", f"{kept} of {heads}", percent(story.heads_kept_ratio)),
        ("Parameters left", count_text(story.params), f"{percent(story.params_ratio)} of dense"),
        ("Macro-F1, pruned", percent(story.mean.f1_pruned), "mean over farms"),
        ("Sent per farm and round", size_text(up), usual[0]),
        ("Received per farm and round", size_text(down), usual[1]),
        ("Run time", duration_text(story.seconds), f"{len(story.played())} rounds"),
        *_privacy(story),
    ]
    cells = [
        node(
            "div",
            node("dt", name),
            node("dd", value, class_="big"),
            node("dd", aside, class_="small"),
        )
        for name, value, aside in figures
    ]
    return node("dl", *cells, class_="figures")


def _privacy(story: Story) -> list[tuple[str, str, str]]:
    line = story.privacy
    if line is None:
        return []
    aside = f"farm {line.farm}, the worst; delta {line.delta:g}; accuracies and counts are outside"
    return [("Privacy, epsilon", epsilon_text(line.epsilon), aside)]


# --- results -----------------------------------------------------------------------------------


def _results(story: Story) -> Element:
    lines = (*story.farms, story.mean)
    known = [v for line in lines for k, v in line.accuracies().items() if v and k != "f1_pruned"]
    low, high = min([1.0, *known]), max([0.0, *known])
    columns = ("Farm", "Probe", "Local", "Dense", "Pruned", "Change", "Macro-F1")
    head = node("tr", *(node("th", name, scope="col") for name in columns))
    head[0].set("class", "words")
    head.append(node("th", _scale(low, high), scope="col", class_="scale"))
    rows = [_result(line, low, high) for line in lines]
    rows[-1].set("class", "mean")
    table = scrolled("Accuracy on the test images; change is pruned minus dense.", head, rows)
    return _section("Results", _interval(story), _key(), table)


def _scale(low: float, high: float) -> Element:
    """The ends of the dots' common scale."""
    ends = [node("span", percent(end, 0)) for end in (low, high)]
    return node("span", *ends, class_="gauge ends")


def _result(line: FarmLine, low: float, high: float) -> Element:
    change = "-" if line.dense is None else _points(line.pruned - line.dense).split()[0]
    return node(
        "tr",
        node("th", *_name(line), scope="row", class_="words"),
        *(node("td", percent(value)) for value in (line.probe, line.local, line.dense)),
        node("td", percent(line.pruned), class_="strong"),
        node("td", change),
        node("td", percent(line.f1_pruned)),
        node("td", charts.gauge(line, low, high)),
    )


def _interval(story: Story) -> str:
    if story.ci95_dense_minus_pruned is None or story.mean.dense is None:
        return "Every classifier is refitted to the backbone it is measured on."
    low, high = story.ci95_dense_minus_pruned
    gap = story.mean.pruned - story.mean.dense
    bounds = f"{_points(-high).split()[0]} to {_points(-low)}"
    return (
        f"Pruned minus dense: {_points(gap)}, 95 % interval {bounds} "
        f"(paired bootstrap over the images of every farm): {_claim(story, gap)}."
    )


def _key() -> Element:
    meaning = {
        "probe": "probe: classifier on the untouched backbone",
        "local": "local: the farm alone",
        "dense": "dense: federated",
        "pruned": "pruned: federated, smaller",
    }
    items = []
    for name, words in meaning.items():
        dot = node("circle", cx=13, cy=6, r=5, class_=f"dot-{name}")
        items.append(node("li", node("svg", dot, viewBox="0 0 26 12", aria_hidden="true"), words))
    return node("ul", *items, class_="key")


# --- pictures ----------------------------------------------------------------------------------


def _removed(story: Story) -> Element:
    note = (
        "What every attention head was worth to the farms together, and which were removed. "
        "Point at a cell for its figures."
    )
    heads = panel(
        "Attention heads", "Blocks from the first (top) to the last.", charts.heat_map(story)
    )
    neurons = panel("MLP neurons kept", "Share of each block's neurons.", charts.neuron_bars(story))
    pair = node("div", heads, neurons, class_="pair")
    cuts = node("div", *map(cut_panel, story.cuts), class_="pair cuts") if story.cuts else None
    return _section("What was removed", note, pair, cuts)


def _rounds(story: Story) -> Element:
    note = "Accuracy is what the farms report in every round, before they train."
    accuracy = charts.accuracy_chart(story.rounds, [line.farm for line in story.farms])
    compute = charts.macs_chart(story.rounds)
    pair = node(
        "div",
        panel("Mean accuracy", "Thin lines are the farms.", accuracy),
        panel("Compute per image", "Share of the dense backbone's MACs.", compute),
        class_="pair",
    )
    farms = []
    for line in story.farms:
        known = [p.accuracy[line.farm] for p in story.rounds if line.farm in p.accuracy]
        last = node("span", percent(known[-1] if known else None), class_="last")
        chart = charts.farm_chart(story.rounds, line.farm)
        farms.append(
            node("figure", node("h3", node("span", *_name(line)), last), chart, class_="panel")
        )
    many = node("div", *farms, class_="many")
    return _section("Round by round", note, _chart_key(story), pair, many, _all_figures(story))


def _chart_key(story: Story) -> Element:
    items = [("mean-line", "this farm, or the mean"), ("mean-behind", "mean, behind a farm")]
    if any(point.event for point in story.rounds):
        items.append(("event", "units removed"))
    marks = []
    for kind, words in items:
        line = node("line", x1=1, y1=6, x2=25, y2=6, class_=kind)
        marks.append(node("li", node("svg", line, viewBox="0 0 26 12", aria_hidden="true"), words))
    return node("ul", *marks, class_="key")


def _all_figures(story: Story) -> Element:
    columns = ("Round", "Event", "Compute", "Heads", "Time", "Mean", *(f.farm for f in story.farms))
    head = node("tr", *(node("th", name, scope="col") for name in columns))
    head[1].set("class", "words")
    rows = []
    for point in story.rounds:
        figures = [percent(point.macs_ratio), percent(point.heads_kept_ratio)]
        figures += [duration_text(point.seconds), percent(point.mean_accuracy)]
        figures += [percent(point.accuracy.get(line.farm)) for line in story.farms]
        event = node("td", point.event or "", class_="words")
        number = node("th", str(point.round), scope="row")
        rows.append(node("tr", number, event, *(node("td", figure) for figure in figures)))
    table = scrolled("Every round, with the accuracy of every farm.", head, rows)
    return node("details", node("summary", "All figures, round by round"), table)


def _traffic(story: Story) -> Element:
    note = (
        "What crossed the network. Images, labels and classifiers stay on the farm. "
        "Columns are the mean over farms, whiskers the smallest and the largest."
    )
    sent = charts.traffic_chart(
        "Sent by a farm in a round", [(p.round, p.bytes_up) for p in story.rounds]
    )
    received = charts.traffic_chart(
        "Received by a farm in a round", [(p.round, p.bytes_down) for p in story.rounds]
    )
    up, down = (f"{size_text(size)} per farm and round." for size in story.mean_bytes())
    first = [fmean(p.bytes_down.values()) for p in story.rounds if p.round == 0 and p.bytes_down]
    down += f" Before the first round {size_text(first[0])}." if first else ""
    if link := story.mean_link_bytes():
        up += f" At the socket {size_text(link[0])}, with all that Flower sends around it."
        down += f" At the socket {size_text(link[1])}."
    panels = (panel("Sent", up, sent), panel("Received", down, received))
    pair = node("div", *panels, class_="pair")
    head = node("tr", node("th", "Farm", scope="col"))
    head.extend(node("th", f"Round {point.round}", scope="col") for point in story.rounds)
    head.append(node("th", "In all", scope="col"))
    head.append(node("th", "At the socket, per round", scope="col"))
    rows = [_traffic_row(story, line.farm) for line in story.farms]
    table = scrolled("Bytes of every farm in every round: sent, and received below.", head, rows)
    details = node("details", node("summary", "Bytes by farm and round"), table)
    return _section("Network traffic", note, pair, details)


def _traffic_row(story: Story, farm: str) -> Element:
    cells = [_both(p.bytes_up.get(farm), p.bytes_down.get(farm)) for p in story.rounds]
    cells += [_both(*story.total_bytes(farm)), _both(*story.mean_link_bytes(farm) or (None, None))]
    return node("tr", node("th", farm, scope="row"), *cells)


def _both(up: float | None, down: float | None) -> Element:
    sent, received = ("-" if size is None else size_text(size) for size in (up, down))
    return node("td", sent, node("br"), node("span", received, class_="muted"))


def _leaves(story: Story, samples: Mapping[str, Sequence[bytes]]) -> list[Element]:
    figures = []
    for line in story.farms:
        pictures = [
            _sample(line, number, body) for number, body in enumerate(samples.get(line.farm, ()), 1)
        ]
        if pictures:
            strip = node("div", *pictures, class_="strip")
            figures.append(
                node("figure", node("h3", node("span", *_name(line))), strip, class_="panel")
            )
    if not figures:
        return []
    note = "A few of the leaves every farm learns from, each farm with its own species and classes."
    return [_section("The leaves", note, node("div", *figures, class_="leaves"))]


def _sample(line: FarmLine, number: int, body: bytes) -> Element:
    if not body.startswith(b"\xff\xd8"):
        raise DataError(f"sample {number} of farm {line.farm} is not a JPEG file")
    source = "data:image/jpeg;base64," + b64encode(body).decode()
    return node("img", src=source, alt=f"Leaf {number} of {line.farm} ({line.species})")


def _provenance(story: Story) -> Element:
    facts = story.provenance
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    pairs: list[tuple[str, Element | str]] = [
        ("Command", node("code", facts.command)),
        ("Commit", node("code", facts.commit)),
        ("Seed", str(facts.seed)),
        ("Versions", versions),
    ]
    if facts.settings:
        pairs.insert(3, ("Settings", node("code", json.dumps(facts.settings, sort_keys=True))))
    parts = [part for name, value in pairs for part in (node("dt", name), node("dd", value))]
    note = "How to get the same figures again."
    return _section("Provenance", note, node("dl", *parts, class_="facts"))
