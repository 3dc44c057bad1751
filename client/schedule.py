"""When a device looks for a new version: told by the hub, or at night on a link that costs.

A notice makes it look sooner, within its hours; an order to install makes it look now. Neither is
believed: looking is asking the hub, and checking what it has signed.
"""

import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Protocol

from client.bell import Bell
from common.errors import FieldfedError

log = logging.getLogger(__name__)

NIGHT = (22, 5)
RETRY_SECONDS = 60.0, 120.0, 240.0, 600.0
"""Most that it waits after so many looks in vain: a hub that restarts is found soon."""
JITTER_SECONDS = 60.0
"""Devices that are told together do not come together."""
MOST_ORDERS = 16
Hours = tuple[int, int]


def seconds_until(hours: Hours | None, now: datetime) -> float:
    """How long it is until a window of local hours opens; 0 inside it, or without one.

    Args:
        hours: (from, to) of a day, over midnight where ``from`` is the later.
        now: local time.
    """
    if hours is None:
        return 0.0
    begin, end = hours
    inside = begin <= now.hour < end if begin < end else now.hour >= begin or now.hour < end
    if inside:
        return 0.0
    return _seconds_to(begin, now)


def _seconds_to(hour: int, now: datetime) -> float:
    """How long it is until it is that hour again."""
    then = now.replace(hour=hour, minute=0, second=0, microsecond=0)
    if then <= now:
        then += timedelta(days=1)
    return (then - now).total_seconds()


class Channel(Protocol):
    """What a follower looks at (client/lookout.py)."""

    def look(self, version: int | None = None) -> None:
        """Ask the hub, and do what follows; raises FieldfedError when that has to be done again.

        ``version``: that was ordered; another one is not installed.
        """

    def watch(self, bell: Bell) -> bool:
        """Wait for news, or for the bell; returns whether there are any. Raises FieldfedError."""


class Follower:
    """Keeps a device up to date until it is stopped.

    Args:
        channel: that it follows.
        hours: local hours in which versions may be fetched; None: always.
        metered: no line is held open; the hub is asked once in every window.
        bell: ends waits; another in tests.
        clock: local time.
        seed: of the jitter that keeps farms from coming all at once.
        jitter_seconds: most that it waits before each look; unset: a minute.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        hours: Hours | None,
        metered: bool,
        bell: Bell | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        seed: int | None = None,
        jitter_seconds: float | None = None,
    ) -> None:
        self._channel, self._bell = channel, bell or Bell()
        self._hours = NIGHT if metered and hours is None else hours
        self._metered, self._clock = metered, clock
        self._jitter = JITTER_SECONDS if jitter_seconds is None else jitter_seconds
        self._random = random.Random(seed)  # noqa: S311
        self._orders: deque[int] = deque(maxlen=MOST_ORDERS)
        self._noticed = self._heeds = self._ended = False
        self._said, self._in_vain = "", 0

    # --- from other threads ------------------------------------------------------------------

    def notice(self) -> None:
        """There may be something new."""
        self._noticed = True
        if self._heeds:
            self._bell.ring()

    def install(self, version: int) -> None:
        """Look now, whatever the hour, and install this version if the channel names it."""
        if version not in self._orders:
            self._orders.append(version)
        self._bell.ring()

    def stop(self) -> None:
        """End :meth:`run` soon."""
        self._ended = True
        self._bell.ring()

    # --- in its own thread -------------------------------------------------------------------

    def run(self) -> None:
        """Look, wait, look again; a hub that is away, or a full disk, is tried again later."""
        while not self._ended:
            try:
                self._turn()
            except Exception:
                log.exception("the updater failed; it is tried again later")
                self._bell.wait(RETRY_SECONDS[-1])

    def _turn(self) -> None:
        """One look, with the waits around it; cut short by an order or the end."""
        if self._orders:
            self._look(self._orders.popleft())
            return
        while (left := seconds_until(self._hours, self._clock())) > 0:
            if self._cut(left):
                return
        if self._cut(self._random.uniform(0, self._jitter)):
            return
        self._noticed = False
        if self._look():
            self._in_vain = 0
            self._wait()
            return
        most = RETRY_SECONDS[min(self._in_vain, len(RETRY_SECONDS) - 1)]
        self._in_vain += 1
        with self._heeding():
            self._bell.wait(self._random.uniform(most / 2, most))

    def _look(self, version: int | None = None) -> bool:
        try:
            self._channel.look(version)
        except FieldfedError as error:
            self._say(error)
            return False
        self._said = ""
        return True

    def _wait(self) -> None:
        """Until there may be something new."""
        with self._heeding():
            if self._metered and self._hours is not None:
                # to the end of this window; the next one is waited for above
                self._bell.wait(_seconds_to(self._hours[1], self._clock()))
                return
            begin = time.monotonic()
            try:
                if self._channel.watch(self._bell):
                    return
                log.info("the hub ended the watch after %.0f s", time.monotonic() - begin)
            except FieldfedError as error:
                log.info("%s; the channel is asked again", error)
            self._bell.wait(self._random.uniform(30, 90))

    def _cut(self, seconds: float) -> bool:
        """Wait; returns whether there is something to be done before."""
        self._bell.wait(seconds)
        return self._ended or bool(self._orders)

    @contextlib.contextmanager
    def _heeding(self) -> Iterator[None]:
        """Inside, a notice ends the wait."""
        self._heeds = True
        if self._noticed or self._orders or self._ended:
            self._bell.ring()
        try:
            yield
        finally:
            self._heeds = False

    def _say(self, error: FieldfedError) -> None:
        """Log why there was no look; the same words once."""
        level = logging.DEBUG if str(error) == self._said else logging.ERROR
        log.log(level, "%s; tried again later", error)
        self._said = str(error)
