"""The head map: every attention head, what it is worth, whether it is kept, and who needed it."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from common.errors import ConfigError
from common.mask import Mask
from common.spec import saved_spec
from server.charts import score_colour, score_share
from server.explain import Case, Hearing, explain
from server.facts import Sources
from server.headmap import Head
from server.markup import Child, label, node, rule
from server.page_overview import map_of
from server.page_shell import empty, heading, pill, section, table, tile
from server.rows import RunRow
from server.story import percent

LEFT, RIGHT, TOP = 42.0, 376.0, 30.0
MOST_WIDE = 78.0
"""Of a cell."""
EQUAL_INK = 0.179
"""Luminance on which black and white are read equally well."""
Blocks = Sequence[Sequence[Head]]


def heads_page(sources: Sources) -> list[Element | None]:
    """The parts of the page."""
    run = sources.facts.newest_run()
    if run is None:
        return [heading("Attention heads"), empty("No run yet.")]
    blocks = map_of(sources, run)
    mask = Mask.from_json(sources.facts.mask_now(run))
    kept, count = sum(map(len, mask.heads)), sum(mask.dense_heads)
    note = f"Run {run.run}. {kept} of {count} heads are kept, and "
    note += (
        f"{percent(mask.neurons_kept_ratio)} of the MLP neurons. Blocks and heads count from 0, "
    )
    note += "as in 'mask explain'."
    return [
        heading("Attention heads", note),
        section("map", "What each head is worth", _map(blocks, mask), note=_how(blocks)),
        _as_table(blocks),
    ]


def _how(blocks: Blocks) -> str:
    if any(head.score is not None for row in blocks for head in row):
        return "Against the mean head of the round in which it was scored last, all farms together."
    return "Farms have not been asked for scores in this run: nothing was to be removed yet."


# --- the picture ---------------------------------------------------------------------------------


def _map(blocks: Blocks, mask: Mask) -> Element:
    known = [head.score for row in blocks for head in row if head.score is not None]
    top = max([0.0, *known])
    most = max(map(len, blocks))
    cell = min((RIGHT - LEFT) / most, MOST_WIDE)
    high = min(max(cell * 0.62, 22.0), 36.0)
    bars = LEFT + most * cell + 22
    marks = [label(LEFT - 8, TOP - 10, "block", "tick", "end")]
    marks += [
        label(LEFT + at * cell + cell / 2 - 1.5, TOP - 10, str(at), "tick", "middle")
        for at in range(most)
    ]
    marks.append(label(bars, TOP - 10, "neurons kept", "tick"))
    for number, row in enumerate(blocks):
        y = TOP + number * high
        marks.append(label(LEFT - 8, y + high / 2 + 3.5, str(number), "tick", "end"))
        marks += [
            _cell(head, top, (LEFT + head.head * cell, y, cell - 3, high - 3)) for head in row
        ]
        share = len(mask.neurons[number]) / mask.dense_neurons[number]
        marks += _neurons(number, share, (bars, y), high)
    bottom = TOP + len(blocks) * high
    marks += _legend(top, bottom + 16) if known else []
    kept = sum(head.kept for row in blocks for head in row)
    drawing = node(
        "svg",
        *marks,
        viewBox=f"0 0 {bars + 122:g} {bottom + (58 if known else 12):g}",
        role="group",
        aria_label=f"Head map: {kept} of {sum(map(len, blocks))} heads kept; a table follows",
        id="head-map",
        class_="chart headmap",
    )
    words = "Point at a head, or move over the map with the arrow keys; Enter tells all of it."
    told = node(
        "div",
        node("h3", "Head", id="told-name"),
        node("p", words, id="told-words"),
        class_="panel told",
        id="told-head",
        aria_live="polite",
    )
    return node("div", node("div", drawing, class_="panel"), told, class_="mapped")


def _cell(head: Head, top: float, box: tuple[float, float, float, float]) -> Element:
    x, y, wide, high = box
    share = score_share(head.score, top)
    fill = None if share is None else score_colour(share)
    name = f"Block {head.block}, head {head.head}"
    kind = "head" + ("" if head.kept else " gone") + (" unscored" if share is None else "")
    marks = [node("rect", x=x, y=y, width=wide, height=high, rx=4, fill=fill, class_=kind)]
    if not head.kept:
        cx, cy, r = x + wide / 2, y + high / 2, min(wide, high) * 0.2
        marks += [
            rule(cx - r, cy - r, cx + r, cy + r, "cross"),
            rule(cx + r, cy - r, cx - r, cy + r, "cross"),
        ]
    elif head.score is not None and wide >= 30:
        ink = _ink(fill or "#ffffff")
        place = (x + wide / 2, y + high / 2 + 4)
        marks.append(label(*place, f"{head.score:.1f}", f"worth {ink}", "middle"))
    return node(
        "a",
        node("title", f"{name}: {head.words}"),
        *marks,
        href=f"/heads/{head.block}/{head.head}",
        id=f"head-{head.block}-{head.head}",
        class_="cell",
        aria_label=f"{name}: {head.words}",
        data_name=name,
        data_words=head.words,
        data_at=f"{head.block} {head.head}",
    )


def _ink(colour: str) -> str:
    """Which ink is easier to read on ``#rrggbb``: WCAG's contrast, at least 4.5 with either."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return "dark" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > EQUAL_INK else "bright"


def _neurons(block: int, share: float, place: tuple[float, float], high: float) -> list[Element]:
    x, y = place
    size = {"y": y + high / 2 - 5, "height": 8, "rx": 2}
    span = 74.0
    words = node("title", f"Block {block}: {percent(share)} of the neurons kept")
    rest = node("rect", x=x, width=span, class_="bar-rest", **size)
    full = node("rect", x=x, width=span * share, class_="bar", **size)
    return [
        node("g", words, rest, full),
        label(x + span + 8, y + high / 2 + 3.5, percent(share, 0), "tick"),
    ]


def _legend(top: float, y: float) -> list[Element]:
    marks = [
        node("rect", x=LEFT + 3 * i, y=y, width=3.4, height=10, fill=score_colour(i / 39))
        for i in range(40)
    ]
    for share, value in ((0.0, "0"), (0.5, f"{top / 4:.1f}"), (1.0, f"{top:.1f}")):
        marks.append(label(LEFT + 120 * share, y + 24, value, "tick", "middle"))
    marks.append(label(LEFT + 134, y + 9, "times the mean head", "tick"))
    x = LEFT + 310
    box = node("rect", x=x, y=y - 3, width=22, height=15, rx=4, class_="head gone unscored")
    cx, cy = x + 11, y + 4.5
    cross = [
        rule(cx - 4, cy - 4, cx + 4, cy + 4, "cross"),
        rule(cx + 4, cy - 4, cx - 4, cy + 4, "cross"),
    ]
    return [*marks, box, *cross, label(x + 30, y + 9, "removed", "tick")]


def _as_table(blocks: Blocks) -> Element:
    columns = ("Head", "Fate", "Worth", "Rank", "Needed by")
    lines: list[list[Child]] = [
        [
            node(
                "a",
                f"block {head.block}, head {head.head}",
                href=f"/heads/{head.block}/{head.head}",
            ),
            pill("kept", "good") if head.kept else pill(_gone(head), "calm"),
            "-" if head.score is None else f"{head.score:.2f}",
            "-" if head.rank is None else f"{head.rank} of {head.heads}",
            head.whose if head.score is not None else "-",
        ]
        for row in blocks
        for head in row
    ]
    shown = table("heads", "Every head", columns, lines, words=(1, 4))
    summary = node("summary", "The same as a table")
    return section("as-table", "Every head", node("details", summary, shown, id="as-table-more"))


def _gone(head: Head) -> str:
    return "removed" if head.gone is None else f"removed after round {head.gone}"


# --- one head ------------------------------------------------------------------------------------


def head_page(sources: Sources, block: int, head: int) -> list[Element | None] | None:
    """The parts of a head's page; None where there is no such head."""
    run = sources.facts.newest_run()
    if run is None:
        return None
    try:
        case = _case(sources, run, block, head)
    except ConfigError:
        return None
    state = pill("kept", "good") if case.kept else pill("removed", "calm")
    cost = f"{percent(case.macs_ratio, 2)} of the dense MACs"
    tiles = [
        tile("Fate", "kept" if case.kept else "removed", case.fate),
        tile("Cost", percent(case.macs_ratio, 2), "of the dense backbone's MACs"),
        tile("Criterion", case.criterion, "how farms score"),
    ]
    back = node("a", "Back to the map", href="/heads", class_="more")
    return [
        heading(f"Block {block}, head {head}", f"Run {run.run}; {cost}.", state),
        section("fate", "What became of it", node("dl", *tiles, class_="tiles"), aside=back),
        *(_hearing(one) for one in reversed(case.hearings)),
        section("heard", "Scores", empty("It was never scored.")) if not case.hearings else None,
    ]


def _case(sources: Sources, run: RunRow, block: int, head: int) -> Case:
    dense = saved_spec(Path(sources.state_dir) / "models" / f"{run.base}.safetensors")
    return explain(sources.facts, run, dense, block, head)


def _hearing(hearing: Hearing) -> Element:
    lines: list[list[Child]] = [
        [
            one.farm or "all together",
            f"{one.score:.2f}",
            f"{one.rank} of {hearing.heads}",
            "-" if one.importance is None else f"{one.importance:.2f}",
            "-" if one.invariance is None else f"{one.invariance:.2f}",
        ]
        for one in hearing.opinions
    ]
    columns = ("Farm", "Score", "Rank", "Importance", "Invariance")
    key = f"round-{hearing.round}"
    shown = table(key, f"Opinions in round {hearing.round}", columns, lines)
    title = f"Round {hearing.round}: {hearing.heads} heads, {hearing.left} after it"
    return section(key, title, shown, note="Score and importance over the mean of all heads.")
