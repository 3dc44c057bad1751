"""Several cuts are tried where farms decide, and the best is made."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

import server.rounds
from common.budget import Budget
from common.messages import TRIAL, AlignRequest, EvaluateRequest, Reply, Request
from common.plan import MOST_TRIED, PlanConfig
from server.cuts import cuts
from server.events import events
from server.facts import sources
from server.plan import CutRule
from server.rows import CandidateRow, ReportRow, TrialRow
from server.status import show, snapshot
from server.store import opened_run
from server.trial import Tried, outcome, trial_label, weighed
from tests.lab.network import Lab
from tests.lab.regions import Regions

RULES: dict[str, Any] = {
    "rounds": 3,
    "prune_events": 1,
    "prune_macs": 0.4,
    "try_splits": (0.3, 1.5),
    "try_compensations": ("bias", "least_squares"),
}
A, B, C = (CutRule(Budget(macs_kept=0.5, heads_per_neurons=one), "bias") for one in (0.3, 0.7, 1))


# --- the choice ----------------------------------------------------------------------------------


def made(*tried: Tried) -> tuple[str, int]:
    """The rule that is made, and how many judged."""
    rows = weighed(2, tried)
    assert [row.rule for row in rows] == [str(one.rule) for one in tried]
    (best,) = (row for row in rows if row.made)
    return best.rule, best.farms


def test_the_best_mean_of_farms_that_judged_all_wins() -> None:
    tried = [
        Tried(A, {"x": 0.9, "y": 0.9}),
        Tried(B, {"x": 0.8, "y": 0.2, "z": 1.0}),
        Tried(C, {"x": 0.95}),
    ]
    assert made(*tried) == (str(C), 1)
    assert made(*tried[:2]) == (str(A), 2)
    assert [row.accuracy for row in weighed(2, tried[:2])] == [0.9, 0.5]


def test_of_equals_the_first_wins_and_without_a_judge_too() -> None:
    assert made(Tried(B, {"x": 0.5}), Tried(A, {"x": 0.5})) == (str(B), 1)
    assert made(Tried(B, {"x": 0.5}), Tried(A, {"y": 0.9})) == (str(B), 0)
    assert made(Tried(B, {})) == (str(B), 0)


def test_an_operator_reads_what_was_tried() -> None:
    rows = weighed(2, [Tried(A, {"x": 0.9, "y": 0.8}), Tried(B, {"x": 1.0, "y": 0.9})])
    told = "2 farms tried 0.3 heads per neurons and bias 85.0 %, 0.7 heads per neurons and bias "
    assert outcome(rows) == told + "95.0 %: 0.7 heads per neurons and bias is made"
    nobody = weighed(2, [Tried(B, {"x": 0.5}), Tried(A, {"y": 0.9})])
    told = "no farm judged all of 2 cuts; the first is made (0.7 heads per neurons and bias)"
    assert outcome(nobody) == told


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="budgets of MACs"):
        PlanConfig(prune_heads=0.4, try_splits=(0.3, 0.7))
    many = tuple(0.1 * (one + 1) for one in range(MOST_TRIED))
    assert PlanConfig(prune_macs=0.4, try_splits=many)
    with pytest.raises(ValidationError, match=f"at most {MOST_TRIED}"):
        PlanConfig(prune_macs=0.4, try_splits=many, try_compensations=("none", "bias"))
    assert PlanConfig(**RULES).uncut().try_splits == ()


# --- a run ---------------------------------------------------------------------------------------


class End:
    """What a run has left."""

    def __init__(self, folder: Path) -> None:
        with opened_run(folder) as (store, run):
            self.state = run.state
            self.candidates: dict[int, CandidateRow] = store.candidates(run.run)
            reports = [row for row in store.reports(run.run) if row.label.startswith(TRIAL)]
        self.trials: dict[str, list[ReportRow]] = {}
        for row in reports:
            self.trials.setdefault(row.label, []).append(row)

    def mean(self, label: str) -> float:
        """Of the farms."""
        rows = self.trials[label]
        return sum(row.accuracy for row in rows) / len(rows)


def digests(end: End) -> list[str]:
    """Of the candidates, round by round."""
    return [row.digest for row in end.candidates.values()]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("trial"), 2, **RULES)
    lab.run()
    yield lab


def test_the_cut_that_farms_find_best_is_made(lab: Lab) -> None:
    end = End(lab.server_dir)
    assert end.state == "done"
    assert len(end.trials) == 4
    assert all({row.farm for row in rows} == {"farm0", "farm1"} for rows in end.trials.values())
    made = end.candidates[1]
    best = max(end.mean(label) for label in end.trials)
    assert end.mean(trial_label(made.digest)) == best


def test_other_drafts_are_gone_and_show_nowhere(lab: Lab) -> None:
    end = End(lab.server_dir)
    left = {path.stem for path in (lab.server_dir / "models").glob("*.safetensors")}
    bases = {row.base for rows in end.trials.values() for row in rows}
    assert len(bases) == 4
    assert left & bases == {end.candidates[1].digest}
    told = snapshot(lab.server_dir)
    assert TRIAL not in str(told), "reports on drafts are no results"


def test_status_events_and_report_say_what_was_tried(lab: Lab) -> None:
    end, told = End(lab.server_dir), snapshot(lab.server_dir)
    assert json.loads(json.dumps(told))["tried"] == told["tried"]
    means = sorted(end.mean(label) for label in end.trials)
    assert sorted(row["accuracy"] for row in told["tried"]) == pytest.approx(means)
    assert [row["event"] for row in told["tried"]] == [1] * 4
    (best,) = (row for row in told["tried"] if row["made"])
    assert best["accuracy"] == pytest.approx(means[-1])
    words = f"{best['rule']} is made"
    console = Console(width=2000, record=True, file=StringIO())
    console.print(show(told))
    assert words in console.export_text()
    with sources(lab.server_dir, 0) as found:
        assert [one.detail for one in events(found, "cut") if words in one.detail]
    with opened_run(lab.server_dir) as (store, run):
        assert all(words in cut.tried for cut in cuts(store, run))


def first(event: int, tried: Sequence[Tried]) -> list[TrialRow]:
    return [replace(row, made=at == 0) for at, row in enumerate(weighed(event, tried))]


def test_no_farm_downloads_the_cut_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first of four is what a farm would be the first to throw away
    monkeypatch.setattr(server.rounds, "weighed", first)
    lab = Lab(tmp_path, 2, **RULES)
    link = lab.run()
    trials = [
        one
        for _, one in link.requests
        if isinstance(one, EvaluateRequest) and one.label.startswith(TRIAL)
    ]
    assert len(trials) == 8
    assert {one.body_kind for one in trials} == {"delta"}
    assert {one.part for one in trials} == {"decide"}
    after = [one for _, one in link.requests if isinstance(one, AlignRequest) and one.round == 2]
    assert [one.body_kind for one in after] == ["none", "none"]
    # and it is known to the farm what was cut: its residual goes on
    state = lab.farms[0][1]
    assert (state / "cuts" / f"{after[0].mask}.json").is_file()
    assert End(lab.server_dir).state == "done"


class Cut(Exception):  # noqa: N818
    """The power goes."""


def test_a_run_that_is_cut_off_while_farms_try_ends_the_same(lab: Lab, tmp_path: Path) -> None:
    other, seen = Lab(tmp_path, 2, **RULES), 0

    def fault(_node: int, request: Request, _reply: Reply) -> None:
        nonlocal seen
        if isinstance(request, EvaluateRequest) and request.label.startswith(TRIAL):
            seen += 1
            if seen == 4:
                raise Cut

    with pytest.raises(Cut):
        other.run(fault=fault)
    other.run()
    digests = [
        [row.digest for row in End(one.server_dir).candidates.values()] for one in (lab, other)
    ]
    assert digests[0] == digests[1]
    assert End(other.server_dir).trials.keys() == End(lab.server_dir).trials.keys()


def test_a_cut_that_removes_nothing_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "server.close.choose_mask", lambda _scores, current, _dense, _budget: current
    )
    lab = Lab(tmp_path, 2, **RULES)
    lab.run()
    end = End(lab.server_dir)
    assert (end.state, end.trials) == ("done", {})


def test_regions_try_cuts_for_their_centre(tmp_path: Path) -> None:
    place = Regions(tmp_path / "all", (2, 2), **RULES | {"try_compensations": ()})
    place.run()
    end = End(place.folder)
    assert end.state == "done"
    assert len(end.trials) == 2
    best = max(end.mean(label) for label in end.trials)
    assert end.mean(trial_label(end.candidates[1].digest)) == best
    for one in place.regions:
        assert digests(End(one.folder)) == digests(end)
        left = {path.stem for path in (one.folder / "models").glob("*.safetensors")}
        assert left & {row.base for rows in end.trials.values() for row in rows} <= set(
            digests(end)
        )
