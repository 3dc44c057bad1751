"""Charts of a run as inline SVG, drawn from a story; nothing is loaded from anywhere.

Colours of the interface are CSS variables (light and dark); scores use viridis, which reads the
same with every kind of colour vision. Every chart carries a title and a description, every mark a
tooltip.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from statistics import fmean
from typing import NamedTuple
from xml.etree.ElementTree import Element

from server.markup import WIDTH, label, node, picture, rule
from server.story import FarmLine, RoundPoint, Story, percent, size_text

VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)


def score_colour(share: float) -> str:
    """Viridis at a share between 0 and 1, as ``#rrggbb``."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    mixed = (
        round(a + (b - a) * (place - low))
        for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


# --- axes --------------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Where rounds and values lie on a chart."""

    first: int
    last: int
    low: float
    high: float
    left: float = 52.0
    right: float = 456.0
    top: float = 22.0
    bottom: float = 214.0

    def x(self, number: int) -> float:
        """Horizontal place of a round."""
        span = max(self.last - self.first, 1)
        return self.left + (self.right - self.left) * (number - self.first) / span

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        span = max(self.high - self.low, 1e-9)
        return self.bottom - (self.bottom - self.top) * (value - self.low) / span

    def grid(
        self, values: Sequence[float], written: Sequence[str], reach: float = 0.0
    ) -> list[Element]:
        """Rules with what they stand for, and the number of every few rounds.

        The rules reach beyond the first and last round by ``reach``.
        """
        left, right = self.left - reach, self.right + reach
        marks = [rule(left, self.y(v), right, self.y(v), "rule") for v in values]
        marks += [
            label(left - 8, self.y(value) + 4.5, text, "tick", "end")
            for value, text in zip(values, written, strict=True)
        ]
        step = max(1, -(-(self.last - self.first) // 10))
        for number in range(self.first, self.last + 1, step):
            marks.append(label(self.x(number), self.bottom + 20, str(number), "tick", "middle"))
        return [*marks, label(right, self.bottom + 38, "round", "tick", "end")]

    def events(self, rounds: Sequence[RoundPoint]) -> list[Element]:
        """A dashed rule at every prune event."""
        marks = []
        for point in rounds:
            if point.event:
                place = self.x(point.round)
                line = rule(place, self.top - 6, place, self.bottom, "event")
                flag = node("path", d=f"M{place:g} {self.top - 8:g}l-5 -8h10z", class_="flag")
                words = node("title", f"Round {point.round}: {point.event}")
                marks.append(node("g", words, line, flag))
        return marks


def _axes(rounds: Sequence[RoundPoint], low: float, high: float) -> Axes:
    return Axes(rounds[0].round, rounds[-1].round, low, high)


def accuracy_range(rounds: Sequence[RoundPoint]) -> tuple[float, float, float]:
    """Lowest and highest rule of the accuracy charts, and the step between rules."""
    values = [value for point in rounds for value in point.accuracy.values()]
    values += [p.mean_accuracy for p in rounds if p.mean_accuracy is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    step = 0.05 if high - low <= 0.25 else 0.1 if high - low <= 0.5 else 0.2
    bottom, top = floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step
    return min(bottom, 1 - step), max(top, bottom + step), step


def _track(axes: Axes, values: Mapping[int, float], kind: str) -> Element:
    points = " ".join(f"{axes.x(at):.1f},{axes.y(value):.1f}" for at, value in values.items())
    return node("polyline", points=points, class_=kind)


def _dots(axes: Axes, values: Mapping[int, float], name: str, kind: str) -> list[Element]:
    return [
        node(
            "circle",
            node("title", f"{name}, round {at}: {percent(value)}"),
            cx=axes.x(at),
            cy=axes.y(value),
            r=3.5,
            class_=kind,
        )
        for at, value in values.items()
    ]


def _of_farm(rounds: Sequence[RoundPoint], farm: str) -> dict[int, float]:
    return {point.round: point.accuracy[farm] for point in rounds if farm in point.accuracy}


def _of_mean(rounds: Sequence[RoundPoint]) -> dict[int, float]:
    return {p.round: p.mean_accuracy for p in rounds if p.mean_accuracy is not None}


def _rules(low: float, high: float, step: float) -> list[float]:
    return [low + step * number for number in range(round((high - low) / step) + 1)]


# --- charts ------------------------------------------------------------------------------------


def accuracy_chart(
    rounds: Sequence[RoundPoint], farms: Sequence[str], whose: str = "Mean over farms"
) -> Element:
    """Mean accuracy per round, over the farms' own lines; ``whose`` names what is the mean."""
    low, high, step = accuracy_range(rounds)
    axes, rules = _axes(rounds, low, high), _rules(low, high, step)
    mean = _of_mean(rounds)
    marks = axes.grid(rules, [percent(value, 0) for value in rules]) + axes.events(rounds)
    for farm in farms:
        track = _track(axes, _of_farm(rounds, farm), "farm-line")
        track.append(node("title", farm))
        marks.append(track)
    marks += [_track(axes, mean, "mean-line"), *_dots(axes, mean, whose, "mean-dot")]
    if mean:
        at, value = next(reversed(mean.items()))
        marks.append(label(axes.x(at), axes.y(value) - 12, percent(value), "value", "end"))
    told = ", ".join(f"round {at} {percent(value)}" for at, value in mean.items())
    return picture(262, "Accuracy per round", f"{whose}: {told or 'not measured'}", marks)


def farm_chart(rounds: Sequence[RoundPoint], farm: str) -> Element:
    """One farm's accuracy per round, with the mean behind it."""
    low, high, _ = accuracy_range(rounds)
    axes = _axes(rounds, low, high)._replace(top=24, bottom=206, left=84, right=464)
    values = _of_farm(rounds, farm)
    marks = [rule(axes.left, axes.y(v), axes.right, axes.y(v), "rule") for v in (low, high)]
    marks += [
        label(axes.left - 12, axes.y(value) + 9, percent(value, 0), "big-tick", "end")
        for value in (low, high)
    ]
    marks += axes.events(rounds)
    marks += [_track(axes, _of_mean(rounds), "mean-behind")]
    marks += [_track(axes, values, "mean-line"), *_dots(axes, values, farm, "mean-dot")]
    told = ", ".join(f"round {at} {percent(value)}" for at, value in values.items())
    return picture(222, f"Accuracy of {farm}", told or "not measured", marks)


def macs_chart(rounds: Sequence[RoundPoint]) -> Element:
    """Compute per image after every round, as steps."""
    axes = _axes(rounds, 0.0, 1.0)
    rules = [0.0, 0.25, 0.5, 0.75, 1.0]
    marks = axes.grid(rules, [percent(value, 0) for value in rules]) + axes.events(rounds)
    places = [(axes.x(p.round), axes.y(p.macs_ratio)) for p in rounds]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    area = f"{path}V{axes.bottom:g}H{places[0][0]:.1f}Z"
    marks += [node("path", d=area, class_="area"), node("path", d=path, class_="step")]
    for point, (x, y) in zip(rounds, places, strict=True):
        words = f"Round {point.round}: {percent(point.macs_ratio)} of the dense MACs"
        marks.append(node("circle", node("title", words), cx=x, cy=y, r=3.5, class_="step-dot"))
    x, y = places[-1]
    ending = f"{percent(rounds[-1].macs_ratio, 0)}"
    marks.append(label(x, y - 12, ending, "value", "end"))
    told = ", ".join(f"round {p.round} {percent(p.macs_ratio)}" for p in rounds)
    return picture(262, "Compute per round, share of dense MACs", told, marks)


def heat_map(story: Story) -> Element:
    """Blocks by heads: the score as colour; removed heads are pale and crossed out."""
    known = [score for row in story.heads.scores for score in row if score is not None]
    top, most = max([0.0, *known]), max(map(len, story.heads.scores))
    high = _row_height(story)
    cell = min((WIDTH - 60) / most, 66.0)
    marks: list[Element] = []
    for block, (scores, kept) in enumerate(zip(story.heads.scores, story.heads.kept, strict=True)):
        y = 24 + block * high
        marks.append(label(44, y + high / 2 + 4, str(block + 1), "tick", "end"))
        for head, (score, stays) in enumerate(zip(scores, kept, strict=True)):
            words = f"Block {block + 1}, head {head + 1}: {'kept' if stays else 'removed'}, "
            words += "not scored" if score is None else f"score {score:.3g}"
            box = (52 + head * cell, y, cell - 3, high - 3)
            marks.append(_cell(box, words, score_share(score, top), stays))
    heads = [
        label(52 + h * cell + cell / 2 - 1.5, 16, str(h + 1), "tick", "middle") for h in range(most)
    ]
    bottom = 24 + len(story.heads.kept) * high
    kept_count, count = story.heads.counts()
    told = f"{kept_count} of {count} heads kept. " + "; ".join(
        f"block {number}: {sum(row)} of {len(row)}"
        for number, row in enumerate(story.heads.kept, 1)
    )
    unscored = len(known) < count
    legend = _legend(top, bottom + 14, unscored) if known else []
    return picture(
        bottom + 62,
        "Attention heads by block",
        told,
        [*heads, label(44, 16, "block", "tick", "end"), *marks, *legend],
    )


def _row_height(story: Story) -> float:
    return min(max(300 / len(story.heads.kept), 15.0), 34.0)


def score_share(score: float | None, top: float) -> float | None:
    """Scores are skewed: the square root spreads the many small ones."""
    return None if score is None else (max(score, 0.0) / top) ** 0.5 if top > 0 else 0.0


def _cell(
    box: tuple[float, float, float, float], words: str, share: float | None, kept: bool
) -> Element:
    x, y, w, h = box
    fill = None if share is None else score_colour(share)
    kind = ("head" if kept else "head gone") + (" unscored" if share is None else "")
    marks = [node("rect", x=x, y=y, width=w, height=h, rx=3, fill=fill, class_=kind)]
    if kept and share is None:
        marks.append(label(x + w / 2, y + h / 2 + 5, "?", "tick", "middle"))
    if not kept:
        cx, cy, r = x + w / 2, y + h / 2, min(w, h) * 0.24
        strokes = ((cx - r, cy - r, cx + r, cy + r), (cx + r, cy - r, cx - r, cy + r))
        marks += [rule(*ends, "cross") for ends in strokes]
    return node("g", node("title", words), *marks)


def _legend(top: float, y: float, unscored: bool) -> list[Element]:
    marks = [
        node("rect", x=52 + 3 * i, y=y, width=3.4, height=12, fill=score_colour(i / 39))
        for i in range(40)
    ]
    for share, value in ((0.0, "0"), (0.5, f"{top / 4:.2g}"), (1.0, f"{top:.2g}")):
        marks.append(label(52 + 120 * share, y + 27, value, "tick", "middle"))
    marks.append(label(52 + 60, y + 43, "score", "tick", "middle"))
    keys: list[tuple[str, float | None, bool]] = [("kept", 0.6, True), ("removed", 0.6, False)]
    keys += [("not scored", None, True)] if unscored else []
    for x, (words, at, kept) in zip((200, 272, 370), keys, strict=False):
        marks.append(_cell((x, y - 1, 24, 16), words, at, kept))
        marks.append(label(x + 30, y + 12, words, "tick"))
    return marks


def neuron_bars(story: Story) -> Element:
    """Share of MLP neurons kept, block by block, on the rows of the heat map."""
    high, left, span = _row_height(story), 52.0, WIDTH - 112.0
    marks = [label(44, 16, "block", "tick", "end")]
    for block, share in enumerate(story.neurons_kept):
        y = 24 + block * high
        words = f"Block {block + 1}: {percent(share)} of the neurons kept"
        marks.append(label(44, y + high / 2 + 4, str(block + 1), "tick", "end"))
        size = {"y": y, "height": high - 3, "rx": 3}
        rest = node("rect", x=left, width=span, class_="bar-rest", **size)
        bar = node("rect", x=left, width=span * share, class_="bar", **size)
        marks.append(node("g", node("title", words), rest, bar))
        marks.append(label(left + span + 8, y + high / 2 + 4, percent(share, 0), "tick"))
    told = "; ".join(f"block {n}: {percent(s, 0)}" for n, s in enumerate(story.neurons_kept, 1))
    bottom = 24 + len(story.neurons_kept) * high
    marks += [
        label(left + span * part, bottom + 16, percent(part, 0), "tick", "middle")
        for part in (0.0, 0.5, 1.0)
    ]
    return picture(bottom + 62, "MLP neurons kept by block", told, marks)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** floor(log10(least))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least * (1 - 1e-9))


def traffic_chart(title: str, sizes: Sequence[tuple[int, Mapping[str, int]]]) -> Element:
    """Bytes per farm in every round: the mean as a column, smallest to largest as a whisker.

    ``sizes`` holds (round, bytes by farm); the scale is the chart's own.
    """
    means = [(at, fmean(by.values()) if by else 0.0, by) for at, by in sizes]
    top = max([1.0, *(float(size) for _, by in sizes for size in by.values())])
    # room for half a column on both sides
    axes = Axes(sizes[0][0], sizes[-1][0], 0.0, top, left=102.0, right=438.0)
    step = _round_step(top / 4)
    rules = [step * number for number in range(-int(-top // step) + 1)]
    axes = axes._replace(high=rules[-1])
    wide = min(36.0, 0.62 * (axes.right - axes.left) / max(len(sizes) - 1, 1))
    marks = axes.grid(
        rules, ["0", *(size_text(size).replace(".0 ", " ") for size in rules[1:])], reach=26.0
    )
    for at, mean, by in means:
        x, y = axes.x(at), axes.y(mean)
        words = node("title", f"Round {at}: {size_text(mean)} per farm")
        column = {"x": x - wide / 2, "y": y, "width": wide, "height": axes.bottom - y}
        parts = [words, node("rect", rx=2, class_="bar", **column)]
        if by and min(by.values()) < max(by.values()):
            parts.append(rule(x, axes.y(min(by.values())), x, axes.y(max(by.values())), "whisker"))
        marks.append(node("g", *parts))
    told = "; ".join(f"round {at} {size_text(mean)}" for at, mean, _ in means)
    return picture(262, title, f"Mean per farm: {told}", marks)


def gauge(line: FarmLine, low: float, high: float) -> Element:
    """One row's accuracies as dots on a common scale: probe, local, dense, pruned."""
    figures = {"probe": line.probe, "local": line.local, "dense": line.dense, "pruned": line.pruned}
    known = {name: value for name, value in figures.items() if value is not None}

    def x(value: float) -> float:
        return 8 + 144 * (value - low) / max(high - low, 1e-9)

    marks = [
        rule(8, 12, 152, 12, "rule"),
        rule(x(min(known.values())), 12, x(max(known.values())), 12, "span"),
    ]
    for name, value in known.items():
        words = node("title", f"{name}: {percent(value)}")
        marks.append(node("circle", words, cx=x(value), cy=12, r=5, class_=f"dot-{name}"))
    told = ", ".join(f"{name} {percent(value)}" for name, value in known.items())
    return node("svg", *marks, viewBox="0 0 160 24", role="img", aria_label=told, class_="gauge")
