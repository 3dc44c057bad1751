"""A prune event as inline SVG: heads as rows, what each was worth to every farm as dots.

Worth is over the mean head of that round, on a square-root scale, for scores are skewed. The dashed
line lies between the heads that went and those that stayed: what stayed below it was the last of
its block. Blocks and heads count from 1, as in the report's other pictures.
"""

from math import sqrt
from xml.etree.ElementTree import Element

from server.markup import WIDTH, label, node, panel, picture, rule, scrolled
from server.story import CutHead, CutPoint

LEFT, RIGHT, TOP, HIGH = 146.0, WIDTH - 14.0, 40.0, 19.0
MOST_DOTS = 40
"""Farms that are drawn one by one; of more, from the least to the most as a line."""
TICKS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def head_name(row: CutHead) -> str:
    """As the report counts."""
    return f"Block {row.block + 1}, head {row.head + 1}"


def cut_panel(cut: CutPoint) -> Element:
    """The picture of one event with its heading, and its figures as a table."""
    words = "Each row is a head, every dot a farm. The bar decided: all farms together, by default"
    words += " only as far as the other heads cannot say the same."
    words += f" Before it, {cut.tried}." if cut.tried else ""
    words += " Brought back later, for it cost too much." if cut.undone else ""
    title = f"Heads removed after round {cut.round}, and the closest that stayed"
    farms = sorted({farm for row in cut.rows for farm in row.farms})
    names = ("Head", "", "All together", *farms)
    rows = [
        node(
            "tr",
            node("th", head_name(row), scope="row"),
            node("td", "removed" if row.removed else "kept"),
            node("td", f"{row.together:.2f}", class_="strong"),
            *(node("td", _worth(row.farms.get(farm))) for farm in farms),
        )
        for row in cut.rows
    ]
    head = node("tr", *(node("th", name, scope="col") for name in names))
    table = scrolled("What each head was worth, over the mean head.", head, rows)
    figure = panel(title, words, cut_chart(cut))
    figure.append(node("details", node("summary", "All figures of this cut"), table))
    return figure


def _worth(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def cut_chart(cut: CutPoint) -> Element:
    """The picture of one event."""
    values = [value for row in cut.rows for value in (row.together, *row.farms.values())]
    top = max(1.0, cut.threshold, *values)
    bottom = TOP + HIGH * len(cut.rows)
    marks = _scale(top, bottom)
    for at, row in enumerate(cut.rows):
        marks.append(_row(row, TOP + HIGH * at, top))
    line, words = _x(cut.threshold, top), f"Threshold: {cut.threshold:.2f} times the mean head"
    marks.append(node("g", node("title", words), rule(line, TOP - 8, line, bottom, "event")))
    marks += _key(bottom + 34)
    return picture(bottom + 52, f"Prune event after round {cut.round}", _told(cut), marks)


def _told(cut: CutPoint) -> str:
    gone = [row for row in cut.rows if row.removed]
    words = f"{cut.heads - cut.left} of {cut.heads} heads went, {cut.left} stayed. "
    words += f"The threshold is {cut.threshold:.2f} times the mean head. Removed: "
    return words + "; ".join(f"{head_name(row).lower()} {row.together:.2f}" for row in gone)


def _x(value: float, top: float) -> float:
    return LEFT + (RIGHT - LEFT) * sqrt(max(value, 0.0) / top)


def _scale(top: float, bottom: float) -> list[Element]:
    marks = [label(RIGHT, TOP - 28, "times the mean head", "tick", "end")]
    last = -1e9
    for value in TICKS:
        place = _x(value, top)
        if value > top or place - last < 30:
            continue
        marks.append(rule(place, TOP - 4, place, bottom, "rule"))
        marks.append(label(place, TOP - 10, f"{value:g}", "tick", "middle"))
        last = place
    return marks


def _row(row: CutHead, y: float, top: float) -> Element:
    middle, fate = y + HIGH / 2, "removed" if row.removed else "kept"
    kind = "cut-row gone" if row.removed else "cut-row"
    words = f"{head_name(row)}: {fate}, all farms together {row.together:.2f} times the mean head"
    back = {"x": 0, "y": y + 1, "width": WIDTH, "height": HIGH - 2, "rx": 3}
    marks = [
        node("title", words),
        node("rect", class_=kind, **back),
        label(LEFT - 10, middle + 4.5, head_name(row), "tick", "end"),
    ]
    marks += [_cross(8, middle)] if row.removed else []
    marks += _farms(row, middle, top)
    place = _x(row.together, top)
    all_ = {"x": place - 2.5, "y": middle - 7, "width": 5, "height": 14, "rx": 1}
    marks.append(node("rect", node("title", words), class_="cut-all", **all_))
    return node("g", *marks)


def _farms(row: CutHead, y: float, top: float) -> list[Element]:
    if not row.farms:
        return []
    low, high = (_x(pick(row.farms.values()), top) for pick in (min, max))
    marks = [rule(low, y, high, y, "cut-farms")]
    if len(row.farms) > MOST_DOTS:
        return marks
    for farm, value in sorted(row.farms.items()):
        words = node("title", f"{farm}: {value:.2f} times the mean head")
        marks.append(node("circle", words, cx=_x(value, top), cy=y, r=4, class_="cut-farm"))
    return marks


def _cross(x: float, y: float) -> Element:
    return node("path", d=f"M{x - 4:g} {y - 4:g}l8 8m0 -8l-8 8", class_="cross")


def _key(y: float) -> list[Element]:
    """What the marks mean, in their own row below the picture."""
    bar = {"x": 120.0, "y": y - 11, "width": 5, "height": 14, "rx": 1}
    return [
        node("circle", cx=10, cy=y - 4, r=4, class_="cut-farm"),
        label(20, y, "a farm", "tick"),
        node("rect", class_="cut-all", **bar),
        label(132, y, "all together", "tick"),
        rule(252, y - 12, 252, y + 3, "event"),
        label(260, y, "threshold", "tick"),
        _cross(370, y - 4),
        label(382, y, "removed", "tick"),
    ]
