"""The schedule: when a run prunes, and how far."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.backbone import dense_spec
from common.budget import Budget
from common.errors import ConfigError
from common.plan import PlanConfig
from common.spec import ModelSpec
from server.plan import Plan

# heads: the arithmetic of a ViT-S, without building one
HEADS = ModelSpec(
    name="any", image_size=112, heads=(6,) * 12, neurons=(1536,) * 12, head_width=64, width=384
)


@pytest.fixture(scope="module")
def small() -> ModelSpec:
    return dense_spec("vit_tiny_patch16_224", 32, {"depth": 2})


def kept(plan: Plan) -> list[float]:
    budgets = [plan.event_after(number) for number in plan.events]
    shares = [b.macs_kept if b.heads_kept is None else b.heads_kept for b in budgets if b]
    return [share for share in shares if share is not None]


def test_six_rounds_two_events() -> None:
    plan = Plan(PlanConfig(rounds=6, warmup=1, prune_events=2, prune_heads=0.4), HEADS)
    assert plan.rounds == 6
    assert plan.events == (1, 3)
    assert [plan.scores_in(number) for number in range(1, 7)] == [True, False, True] + [False] * 3
    assert kept(plan) == [pytest.approx(0.6 + 0.4 / 8), 0.6]


def test_a_run_that_does_not_prune() -> None:
    plan = Plan(PlanConfig(rounds=3, prune_events=50), HEADS)
    assert plan.events == ()
    assert not any(plan.scores_in(number) or plan.event_after(number) for number in range(5))


def test_a_long_warm_up_scores_in_round_one_too() -> None:
    plan = Plan(PlanConfig(rounds=10, warmup=4, prune_events=1, prune_heads=0.4), HEADS)
    assert plan.events == (4,)
    assert [number for number in range(1, 11) if plan.scores_in(number)] == [1, 4]


def test_no_warm_up_still_needs_a_round_to_score_in() -> None:
    plan = Plan(PlanConfig(rounds=2, warmup=0, prune_events=1, prune_heads=0.4), HEADS)
    assert plan.events == (1,)


@given(st.integers(1, 60), st.integers(0, 10), st.integers(1, 8), st.floats(0.15, 0.8))
def test_every_schedule_recovers_and_ends_at_its_target(
    rounds: int, warmup: int, events: int, removed: float
) -> None:
    config = PlanConfig(rounds=rounds, warmup=warmup, prune_events=events, prune_heads=removed)
    try:
        plan = Plan(config, HEADS)
    except ConfigError as error:
        assume("remove nothing" not in str(error))
        assert rounds < max(warmup, 1) + events
        return
    assert len(plan.events) == events
    assert plan.events[0] == max(warmup, 1)
    gaps = {after - before for before, after in zip(plan.events, plan.events[1:], strict=False)}
    assert len(gaps) <= 1
    assert rounds - plan.events[-1] >= max(gaps, default=1) >= 1
    shares = kept(plan)
    assert shares[-1] == 1 - removed
    assert all(before > after for before, after in zip([1.0, *shares], shares, strict=False))
    cuts = [before - after for before, after in zip([1.0, *shares], shares, strict=False)]
    assert cuts == sorted(cuts, reverse=True)


def test_a_macs_target_carries_the_exchange_rate(small: ModelSpec) -> None:
    config = PlanConfig(rounds=4, prune_events=1, prune_macs=0.3, heads_per_neurons=0.5)
    assert Plan(config, small).event_after(1) == Budget(macs_kept=0.7, heads_per_neurons=0.5)


def test_too_few_rounds_say_how_many_are_needed() -> None:
    config = PlanConfig(rounds=3, warmup=2, prune_events=3, prune_heads=0.4)
    with pytest.raises(ConfigError, match=r"plan\.rounds to at least 5"):
        Plan(config, HEADS)
    enough = PlanConfig(rounds=5, warmup=2, prune_events=3, prune_heads=0.4)
    assert Plan(enough, HEADS).events == (2, 3, 4)


def test_a_target_below_one_head_per_block_is_refused(small: ModelSpec) -> None:
    limit = PlanConfig(rounds=4, prune_events=1, prune_heads=0.833)
    assert Plan(limit, HEADS).events == (1,)
    with pytest.raises(ConfigError, match=r"prune_heads=0\.9.*at most 0\.833"):
        Plan(PlanConfig(rounds=4, prune_events=1, prune_heads=0.9), HEADS)
    with pytest.raises(ConfigError, match=r"prune_macs=0\.99.*at most 0\.\d+"):
        Plan(PlanConfig(rounds=4, prune_events=1, prune_macs=0.99), small)


def test_events_that_would_remove_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="lower the number of events"):
        Plan(PlanConfig(rounds=40, prune_events=20, prune_heads=0.1), HEADS)


def test_each_cut_is_judged_by_the_next_event_and_the_last_one_at_the_end() -> None:
    plan = Plan(PlanConfig(rounds=6, warmup=1, prune_events=2, prune_heads=0.4), HEADS)
    assert [plan.judged_in(number) for number in range(1, 8)] == [
        None,
        None,
        1,
        None,
        None,
        None,
        3,
    ]
    assert Plan(PlanConfig(rounds=6), HEADS).judged_in(7) is None


def test_half_of_an_undone_step_is_tried_a_round_later() -> None:
    plan = Plan(PlanConfig(rounds=8, warmup=1, prune_events=3, prune_heads=0.4), HEADS)
    assert plan.events == (1, 3, 5)
    first, _, last = kept(plan)
    plan.reject(1, 3)
    assert list(plan.events) == [4, 5]
    assert kept(plan) == [pytest.approx((1 + first) / 2), last]
    assert [plan.scores_in(number) for number in (4, 5, 6)] == [True, True, False]
    plan.reject(4, 5)
    assert list(plan.events) == [6]
    assert kept(plan) == [pytest.approx((3 + first) / 4)]
    assert plan.judged_in(9) == 6


def test_without_a_round_of_recovery_left_nothing_is_tried_again() -> None:
    plan = Plan(PlanConfig(rounds=4, warmup=1, prune_events=2, prune_heads=0.4), HEADS)
    assert plan.events == (1, 2)
    plan.reject(2, 5)
    assert list(plan.events) == [1]
    late = Plan(PlanConfig(rounds=3, warmup=1, prune_events=2, prune_heads=0.4), HEADS)
    late.reject(1, 2)
    assert late.events == ()


def test_a_step_too_small_to_halve_is_given_up() -> None:
    plan = Plan(PlanConfig(rounds=9, warmup=1, prune_events=1, prune_heads=1 / 72), HEADS)
    plan.reject(1, 3)
    assert plan.events == ()


def test_a_run_that_ends_early_keeps_what_lies_before() -> None:
    plan = Plan(PlanConfig(rounds=6, warmup=1, prune_events=2, prune_heads=0.4), HEADS)
    plan.end_after(2)
    assert plan.rounds == 2
    assert plan.events == (1,)
    assert plan.judged_in(3) == 1, "the last cut is judged by the evaluation after the last round"
    plan.reject(1, 3)
    assert not plan.events, "nothing is tried again behind the end"


def test_a_block_may_lose_its_attention_only_where_the_settings_say_so() -> None:
    spared = Plan(PlanConfig(rounds=4, prune_heads=0.5), HEADS)
    whole = Plan(PlanConfig(rounds=4, prune_heads=0.5, whole_attention=True), HEADS)
    for plan, least in ((spared, 1), (whole, 0)):
        budgets = [plan.event_after(number) for number in plan.events]
        assert [one.heads_per_block for one in budgets if one is not None] == [least] * 2
    most = 1 - 1 / sum(HEADS.heads)
    Plan(PlanConfig(rounds=4, prune_heads=most, whole_attention=True), HEADS)
    with pytest.raises(ConfigError, match="less than one head"):
        Plan(PlanConfig(rounds=4, prune_heads=most), HEADS)
    with pytest.raises(ConfigError, match="lower it to at most"):
        Plan(PlanConfig(rounds=4, prune_heads=0.9999, whole_attention=True), HEADS)
