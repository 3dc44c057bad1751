"""The accuracy guard: a cut that costs too much is undone, and its mask is not tried again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.messages import AlignReply, EvaluateReply, Reply, Request
from server.guard import judge
from server.rows import CandidateRow, VerdictRow
from server.status import show, snapshot
from tests.lab.network import Lab

# events after rounds 1 and 3: round 3 judges the first, an evaluation at the end the second
PLAN: dict[str, Any] = {
    "rounds": 5,
    "warmup": 1,
    "prune_events": 2,
    "prune_heads": 0.4,
    "max_drop_ratio": 0.05,
}


def verdicts(lab: Lab) -> list[VerdictRow]:
    with lab.store() as store:
        return store.verdicts(1)


def candidates(lab: Lab) -> dict[int, CandidateRow]:
    with lab.store() as store:
        return store.candidates(1)


def says(accuracy: dict[int, float], last: float = 0.9) -> Any:
    """Farms that report these accuracies by round, and ``last`` when they are asked at the end."""

    def fault(_node: int, _request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, AlignReply):
            return reply.model_copy(update={"accuracy": accuracy.get(reply.round, 0.9)})
        if isinstance(reply, EvaluateReply) and reply.label == "guard":
            return reply.model_copy(update={"accuracy": last})
        return None

    return fault


@pytest.mark.parametrize(
    ("before", "after", "drop", "accepted"),
    [
        ([0.9, 0.8], [0.9, 0.8], 0.0, True),
        ([0.9, 0.8], [0.85, 0.75], 0.05, True),
        ([0.9, 0.8], [0.84, 0.74], 0.06, False),
        ([0.5, 0.8], [0.9, 0.6], -0.1, True),
    ],
)
def test_the_drop_is_a_paired_mean(
    before: Sequence[float], after: Sequence[float], drop: float, accepted: bool
) -> None:
    older = {f"farm{index}": value for index, value in enumerate(before)} | {"gone": 1.0}
    newer = {f"farm{index}": value for index, value in enumerate(after)} | {"new": 0.0}
    verdict = judge(1, 3, "m" * 64, older, newer, 0.05 + 1e-9)
    assert verdict.drop_ratio == pytest.approx(drop)
    assert (verdict.accepted, verdict.farms) == (accepted, 2)


def test_nothing_in_common_speaks_against_nothing() -> None:
    assert judge(1, 3, "m" * 64, {"oak": 0.9}, {"vine": 0.1}, 0.05).accepted


def test_harmless_cuts_are_accepted(tmp_path: Path) -> None:
    lab = Lab(tmp_path, **PLAN)
    lab.run(fault=says({}))
    assert [(row.event, row.judged, row.accepted) for row in verdicts(lab)] == [
        (1, 3, True),
        (3, 6, True),
    ]
    assert candidates(lab)[5].mask == candidates(lab)[3].mask != candidates(lab)[1].mask


def test_a_harmful_cut_is_undone_and_half_of_it_is_tried(tmp_path: Path) -> None:
    lab = Lab(tmp_path, **PLAN)
    lab.run(fault=says({3: 0.7}))
    first, second = verdicts(lab)
    assert (first.event, first.judged, first.accepted) == (1, 3, False)
    assert first.drop_ratio == pytest.approx(0.2)
    rows = candidates(lab)
    with lab.store() as store:
        start = store.run(1)
    assert (rows[3].digest, rows[3].mask) == (start.base, start.mask)
    assert (second.event, second.accepted) == (4, True)
    with lab.store() as store:
        kept = {row.round: row.heads_kept_ratio for row in store.rounds(1) if row.kind == "align"}
    assert kept[1] is not None
    assert kept[4] is not None
    assert kept[1] < kept[4] < 1
    assert rows[5].mask != rows[1].mask
    text = snapshot(lab.server_dir)["verdicts"]
    assert [row["accepted"] for row in text] == [False, True]
    show(snapshot(lab.server_dir))


def test_the_last_candidate_is_judged_before_the_run_ends(tmp_path: Path) -> None:
    lab = Lab(tmp_path, **PLAN)
    lab.run(fault=says({}, last=0.5))
    assert [row.accepted for row in verdicts(lab)] == [True, False]
    rows = candidates(lab)
    assert rows[6].digest == rows[2].digest, "the backbone of before the cut is not restored"
    with lab.store() as store:
        reported = {row.base for row in store.reports(1, "model")}
    assert reported == {rows[2].digest}


@pytest.mark.parametrize("number", [3, 4])
def test_a_run_that_was_cut_off_goes_on_with_the_same_verdicts(number: int, tmp_path: Path) -> None:
    whole, cut = Lab(tmp_path / "whole", **PLAN), Lab(tmp_path / "cut", **PLAN)
    whole.run(fault=says({3: 0.7}))
    honest = says({3: 0.7})

    def power_cut(node: int, request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, AlignReply) and reply.round == number:
            raise KeyboardInterrupt
        changed: Reply | None = honest(node, request, reply)
        return changed

    with pytest.raises(KeyboardInterrupt):
        cut.run(fault=power_cut)
    cut.run(fault=honest)
    assert verdicts(cut) == verdicts(whole)
    assert [row.digest for row in candidates(cut).values()] == [
        row.digest for row in candidates(whole).values()
    ]
