"""Accuracy against compute, a curve per criterion, as an SVG file that any browser shows."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeAlias
from xml.etree.ElementTree import Element, ElementTree

from common.files import write_atomically
from server.markup import node

Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points of MACs (share of the dense backbone) and accuracy, both as ratios."""

WIDTH, HEIGHT = 900.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 500.0, 40.0, 370.0
LEGEND = RIGHT + 52
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008): told apart with every kind of colour vision; then they return, dashed."""
DASHES = (None, "7 3", "2 3")
STEP = 0.05


def draw(path: Path, title: str, curves: Mapping[str, Curve], level: float) -> None:
    """Write the picture.

    Args:
        path: of the SVG file, replaced atomically.
        title: above it.
        curves: by name.
        level: accuracy of the dense backbone, a dashed line.
    """
    points = [point for curve in curves.values() for point in curve]
    low = STEP * int(min(y for _, y in points) / STEP)
    high = STEP * (int(max([level, *(y for _, y in points)]) / STEP) + 1)
    left = 0.1 * int(10 * min(x for x, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (1 - left), (y - low) / (high - low)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    marks = [node("title", title), _text(LEFT, 22, title, "start", 15)]
    for number in range(round((high - low) / STEP) + 1):
        value = low + STEP * number
        _, y = at(left, value)
        marks += [_line((LEFT, y), (RIGHT, y), "#ddd"), _text(LEFT - 8, y + 4, f"{value:.2f}")]
    for number in range(round(10 * (1 - left)) + 1):
        x, _ = at(left + 0.1 * number, low)
        share = f"{100 * left + 10 * number:.0f} %"
        marks.append(_text(x, BOTTOM + 20, share, "middle"))
    marks.append(_text((LEFT + RIGHT) / 2, BOTTOM + 40, "MACs kept", "middle"))
    marks.append(_line(at(left, level), at(1, level), "#333", "6 4"))
    marks.append(_text(RIGHT + 8, at(1, level)[1] + 4, "dense", "start"))
    for number, (name, curve) in enumerate(curves.items()):
        marks += _curve(name, [at(*point) for point in sorted(curve)], number)
    root = node(
        "svg", *marks, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}"
    )
    root.set("font-family", "sans-serif")
    write_atomically(path, _written(root))


def _curve(name: str, places: Sequence[tuple[float, float]], number: int) -> list[Element]:
    colour = COLOURS[number % len(COLOURS)]
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = {"fill": "none", "stroke": colour, "stroke_width": 2.0, "stroke_dasharray": dashes}
    line = node("polyline", points=joined, **style)
    dots = [node("circle", cx=x, cy=y, r=3.5, fill=colour) for x, y in places]
    y = TOP + 40 + 20 * number
    key = [
        _line((LEGEND, y - 4), (LEGEND + 20, y - 4), colour, dashes),
        _text(LEGEND + 26, y, name, "start"),
    ]
    return [line, *dots, *key]


def _line(
    start: tuple[float, float], end: tuple[float, float], colour: str, dashes: str | None = None
) -> Element:
    places = dict(zip(("x1", "y1", "x2", "y2"), (*start, *end), strict=True))
    return node("line", **places, stroke=colour, stroke_width=1.5, stroke_dasharray=dashes)


def _text(x: float, y: float, text: str, anchor: str = "end", size: int = 12) -> Element:
    return node("text", text, x=x, y=y, text_anchor=anchor, font_size=size, fill="#222")


def _written(root: Element) -> bytes:
    out = BytesIO()
    ElementTree(root).write(out, encoding="utf-8", xml_declaration=True)
    return out.getvalue() + b"\n"
