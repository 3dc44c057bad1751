"""How long what devices told is kept: ages, and shorter ones when the file becomes too long.

    telemetry   all of it for two days, one an hour for fourteen
    results     400 days, so that a season can be compared with the one before
    events      400 days

Of a device no more than ``MOST_ROWS`` stay. When the file is fuller than it may be, ages of
telemetry are halved with every pass over the devices until it fits, and after some passes those of
results and events as well. They grow again when it is half empty.
"""

import logging
import time
from collections import deque

from server.arrivals import STEP_ROWS, Ages, Arrivals

log = logging.getLogger(__name__)

DAY = 86_400.0
AGES = Ages(raw=2 * DAY, telemetry=14 * DAY, results=400 * DAY, events=400 * DAY)
MOST_BYTES = 2_000_000_000
SPARE = 1.25
"""Times that the file may become at most, while what is old is on its way out."""
PASS_SECONDS = 3600.0
STEP_SECONDS = 0.2
TELEMETRY_FIRST = 6
"""Times that ages of telemetry are halved before those of results and events are."""
_MOST_HALVED = 40


def shortened(ages: Ages, halved: int) -> Ages:
    """Ages after they were halved so often."""
    half, later = 0.5**halved, 0.5 ** max(0, halved - TELEMETRY_FIRST)
    return Ages(
        raw=ages.raw * half,
        telemetry=ages.telemetry * half,
        results=ages.results * later,
        events=ages.events * later,
    )


class Retention:
    """Goes over the devices now and then, a few at a time, so that the bridge never waits long.

    Args:
        store: a connection of the calling thread's own.
        most_bytes: of the file.
    """

    def __init__(self, store: Arrivals, most_bytes: int = MOST_BYTES) -> None:
        self._store, self._most = store, most_bytes
        self._left: deque[int] = deque()
        self._halved, self._next, self._gone = 0, 0.0, 0

    def step(self, now: float) -> None:
        """Work for a moment, if there is anything to do; raises StateError as ``Database`` does.

        Args:
            now: unix seconds.
        """
        if not self._left and not self._begin():
            return
        until = time.monotonic() + STEP_SECONDS
        ages = shortened(AGES, self._halved)
        while self._left and time.monotonic() < until:
            gone = self._store.thin(self._left[0], ages, now)
            self._gone += gone
            if gone < STEP_ROWS:
                self._left.popleft()
        if not self._left:
            self._store.forget(now - AGES.results)
            log.debug("%d rows are gone, %d bytes left", self._gone, self._store.used_bytes)

    def _begin(self) -> bool:
        """Begin a pass, when it is time or the file is too long; returns whether one was."""
        used, now = self._store.used_bytes, time.monotonic()
        if used > self._most:
            if not self._halved:
                log.warning("what devices told takes %d bytes: it is kept less long", used)
            self._halved = min(self._halved + 1, _MOST_HALVED)
        elif now < self._next:
            return False
        elif self._halved and used < self._most / 2:
            self._halved -= 1
        self._next, self._gone = now + PASS_SECONDS, 0
        self._left.extend(self._store.numbers())
        return bool(self._left)
