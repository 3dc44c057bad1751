"""Things that are timed take turns, and what slows the machine down slows them alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.latency import LEAST_TURNS, RUNS, WARM_UP_TURNS, Latency, compared


class Machine:
    """A clock that stands still but for work, which takes the longer the slower the machine is."""

    def __init__(self) -> None:
        self.now, self.slowness = 0.0, 1.0
        self.done: list[int] = []

    def clock(self) -> float:
        return self.now

    def work(self, number: int, seconds: float) -> None:
        self.done.append(number)
        self.now += seconds * self.slowness
        self.slowness *= 1.01


def test_they_take_turns_in_changing_order() -> None:
    machine = Machine()
    works = [lambda n=n: machine.work(n, 0.01) for n in range(3)]
    compared(works, 0.0, machine.clock)
    assert len(machine.done) == 3 * (1 + RUNS) * (WARM_UP_TURNS + LEAST_TURNS)
    turns = np.array(machine.done).reshape(-1, 3, 1 + RUNS)
    assert (turns == turns[:, :, :1]).all(), "a turn is of one of them"
    assert (np.sort(turns[:, :, 0]) == [0, 1, 2]).all(), "each has one"
    assert len({tuple(turn) for turn in turns[:, :, 0].tolist()}) > 1


@given(st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_ratios_hold_on_a_machine_that_slows_down(ratio: float) -> None:
    machine = Machine()
    works = [lambda: machine.work(0, 0.01), lambda: machine.work(1, 0.01 * ratio)]
    first, second = compared(works, 3.0, machine.clock)
    assert first.ratio == 1
    assert second.ratio == pytest.approx(ratio, rel=0.12)
    assert first.p50 <= first.p95


def test_measuring_goes_on_until_the_time_is_over() -> None:
    machine = Machine()
    compared([lambda: machine.work(0, 0.001)], 1.0, machine.clock)
    assert 1.0 <= machine.now < 2.0


def test_the_first_run_of_a_turn_does_not_count() -> None:
    machine, calls = Machine(), []

    def cold() -> None:
        calls.append(0)
        machine.now += 9.0 if len(calls) % (1 + RUNS) == 1 else 1.0

    (found,) = compared([cold], 0.0, machine.clock)
    assert found == Latency(1.0, 1.0, 1.0)
