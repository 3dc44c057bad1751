import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest

from common.errors import DataError, StateError
from server.charts import score_colour
from server.cut_chart import LEFT, RIGHT, cut_panel
from server.report import write_report
from server.story import CutHead, CutPoint, FarmLine, HeadMap, Provenance, RoundPoint, Story

NASTY = '<script>alert("x")</script>&\'"'
JPEG = b"\xff\xd8\xff\xe0 leaf"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects elements and text, and fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, kind: str) -> list[dict[str, str | None]]:
        return [has for _, has in self.elements if kind in (has.get("class") or "").split()]


def story(**changes: Any) -> Story:
    lines = [
        FarmLine(farm="north", species="vine", probe=0.5, dense=0.75, pruned=0.7, f1_pruned=0.6),
        FarmLine(farm=NASTY, species=NASTY, probe=0.6, local=0.7, pruned=0.8, f1_pruned=0.7),
    ]
    points = [
        RoundPoint(
            round=number,
            macs_ratio=macs,
            heads_kept_ratio=macs,
            mean_accuracy=0.7,
            accuracy={"north": 0.65, NASTY: 0.75},
            bytes_up={"north": 71_234, NASTY: 3000},
            bytes_down={"north": 500, NASTY: 700_000},
            seconds=61,
            event=NASTY if macs < 1 else None,
        )
        for number, macs in ((0, 1.0), (1, 1.0), (2, 0.5))
    ]
    values: dict[str, Any] = {
        "title": f"A run {NASTY}",
        "farms": lines,
        "mean": FarmLine(
            farm="mean", species="", probe=0.55, dense=0.75, pruned=0.747, f1_pruned=0.65
        ),
        "ci95_dense_minus_pruned": (-0.01, 0.015),
        "rounds": points,
        "heads": HeadMap(
            scores=((0.1, None, 0.0), (0.5, 0.4, None)),
            kept=((True, False, False), (True, True, True)),
        ),
        "neurons_kept": (0.5, 1.0),
        "heads_kept_ratio": 0.75,
        "macs_ratio": 0.5,
        "params_ratio": 0.6,
        "macs": 788_000_000,
        "params": 13_000_000,
        "seconds": 412.5,
        "provenance": Provenance(command=NASTY, commit=NASTY, versions={NASTY: NASTY}, seed=3),
    }
    return Story(**(values | changes))


def report(
    folder: Path, told: Story, samples: Mapping[str, Sequence[bytes]] | None = None
) -> tuple[str, Reader]:
    out = folder / "report.html"
    write_report(told, out, samples or {})
    text = out.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return text, reader


def test_the_file_needs_nothing_from_outside(tmp_path: Path) -> None:
    text, reader = report(tmp_path, story(), {"north": [JPEG]})
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {
        tag for tag, _ in reader.elements
    }
    for _, has in reader.elements:
        assert not [name for name in has if name.startswith("on") or name == "href"]
        assert (has.get("src") or "data:").startswith("data:")


def test_names_from_outside_are_text_and_never_markup(tmp_path: Path) -> None:
    text, reader = report(tmp_path, story(), {NASTY: [JPEG]})
    assert "<script" not in text
    assert NASTY in reader.text
    alts = [has["alt"] for tag, has in reader.elements if tag == "img"]
    assert alts == [f"Leaf 1 of {NASTY} ({NASTY})"]


def test_the_head_map_marks_what_is_kept_and_gone(tmp_path: Path) -> None:
    text, reader = report(tmp_path, story())
    legend = 3  # kept, removed, not scored
    assert len(reader.having("head")) == 6 + legend
    assert len(reader.having("gone")) == 2 + 1
    assert len(reader.having("unscored")) == 2 + 1
    assert score_colour(1.0) in text
    assert "Block 1, head 1: kept, score 0.1" in reader.text
    assert "Block 1, head 2: removed, not scored" in reader.text
    assert "Block 1, head 3: removed, score 0" in reader.text


def test_prune_events_are_marked_in_every_chart_of_rounds(tmp_path: Path) -> None:
    _, reader = report(tmp_path, story())
    flags = reader.having("flag")
    assert len(flags) == 2 + 2  # accuracy, compute, and one chart for each farm
    assert f"Round 2: {NASTY}" in reader.text


def test_headline_and_tables_show_the_figures(tmp_path: Path) -> None:
    _, reader = report(tmp_path, story())
    words = " ".join(reader.text)
    for figure in ("74.7 %", "4 of 6", "13.0 M", "788 M MACs per image", "6 min 52 s", "71.2 kB"):
        assert figure in words
    assert "95 % interval \u22121.5 to +1.0 points" in words
    assert "at most 0.5 point below" in words
    assert words.count("\u22125.0") == 1  # north, pruned minus dense


def test_bytes_at_the_socket_are_shown_where_they_are_counted(tmp_path: Path) -> None:
    counted = {"link_sent": {"north": 98_765}, "link_received": {"north": 4321}}
    rounds = tuple(point.model_copy(update=counted) for point in story().rounds)
    _, reader = report(tmp_path, story(rounds=rounds))
    words = " ".join(reader.text)
    assert "At the socket 98.8 kB, with all that Flower sends around it." in words
    assert "At the socket 4.32 kB." in words
    _, reader = report(tmp_path, story())
    assert "At the socket 9" not in " ".join(reader.text)


def test_every_picture_has_a_text_alternative(tmp_path: Path) -> None:
    _, reader = report(tmp_path, story(), {"north": [JPEG, JPEG]})
    for tag, has in reader.elements:
        if tag == "svg":
            assert has.get("aria-label") or has.get("aria-hidden") == "true"
        if tag == "img":
            assert has.get("alt")
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("h1") == tags.count("main") == tags.count("title") - text_titles(reader)
    assert dict(reader.elements)["html"] == {"lang": "en"}


def text_titles(reader: Reader) -> int:
    """Titles of charts and marks: all but the document's own."""
    return sum(tag == "title" for tag, _ in reader.elements) - 1


def test_style_serves_phones_dark_rooms_and_paper(tmp_path: Path) -> None:
    text, reader = report(tmp_path, story())
    for query in ("prefers-color-scheme: dark", "max-width: 560px", "@media print"):
        assert query in text
    assert any(has.get("name") == "viewport" for tag, has in reader.elements if tag == "meta")


def test_samples_of_unknown_farms_are_left_out(tmp_path: Path) -> None:
    text, reader = report(tmp_path, story(), {"nobody": [JPEG]})
    assert "The leaves" not in text
    assert "img" not in [tag for tag, _ in reader.elements]


def test_a_sample_that_is_no_jpeg_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 2 of farm north"):
        report(tmp_path, story(), {"north": [JPEG, b"<svg/>"]})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "file").touch()
    with pytest.raises(StateError, match=r"report\.html"):
        write_report(story(), tmp_path / "report.html", {})


def test_the_same_story_gives_the_same_bytes(tmp_path: Path) -> None:
    samples = {"north": [JPEG]}
    assert report(tmp_path, story(), samples)[0] == report(tmp_path, story(), samples)[0]


SPARSE = FarmLine(farm="only", species="only", probe=0.5, pruned=0.5, f1_pruned=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": ()},
        {"rounds": (RoundPoint(round=1, macs_ratio=1, heads_kept_ratio=1),)},
        {"rounds": tuple(RoundPoint(round=n, macs_ratio=1, heads_kept_ratio=1) for n in range(60))},
        {"farms": (SPARSE,), "mean": SPARSE, "ci95_dense_minus_pruned": None},
        {"farms": (SPARSE,), "mean": SPARSE},
        {"heads": HeadMap(scores=((None,), (0.0,)), kept=((True,), (False,)))},
        {"heads": HeadMap(scores=((-0.5,) * 16,) * 2, kept=((True,) * 16,) * 2)},
    ],
)
def test_sparse_and_large_stories_can_be_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    text, _ = report(tmp_path, story(**changes))
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text.lower())


# --- prune events --------------------------------------------------------------------------------


def cut_of(**changes: Any) -> CutPoint:
    rows = (
        CutHead(block=0, head=1, removed=True, together=0.2, farms={"north": 0.1, NASTY: 0.4}),
        CutHead(block=1, head=2, removed=True, together=0.5, farms={"north": 2.5, NASTY: 0.3}),
        CutHead(block=1, head=0, removed=False, together=0.7, farms={"north": 0.6, NASTY: 0.9}),
    )
    values: dict[str, Any] = {"round": 2, "heads": 6, "left": 4, "threshold": 0.6, "rows": rows}
    return CutPoint(**values | changes)


def drawn(cut: CutPoint) -> Element:
    (figure,) = cut_panel(cut).iter("svg")
    return figure


def marks_of(figure: Element, kind: str) -> list[Element]:
    return [one for one in figure.iter() if kind in (one.get("class") or "").split()]


def test_every_prune_event_has_a_picture_with_words(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    tried = "3 farms tried bias 80.0 %, none 70.0 %: bias is made"
    write_report(story(cuts=(cut_of(), cut_of(round=4, undone=True, tried=tried))), out, {})
    page, reader = out.read_text(), Reader()
    reader.feed(page)
    for number in (2, 4):
        assert f"<title>Prune event after round {number}</title>" in page
        assert f"Heads removed after round {number}, and the closest that stayed" in page
    assert page.count("Brought back later, for it cost too much.") == 1
    assert page.count(f"Before it, {tried}.") == 1
    assert len(reader.having("cut-all")) == 2 * (3 + 1)  # a bar for each head, and the key
    assert NASTY not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    for kind in ("cut-farm", "cut-farms", "cut-all", "cut-row", "cut-row.gone"):
        assert re.search(rf"\.{re.escape(kind)} {{[^}}]*var\(--", page) or kind == "cut-row", kind
    for colour in re.findall(r"\.cut-[^}]*}", page):
        assert "#" not in colour, "colours of both schemes come from variables"


def test_dots_bars_and_threshold_lie_where_the_figures_say() -> None:
    figure = drawn(cut_of())
    bars = [one for one in marks_of(figure, "cut-all") if one.find("title") is not None]
    centres = [float(one.get("x", "")) + 2.5 for one in bars]
    assert centres == sorted(centres)
    (line,) = [one for one in marks_of(figure, "event") if float(one.get("y2", "")) > 80][:1]
    threshold = float(line.get("x1", ""))
    assert centres[1] < threshold < centres[2]
    dots = [one for one in marks_of(figure, "cut-farm") if one.find("title") is not None]
    told = {one.find("title").text: float(one.get("cx", "")) for one in dots}  # type: ignore[union-attr]
    assert len(told) == 6
    far = told["north: 2.50 times the mean head"]
    assert far == max(told.values()) == pytest.approx(RIGHT)
    assert told["north: 0.10 times the mean head"] == min(told.values())
    between = (told[f"{NASTY}: 0.40 times the mean head"] - LEFT) / (far - LEFT)
    assert between == pytest.approx((0.4 / 2.5) ** 0.5, abs=1e-4)
    assert len(marks_of(figure, "gone")) == 2
    told_all = figure.find("desc")
    assert told_all is not None
    assert told_all.text == (
        "2 of 6 heads went, 4 stayed. The threshold is 0.60 times the mean head. Removed: "
        "block 1, head 2 0.20; block 2, head 3 0.50"
    )


def test_many_farms_are_a_line_and_not_thousands_of_dots() -> None:
    farms = {f"farm{number}": number / 500 for number in range(1000)}
    rows = tuple(
        CutHead(block=0, head=head, removed=head == 0, together=head + 0.5, farms=farms)
        for head in range(2)
    )
    figure = drawn(cut_of(rows=rows))
    assert len(marks_of(figure, "cut-farms")) == 2
    assert len([one for one in marks_of(figure, "cut-farm") if one.find("title") is not None]) == 0


def test_every_figure_of_a_cut_is_in_its_table() -> None:
    panel = cut_panel(cut_of())
    cells = [[cell.text for cell in row] for row in panel.iter("tr")]
    assert cells[0] == ["Head", None, "All together", NASTY, "north"]
    assert cells[2] == ["Block 2, head 3", "removed", "0.50", "0.30", "2.50"]
    assert cells[3] == ["Block 2, head 1", "kept", "0.70", "0.90", "0.60"]
