"""A run that looks for the smallest backbone inside a tolerance finds it, whatever it is."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.backbone import dense_spec
from common.config import ServerConfig
from common.errors import ConfigError
from common.messages import AlignReply, EvaluateReply, Reply, Request
from common.plan import PlanConfig, TargetsConfig
from common.settings import validate
from server.rows import VerdictRow
from server.search import STEP_RATIO, Search, planned
from server.status import show, snapshot
from tests.lab.network import Lab

SPEC = dense_spec("vit_tiny_patch16_224", 32, {"depth": 3})


def config(rounds: int = 40, macs_ratio: float = 0.3, events: int = 3) -> PlanConfig:
    targets = TargetsConfig(macs_ratio=macs_ratio, max_drop_ratio=0.01)
    return PlanConfig(rounds=rounds, warmup=1, prune_events=events, targets=targets)


def share_of(plan: Search, number: int) -> float | None:
    budget = plan.event_after(number)
    return None if budget is None else budget.macs_kept


def play(plan: Search, limit: float) -> tuple[float, list[VerdictRow]]:
    """What a run does in which backbones below ``limit`` lose too much; returns what is left."""
    kept, sizes = 1.0, {0: 1.0}
    verdicts: list[VerdictRow] = []
    for number in range(1, plan.rounds + 2):
        event = plan.judged_in(number)
        if event is not None and event not in {row.event for row in verdicts}:
            good = kept >= limit
            verdicts.append(VerdictRow(event, number, good, 0.0, 1, "m"))
            if not good:
                plan.reject(event, number)
                kept = sizes[event - 1]
                sizes[number] = kept
                continue
            plan.accept(event, number)
        share = share_of(plan, number)
        if share is not None and number <= plan.rounds:
            assert plan.scores_in(number), "a cut needs scores"
            assert share < kept, "every cut removes something"
            kept = share
        sizes[number] = kept
    return kept, verdicts


@settings(deadline=None)
@given(st.floats(0.3, 1.0), st.integers(1, 4))
def test_it_ends_within_a_step_of_what_is_possible(limit: float, events: int) -> None:
    plan = Search(config(rounds=200, events=events), SPEC)
    kept, verdicts = play(plan, limit)
    assert kept >= limit
    assert kept - limit <= 2 * STEP_RATIO or kept == pytest.approx(0.3)
    assert len({row.event for row in verdicts}) == len(verdicts), "each cut is judged once"


@settings(deadline=None)
@given(st.floats(0.3, 1.0), st.integers(7, 20), st.integers(1, 3))
def test_what_does_not_fit_is_never_kept_however_few_rounds(
    limit: float, rounds: int, events: int
) -> None:
    kept, _ = play(Search(config(rounds=rounds, events=events), SPEC), limit)
    assert kept >= limit


@settings(deadline=None)
@given(st.floats(0.3, 1.0), st.integers(0, 30))
def test_a_run_that_goes_on_knows_where_it_was(limit: float, cut_at: int) -> None:
    whole = Search(config(), SPEC)
    _, verdicts = play(whole, limit)
    again = planned(config(), SPEC, verdicts[:cut_at])
    other = Search(config(), SPEC)
    for row in verdicts[:cut_at]:
        (other.accept if row.accepted else other.reject)(row.event, row.judged)
    assert again.events == other.events
    complete = planned(config(), SPEC, verdicts)
    assert complete.events == whole.events


def test_the_tolerance_is_for_all_cuts_together() -> None:
    plan = Search(config(rounds=12), SPEC)
    first, second, _ = plan.events
    assert plan.compared_with(second) == plan.compared_with(first) == first


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        ({"prune_macs": 0.4, "targets": {"macs_ratio": 0.5, "max_drop_ratio": 0.1}}, "one of"),
        ({"targets": {"macs_ratio": 1.5, "max_drop_ratio": 0.1}}, "macs_ratio"),
        ({"targets": {"macs_ratio": 0.5}}, "max_drop_ratio"),
    ],
)
def test_impossible_targets_are_refused(plan: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        validate(ServerConfig, {"plan": plan}, "server.toml")


def test_a_run_bisects_and_tells_what_it_saw(tmp_path: Path) -> None:
    """Farms that are worse below 70 % of the MACs: the run ends above, and below the first cut."""
    targets = TargetsConfig(macs_ratio=0.5, max_drop_ratio=0.02)
    lab = Lab(tmp_path, count=1, rounds=8, warmup=1, targets=targets, compensation="none")
    specs: dict[str, float] = {}

    def fault(_node: int, request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, AlignReply | EvaluateReply):
            with lab.store() as store:
                rows = [row for row in store.rounds(1) if row.macs_ratio is not None]
                specs.update(
                    (store.candidates(1)[row.round].digest, row.macs_ratio or 1.0) for row in rows
                )
            good = specs.get(reply.base, 1.0) >= 0.7
            return reply.model_copy(update={"accuracy": 0.9 if good else 0.5})
        return None

    lab.run(fault=fault)
    with lab.store() as store:
        verdicts = store.verdicts(1)
        last = store.last_committed(1)
        assert last is not None
        ratio = [row.macs_ratio for row in store.rounds(1) if row.kind == "align"][-1]
    assert ratio is not None
    assert 0.7 <= ratio < 0.85
    assert {row.accepted for row in verdicts} == {True, False}
    values = snapshot(lab.server_dir)
    seen = [(row["macs_ratio"] >= 0.7, row["accepted"]) for row in values["verdicts"]]
    assert all(good == accepted for good, accepted in seen)
    assert show(values) is not None
