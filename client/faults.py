"""Programs that keep dying: what their supervisor starts again and again."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from common.processes import LONGEST_DELAY_SECONDS, Child

DEATHS = 8
WITHIN_SECONDS = 600.0
"""So many in so long: a server that is away for a minute, or a power cut, is no reason any more."""
WELL_SECONDS = 2 * LONGEST_DELAY_SECONDS


@dataclass
class _Record:
    pid: int
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS))
    told: bool = False


class Faults:
    """Watches programs, by looking at them every few seconds.

    Args:
        tell: gets the program's name and how often it has died, once until it is well again.
        clock: seconds, of any beginning.
    """

    def __init__(
        self, tell: Callable[[str, int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell, self._clock = tell, clock
        self._records: dict[str, _Record] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Programs that keep dying."""
        return tuple(name for name, record in self._records.items() if record.told)

    def look(self, children: Iterable[Child]) -> None:
        """See which are others than the last time."""
        for child in children:
            if child.pid is not None:
                record = self._records.setdefault(child.name, _Record(child.pid))
                self._see(child.name, child.pid, record)

    def _see(self, name: str, pid: int, record: _Record) -> None:
        now, deaths = self._clock(), record.deaths
        if pid != record.pid:
            record.pid = pid
            deaths.append(now)
        elif deaths and now - deaths[-1] >= WELL_SECONDS:
            deaths.clear()
            record.told = False
        often = len(deaths) == DEATHS and deaths[-1] - deaths[0] < WITHIN_SECONDS
        if often and not record.told:
            record.told = True
            self._tell(name, len(deaths))
