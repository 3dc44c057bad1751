"""Step budgets: slow farms get the steps that fit, the others all of theirs."""

from hypothesis import given
from hypothesis import strategies as st

from server.pace import SLACK, step_budgets
from server.rows import ReplyRow


def row(node: int, steps: int, train_seconds: float, overhead: float = 1.0) -> ReplyRow:
    return ReplyRow(
        node=node,
        farm=f"f{node}",
        attempt=1,
        examples=10,
        accuracy=0.5,
        f1=0.5,
        loss=1,
        dal=0,
        seconds=overhead + train_seconds,
        size_bytes=1,
        path="",
        start=0,
        length=1,
        digest="",
        received=0,
        round=1,
        of_round=1,
        steps=steps,
        train_seconds=train_seconds,
    )


def test_a_slow_farm_gets_the_steps_that_fit() -> None:
    rows = [row(1, 10, 10.0), row(2, 10, 10.0), row(3, 10, 50.0)]
    # 11 s is the median; (1.25 * 11 - 1) / 5 = 2.55 steps fit
    assert step_budgets(rows, {1: 10, 2: 10, 3: 10}) == {3: 2}


def test_a_budgeted_farm_is_judged_by_all_of_its_steps() -> None:
    rows = [row(1, 10, 10.0), row(2, 10, 10.0), row(3, 2, 10.0)]
    assert step_budgets(rows, {1: 10, 2: 10, 3: 10}) == {3: 2}


def test_equal_farms_and_unknown_ones_are_not_limited() -> None:
    assert step_budgets([row(1, 10, 10.0), row(2, 10, 12.0)], {1: 10, 2: 10}) == {}
    assert step_budgets([], {1: 10}) == {}
    assert step_budgets([row(1, 10, 10.0)], {1: 10, 2: 10}) == {}


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=12), st.integers(1, 200))
def test_nobody_is_late_who_can_help_it(paces: list[float], full: int) -> None:
    rows = [row(node, full, pace * full) for node, pace in enumerate(paces)]
    budgets = step_budgets(rows, dict.fromkeys(range(len(paces)), full))
    times = sorted(1.0 + pace * full for pace in paces)
    middle = len(times) // 2
    target = SLACK * (times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2)
    for node, pace in enumerate(paces):
        steps = budgets.get(node, full)
        assert 1 <= steps <= full
        assert steps == 1 or 1.0 + steps * pace <= target * (1 + 1e-9)
