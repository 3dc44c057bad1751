"""When a device looks for a new version: told by the hub, or at night on a link that costs."""

import logging
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from client.hub import HubClient
from client.updater import Updater
from common.errors import FieldfedError, LinkError

log = logging.getLogger(__name__)

NIGHT = (22, 5)
RETRY_SECONDS = 600.0
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


class Follower:
    """Keeps a device up to date until the process ends.

    Args:
        updater: does the work.
        hub: a connection.
        hours: local hours in which versions may be fetched; None: always.
        metered: no line is held open; the hub is asked once in every window.
        sleep: waits.
        clock: local time.
        seed: of the jitter that keeps farms from coming all at once.
    """

    def __init__(
        self,
        updater: Updater,
        hub: HubClient,
        *,
        hours: Hours | None,
        metered: bool,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        seed: int | None = None,
    ) -> None:
        self._updater, self._hub = updater, hub
        self._hours = NIGHT if metered and hours is None else hours
        self._metered, self._sleep, self._clock = metered, sleep, clock
        self._random = random.Random(seed)  # noqa: S311

    def run(self) -> None:
        """Look, wait, look again; a hub that is away, or a full disk, is tried again later."""
        while True:
            self._sleep(seconds_until(self._hours, self._clock()))
            self._sleep(self._random.uniform(0, 60))
            try:
                self._updater.check(self._hub)
                self._updater.update(self._hub, compress=self._metered)
            except FieldfedError as error:
                log.error("%s; tried again later", error)
                self._sleep(self._random.uniform(RETRY_SECONDS / 2, RETRY_SECONDS))
                continue
            self._wait()

    def _wait(self) -> None:
        """Until there may be something new."""
        if self._metered and self._hours is not None:
            # to the end of this window; the next one is waited for above
            self._sleep(_seconds_to(self._hours[1], self._clock()))
            return
        try:
            begin = time.monotonic()
            for _ in self._hub.watch(self._updater.channel, self._updater.seen):
                return
            log.info("the hub ended the watch after %.0f s", time.monotonic() - begin)
        except LinkError as error:
            log.info("%s; the channel is asked again", error)
        self._sleep(self._random.uniform(30, 90))
