"""When a farm on a metered link is awake, that is: connected.

An idle SuperNode asks for work every 3 s, some 25 MB a day, which is more than a season of updates.
So on a metered link it runs only while the farm is awake. It wakes by schedule, and by notice: the
file ``STATE/wake``, which the command ``fieldfed-client wake`` makes. It goes to sleep when there
was no work for a while.

Two signs tell of work, each where the other is blind: a process that answers a request (it may
train for an hour and send nothing), and the body of a message on the link (Flower fetches a
request before that process starts, and sends its reply after it has ended). Polls are neither. A
small request that is fetched in the very second in which the farm falls asleep is lost, as it may
be on any link; the server asks again.
"""

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from client.relay import Relay
from common.config import FarmSection
from common.files import write_atomically
from common.processes import Child, Supervisor

log = logging.getLogger(__name__)

NOTICE = "wake"
LOOK_SECONDS = 1.0
JITTER = 0.1
JITTER_SECONDS = 900.0
"""Farms that were started together do not come together: sleep varies by a tenth, this at most."""
STOP_SECONDS = 15.0
"""For the SuperNode to sign off, which takes two requests."""

_random = secrets.SystemRandom()


def notify(state_dir: Path) -> None:
    """Wake the farm whose state this is: it looks every second, or when it is started.

    Raises:
        DiskError: the folder cannot be written.
    """
    write_atomically(state_dir / NOTICE, b"")


def noticed(state_dir: Path) -> bool:
    """Whether somebody has asked to wake; forgets it."""
    try:
        (state_dir / NOTICE).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:  # a notice that stays would keep it awake for ever
        log.error("the notice to wake cannot be taken away, so it is not heeded: %s", error)
        return False
    return True


class Shifts:
    """Decides when to be awake; begins awake.

    Args:
        wake_seconds: of sleep, give or take ``JITTER``.
        awake_seconds: without work, after which it sleeps.
        clock: seconds, of any beginning.
        draw: a number between two others.
    """

    def __init__(
        self,
        wake_seconds: float,
        awake_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = _random.uniform,
    ) -> None:
        self._wake, self._idle = wake_seconds, awake_seconds
        self._clock, self._draw = clock, draw
        self.awake = True
        self._until = clock() + awake_seconds

    def look(self, notice: bool, work: Callable[[], bool]) -> bool:
        """Whether to be awake now; ``work`` is asked for only while it is."""
        now = self._clock()
        if not self.awake:
            if notice or now >= self._until:
                self.awake, self._until = True, now + self._idle
        elif notice or work():
            self._until = now + self._idle
        elif now >= self._until:
            jitter = min(JITTER_SECONDS, JITTER * self._wake)
            self.awake = False
            self._until = now + self._wake + self._draw(-jitter, jitter)
        return self.awake

    def left(self) -> float:
        """Seconds until it sleeps, or wakes, if nothing happens."""
        return self._until - self._clock()


class Signs:
    """Whether a farm has work."""

    def __init__(self, relay: Relay, executor: Child, supernode: Child) -> None:
        self._relay, self._executor, self._supernode = relay, executor, supernode
        self._looked = time.monotonic()

    def __call__(self) -> bool:
        """Whether a request is being worked on, or a message passed since the last look."""
        since, self._looked = self._looked, time.monotonic()
        return self._relay.body_since(since) or bool(self.workers())

    def workers(self) -> list[psutil.Process]:
        """Processes that answer requests.

        They are what the executor has forked, and what the SuperNode's own child, which starts a
        program for each request, has started. The latter is there before the executor forks, and
        does the work where the executor does not answer.
        """
        return [*_children(self._executor.pid)] + [
            worker
            for starter in _children(self._supernode.pid)
            for worker in _children(starter.pid)
        ]


def _children(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    try:
        return [child for child in psutil.Process(pid).children() if _lives(child)]
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    """Whether it has not ended: Flower leaves its children behind as zombies for a while."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def keep_shifts(
    farm: FarmSection,
    state_dir: Path,
    supervisor: Supervisor,
    supernode: Child,
    signs: Signs,
    wait: Callable[[float], bool],
    tell: Callable[[bool], None] = lambda _awake: None,
) -> None:
    """Run the SuperNode while the farm is awake, until ``wait`` says that this is over.

    Args:
        farm: how long to sleep and to be awake.
        state_dir: where the notice to wake appears.
        supervisor: that keeps the SuperNode running while the farm is awake.
        supernode: not started yet.
        signs: of work.
        wait: so many seconds; returns whether to end.
        tell: hears when the farm has woken, or has fallen asleep.
    """
    noticed(state_dir)  # left from before: it is awake anyway
    shifts = Shifts(farm.wake_hours * 3600, farm.awake_minutes * 60)
    supervisor.start(supernode)
    running = True
    while not wait(LOOK_SECONDS):
        awake = shifts.look(noticed(state_dir), signs)
        if awake and not running:
            log.info("%s wakes", farm.name)
            supervisor.start(supernode)
        elif running and not awake:
            supervisor.stop(supernode, STOP_SECONDS)
            log.info("%s sleeps for %.1f h, or until it is woken", farm.name, shifts.left() / 3600)
        if awake != running:
            tell(awake)
        running = awake
