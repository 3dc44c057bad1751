"""When a farm on a metered link is awake."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from client.relay import Relay
from client.shifts import JITTER, JITTER_SECONDS, Shifts, Signs, keep_shifts, noticed, notify
from common.config import FarmSection
from common.processes import Child, Supervisor
from tests.waiting import wait_until

HOUR = 3600.0


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def asleep_after(shifts: Shifts, clock: Clock, work: Callable[[], bool], step: float = 10) -> float:
    """Seconds until it sleeps."""
    started = clock.now
    while shifts.look(False, work):
        clock.now += step
        assert clock.now - started < 100 * HOUR, "it never sleeps"
    return clock.now - started


def test_it_is_awake_at_first_and_sleeps_when_there_was_no_work() -> None:
    clock = Clock()
    shifts = Shifts(6 * HOUR, 600, clock, max)
    assert shifts.awake
    assert asleep_after(shifts, clock, lambda: False) == 600


def test_it_never_sleeps_while_there_is_work_and_waits_for_more_afterwards() -> None:
    clock = Clock()
    shifts = Shifts(6 * HOUR, 600, clock, max)
    busy_until = clock.now + 5 * HOUR
    assert asleep_after(shifts, clock, lambda: clock.now < busy_until) == 5 * HOUR + 590


def test_it_wakes_by_schedule_within_the_jitter() -> None:
    clock = Clock()
    for draw, expected in ((min, 6 * HOUR - JITTER_SECONDS), (max, 6 * HOUR + JITTER_SECONDS)):
        shifts = Shifts(6 * HOUR, 600, clock, draw)
        asleep_after(shifts, clock, lambda: False)
        slept = clock.now
        clock.now = slept + expected - 1
        assert not shifts.look(False, lambda: True), "nobody works while it sleeps"
        assert shifts.left() == pytest.approx(1)
        clock.now = slept + expected
        assert shifts.look(False, lambda: False)
        assert asleep_after(shifts, clock, lambda: False) == 600


def test_farms_that_began_together_do_not_wake_together() -> None:
    clock = Clock()
    farms = [Shifts(HOUR, 600, clock) for _ in range(50)]
    clock.now += 600
    assert not any(farm.look(False, lambda: False) for farm in farms)
    sleeps = sorted(farm.left() for farm in farms)
    assert HOUR * (1 - JITTER) <= sleeps[0] <= sleeps[-1] <= HOUR * (1 + JITTER)
    assert sleeps[-1] - sleeps[0] > HOUR * JITTER


def test_a_notice_wakes_it_at_once_and_counts_like_work() -> None:
    clock = Clock()
    shifts = Shifts(6 * HOUR, 600, clock)
    asleep_after(shifts, clock, lambda: False)
    assert shifts.look(True, lambda: False)
    clock.now += 599
    assert shifts.look(True, lambda: False)
    assert asleep_after(shifts, clock, lambda: False) == 600


def test_a_notice_is_heard_once(tmp_path: Path) -> None:
    assert not noticed(tmp_path)
    notify(tmp_path / "state")
    notify(tmp_path / "state")
    assert noticed(tmp_path / "state")
    assert not noticed(tmp_path / "state")


def test_a_notice_that_cannot_be_taken_away_does_not_keep_it_awake(tmp_path: Path) -> None:
    (tmp_path / "wake").mkdir()
    assert not noticed(tmp_path)


# --- with processes ------------------------------------------------------------------------------

# A parent that starts a child, which ends at once and stays a zombie, and one more for as long as
# it is told: what Flower's SuperNode and our executor do.
PARENT = """
import subprocess, sys, time
depth, work = int(sys.argv[1]), sys.argv[2] == "work"
if depth:
    script = open(sys.argv[3]).read()
    subprocess.Popen([sys.executable, "-c", script, str(depth - 1), *sys.argv[2:]])
elif work:
    subprocess.Popen(["sleep", "60"])
else:
    child = subprocess.Popen(["true"])  # held: an object that goes would wait for its process
time.sleep(60)
"""


@dataclass
class Stand:
    """A stand-in for a farm's programs, with the real supervisor and relay."""

    folder: Path
    supervisor: Supervisor
    relay: Relay

    def program(self, name: str, depth: int, work: bool) -> Child:
        script = self.folder / "parent.py"
        script.write_text(PARENT)
        arguments = [str(depth), "work" if work else "idle", str(script)]
        command = [sys.executable, "-c", PARENT, *arguments]
        return Child(name, lambda: command, self.folder / f"{name}.log")


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    relay = Relay("127.0.0.1:9", tmp_path)
    with relay, Supervisor(watch_seconds=0.1, first_delay_seconds=0.1) as supervisor:
        yield Stand(tmp_path, supervisor, relay)


def families(*children: Child) -> int:
    return sum(len(child.observe()) for child in children)


@pytest.mark.parametrize(("executor_works", "supernode_works"), [(True, False), (False, True)])
def test_a_request_that_is_worked_on_is_seen_wherever_it_is(
    stand: Stand, executor_works: bool, supernode_works: bool
) -> None:
    executor = stand.program("executor", 0, executor_works)
    supernode = stand.program("supernode", 1, supernode_works)
    signs = Signs(stand.relay, executor, supernode)
    assert not signs(), "nothing is started yet"
    for child in (executor, supernode):
        stand.supervisor.start(child)
    wait_until(lambda: families(executor, supernode) == 4, 60, "two parents, a starter, a worker")
    assert len(signs.workers()) == 1
    assert signs()
    signs.workers()[0].kill()
    # the idle one's child, which ends at once, may begin only now
    wait_until(lambda: not signs(), 10, "the end of the work")


def test_what_waits_for_work_is_no_work(stand: Stand) -> None:
    executor, supernode = stand.program("executor", 0, False), stand.program("supernode", 1, False)
    for child in (executor, supernode):
        stand.supervisor.start(child)
    wait_until(lambda: families(executor, supernode) == 3, 60, "two parents and a starter")
    wait_until(lambda: _zombies(executor), 60, "a child that ended and stays")
    assert not Signs(stand.relay, executor, supernode)()


def _zombies(child: Child) -> list[psutil.Process]:
    found = psutil.Process(child.pid).children()
    return [process for process in found if process.status() == psutil.STATUS_ZOMBIE]


def test_it_sleeps_wakes_by_notice_and_sleeps_again(stand: Stand) -> None:
    supernode = stand.program("supernode", 1, False)
    farm = FarmSection.model_validate({"name": "oak", "data": "x", "link": "metered"})
    farm = farm.model_copy(update={"awake_minutes": 2 / 60})  # too short for a real one
    end = threading.Event()
    at_work = threading.Event()
    at_work.set()
    thread = threading.Thread(
        target=keep_shifts,
        args=(farm, stand.folder, stand.supervisor, supernode),
        kwargs={"signs": at_work.is_set, "wait": lambda seconds: end.wait(seconds / 4)},
    )
    notify(stand.folder)
    thread.start()
    try:
        wait_until(lambda: families(supernode) == 2, 60, "both processes")
        time.sleep(3)
        assert families(supernode) == 2, "asleep in the middle of its work"
        first = supernode.pid
        at_work.clear()
        wait_until(lambda: families(supernode) == 0, 60, "sleep")
        time.sleep(1)
        assert families(supernode) == 0, "what sleeps was started again"
        notify(stand.folder)
        wait_until(lambda: families(supernode) == 2, 60, "waking")
        assert supernode.pid != first
        assert not (stand.folder / "wake").exists()
        wait_until(lambda: families(supernode) == 0, 60, "sleep again")
    finally:
        end.set()
        thread.join()


def test_awake_it_is_kept_alive(stand: Stand) -> None:
    supernode = stand.program("supernode", 0, False)
    stand.supervisor.start(supernode)
    stand.supervisor.stop(supernode)
    stand.supervisor.start(supernode)
    first = supernode.pid
    assert first is not None
    psutil.Process(first).kill()
    wait_until(lambda: supernode.pid != first, 60, "another start")


def test_the_command_leaves_a_notice(tmp_path: Path) -> None:
    from tests.system.site import call

    (tmp_path / "farm.toml").write_text('[farm]\nname = "oak"\ndata = "x"\nlink = "metered"\n')
    assert "oak wakes" in call("fieldfed-client", "wake", str(tmp_path))
    assert noticed(tmp_path / "state")
    assert "init" in call("fieldfed-client", "wake", str(tmp_path / "nowhere"), code=2)
    assert not (tmp_path / "nowhere").exists()


def test_a_link_is_always_on_unless_told() -> None:
    farm = FarmSection.model_validate({"name": "oak", "data": "x"})
    assert (farm.link, farm.wake_hours, farm.awake_minutes) == ("always", 6.0, 10.0)


def test_launching_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import client.launch, client.shifts"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_a_farm_is_awake_long_enough_to_ask_for_work() -> None:
    values = {"name": "oak", "data": "x", "link": "metered", "awake_minutes": 0.5}
    with pytest.raises(ValidationError, match=r"awake_minutes = 0\.5 is too short"):
        FarmSection.model_validate(values)
    assert FarmSection.model_validate(values | {"poll_seconds": 15}).seconds_between_polls == 15
    always = FarmSection.model_validate({"name": "oak", "data": "x"})
    assert always.seconds_between_polls is None
