"""Accuracy against latency as a picture; PIL alone draws it, so that a small device can."""

from collections.abc import Sequence
from io import BytesIO
from math import floor, log10
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from common.files import write_atomically

WIDTH, HEIGHT = 960, 600
LEFT, RIGHT, TOP, BOTTOM = 80, 700, 60, 530
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008): told apart with every kind of colour vision."""
RADIUS, FONT = 8, 16
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Between rules of accuracy; the first that needs six of them at most is taken."""


class Point(NamedTuple):
    """A model: latency in milliseconds, above 0, and accuracy as a ratio."""

    name: str
    latency: float
    accuracy: float


def draw(path: Path, title: str, points: Sequence[Point]) -> None:
    """Write the picture as PNG, atomically; latency is on a scale of powers of two.

    Raises:
        DiskError: it cannot be written.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 20), title, fill="black", font_size=20)
    low, high, step = _range([one.accuracy for one in points])
    doublings = _doublings([one.latency for one in points])

    def x(latency: float) -> float:
        share = (log10(latency / doublings[0])) / log10(doublings[-1] / doublings[0])
        return LEFT + share * (RIGHT - LEFT)

    def y(accuracy: float) -> float:
        return BOTTOM - (accuracy - low) / (high - low) * (BOTTOM - TOP)

    for number in range(round((high - low) / step) + 1):
        value = low + step * number
        pen.line((LEFT, y(value), RIGHT, y(value)), fill="#dddddd")
        pen.text((LEFT - 10, y(value)), f"{value:.2f}", fill="black", font_size=FONT, anchor="rm")
    for value in doublings:
        pen.line((x(value), TOP, x(value), BOTTOM), fill="#eeeeee")
        place = x(value), BOTTOM + 8
        pen.text(place, f"{value:g}", fill="black", font_size=FONT, anchor="ma")
    middle = (LEFT + RIGHT) / 2, BOTTOM + 34
    pen.text(middle, "milliseconds per image", fill="black", font_size=FONT, anchor="ma")
    for number, point in enumerate(points):
        _mark(pen, point, (x(point.latency), y(point.accuracy)), number)
    body = BytesIO()
    image.save(body, "PNG")
    write_atomically(path, body.getvalue())


def _mark(pen: ImageDraw.ImageDraw, point: Point, place: tuple[float, float], number: int) -> None:
    """A dot, and its name in the list beside."""
    colour, (x, y) = COLOURS[number % len(COLOURS)], place
    beside = RIGHT + 30, TOP + 26 * number
    for cx, cy in (place, beside):
        pen.ellipse((cx - RADIUS, cy - RADIUS, cx + RADIUS, cy + RADIUS), fill=colour)
    pen.text((x, y - 12), str(number + 1), fill="black", font_size=FONT, anchor="mb")
    words = f"{number + 1}  {point.name}"
    pen.text((beside[0] + 16, beside[1]), words[:26], fill="black", font_size=FONT, anchor="lm")


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest and highest rule of accuracy, and the step between them."""
    spread = max(values) - min(values)
    step = next((one for one in STEPS if spread <= 5 * one), STEPS[-1])
    low = step * floor(min(values) / step + 1e-9)
    high = step * (floor(max(values) / step - 1e-9) + 1)
    return low, max(high, low + step), step


def _doublings(values: Sequence[float]) -> list[float]:
    """Powers of two around all values, two of them at least."""
    exponents = [log10(value) / log10(2) for value in values]
    first, last = floor(min(exponents)), floor(max(exponents)) + 1
    return [2.0**number for number in range(first, last + 1)]
