import json
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from server.story import (
    FarmLine,
    HeadMap,
    Provenance,
    RoundPoint,
    Story,
    count_text,
    duration_text,
    percent,
    size_text,
    terminal_table,
)


def told(**changes: Any) -> Story:
    values: dict[str, Any] = {
        "title": "A run",
        "farms": (
            FarmLine(
                farm="north", species="vine", probe=0.5, dense=0.75, pruned=0.7, f1_pruned=0.6
            ),
            FarmLine(farm="[b]south[/b]", species="bean", probe=0.6, pruned=0.8, f1_pruned=0.7),
        ),
        "mean": FarmLine(farm="mean", species="", probe=0.55, pruned=0.75, f1_pruned=0.65),
        "rounds": (
            RoundPoint(round=0, macs_ratio=1, heads_kept_ratio=1, bytes_down={"north": 10_000_000}),
            RoundPoint(
                round=1,
                macs_ratio=0.5,
                heads_kept_ratio=0.75,
                mean_accuracy=0.7,
                accuracy={"north": 0.65, "[b]south[/b]": 0.75},
                bytes_up={"north": 1000, "[b]south[/b]": 3000},
                bytes_down={"north": 500, "[b]south[/b]": 700},
                seconds=61,
                event="one head removed",
            ),
            RoundPoint(
                round=2, macs_ratio=0.5, heads_kept_ratio=0.75, bytes_up={"north": 2000}, seconds=4
            ),
        ),
        "heads": HeadMap(scores=((0.1, None), (0.5, 0.4)), kept=((True, False), (True, True))),
        "neurons_kept": (0.5, 1.0),
        "heads_kept_ratio": 0.75,
        "macs_ratio": 0.5,
        "params_ratio": 0.6,
        "macs": 788_000_000,
        "params": 13_000_000,
        "seconds": 412.5,
        "provenance": Provenance(command="run", commit="abc", versions={"torch": "2"}, seed=3),
    }
    return Story(**(values | changes))


def printed(story: Story, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(terminal_table(story))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_result_has_exactly_this_schema() -> None:
    result = told(ci95_dense_minus_pruned=(-0.01, 0.03)).result()
    assert json.loads(json.dumps(result)) == {
        "farms": {
            "north": {
                "probe": 0.5, "local": None, "dense": 0.75, "pruned": 0.7, "f1_pruned": 0.6
            },
            "[b]south[/b]": {
                "probe": 0.6, "local": None, "dense": None, "pruned": 0.8, "f1_pruned": 0.7
            },
        },
        "mean": {"probe": 0.55, "local": None, "dense": None, "pruned": 0.75, "f1_pruned": 0.65},
        "ci95_dense_minus_pruned": [-0.01, 0.03],
        "heads_kept_ratio": 0.75,
        "macs_ratio": 0.5,
        "params_ratio": 0.6,
        "rounds": 2,
        "seconds": 412.5,
        "bytes_up_per_round": 2000.0,
        "provenance": {"command": "run", "commit": "abc", "versions": {"torch": "2"}, "seed": 3},
    }  # fmt: skip


def test_settings_are_told_where_they_are_not_the_defaults() -> None:
    where = Provenance(command="run", commit="abc", versions={}, seed=3, settings={"plan": {}})
    assert told(provenance=where).result()["provenance"]["settings"] == {"plan": {}}


def test_absent_runs_are_null() -> None:
    result = told(rounds=()).result()
    assert result["ci95_dense_minus_pruned"] is None
    assert result["rounds"] == 0
    assert result["bytes_up_per_round"] == 0.0


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
    st.one_of(st.none(), st.floats(-1e6, 1e6)),
    st.text(max_size=20),
)
def test_json_round_trip(shares: list[float], score: float | None, title: str) -> None:
    heads = HeadMap(scores=((score, 0.25), (0.5, None)), kept=((True, False), (True, True)))
    story = told(neurons_kept=tuple(shares), heads=heads, title=title)
    assert Story.model_validate_json(story.model_dump_json()) == story


def test_bytes_are_averaged_over_the_rounds_in_which_farms_worked() -> None:
    story = told()
    assert story.mean_bytes("north") == (1500.0, 500.0)
    assert story.mean_bytes() == (2000.0, 600.0)
    assert story.mean_bytes("nobody") == (0.0, 0.0)
    assert story.usual_bytes() == (2000.0, 600.0)
    assert told(rounds=()).usual_bytes() == (0, 0)
    large = story.rounds[-1].model_copy(update={"round": 9, "bytes_up": {"north": 10**9}})
    cut = told(rounds=(*story.rounds, large))
    assert cut.usual_bytes()[0] < 10_000 < cut.mean_bytes()[0]
    assert story.total_bytes("north") == (3000, 10_000_500)


def test_bytes_at_the_socket_are_averaged_where_they_are_counted() -> None:
    assert told().mean_link_bytes() is None
    first, second, third = told().rounds
    counted = {"link_sent": {"north": 4000, "south": 0}, "link_received": {"north": 9000}}
    rounds = (first, second.model_copy(update=counted), third)
    story = told(rounds=rounds)
    assert story.mean_link_bytes() == (2000.0, 9000.0)
    assert story.mean_link_bytes("north") == (4000.0, 9000.0)
    assert story.mean_link_bytes("nobody") is None
    before = (first.model_copy(update=counted), second, third)
    assert told(rounds=before).mean_link_bytes() is None, "round 0 is no round of work"


def test_heads_are_counted() -> None:
    assert told().heads.counts() == (3, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"neurons_kept": (0.5,)}, "same number of blocks"),
        ({"farms": ()}, "at least 1"),
        ({"farms": (told().farms[0],) * 2}, "listed once"),
        ({"rounds": told().rounds[::-1]}, "ascending"),
        ({"macs_ratio": 1.2}, "less than or equal to 1"),
        ({"seconds": float("nan")}, "finite|greater"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_what_cannot_be_true_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        told(**changes)


def test_scores_and_mask_name_the_same_heads() -> None:
    with pytest.raises(ValidationError, match="block by block"):
        HeadMap(scores=((0.1, 0.2),), kept=((True,),))


def test_a_story_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        told().title = "another"


def test_the_terminal_shows_everything_without_colour_at_80_columns() -> None:
    text = printed(told(ci95_dense_minus_pruned=(-0.01, 0.03)))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("[b]south[/b]") == 2  # results and traffic: no markup
    for words in ("north", "50.0 %", "70.0 %", "60.0 %", "macro-F1"):
        assert words in text
    assert "dense minus pruned: -1.0 to +3.0 points" in text
    assert "#." in text
    assert "3 of 4" in text
    for words in ("788 M", "13.0 M", "one head removed", "1.50 kB", "1 min 01 s"):
        assert words in text


def test_the_terminal_copes_with_a_run_without_rounds() -> None:
    text = printed(told(rounds=()))
    assert "Rounds" not in text
    assert "paired bootstrap" not in text


def test_the_terminal_writes_plain_letters_where_it_must() -> None:
    class Ascii(StringIO):
        encoding = "ascii"

    console = Console(file=Ascii(), width=80)
    console.print(terminal_table(told()))
    assert isinstance(console.file, Ascii)
    console.file.getvalue().encode("ascii")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.8731), "87.3 %"),
        (percent(None), "-"),
        (percent(1.0, 0), "100 %"),
        (size_text(0), "0 B"),
        (size_text(999), "999 B"),
        (size_text(999.6), "1.00 kB"),
        (size_text(71_400), "71.4 kB"),
        (size_text(12_345_678), "12.3 MB"),
        (size_text(999_999), "1.00 MB"),
        (count_text(5_513_000_000), "5.51 G"),
        (count_text(42), "42"),
        (duration_text(4.25), "4.2 s"),
        (duration_text(59.4), "59 s"),
        (duration_text(75), "1 min 15 s"),
        (duration_text(3661), "1 h 01 min"),
    ],
)
def test_figures_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected
