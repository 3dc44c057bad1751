"""Small things that are done again and again, of which none may stop another."""

import logging
import random
import time
from collections.abc import Callable

from common.errors import FieldfedError

log = logging.getLogger(__name__)


class Chore:
    """One of them.

    Args:
        name: of it, for the log.
        seconds: from one time to the next.
        work: returns True when it is to be done again at once.
        jitter: share of the seconds by which they vary.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        work: Callable[[], object],
        jitter: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._seconds, self._work = name, seconds, work
        self._jitter, self._clock = jitter, clock
        self._random = random.Random()  # noqa: S311
        self._due, self._said = float("-inf"), ""

    def do(self) -> None:
        """Do it if it is time; what goes wrong is logged, the same words once."""
        if self._clock() < self._due:
            return
        spread = self._seconds * self._jitter
        due = self._clock() + self._seconds + self._random.uniform(-spread, spread)
        try:
            again = self._work() is True
            self._said = ""
        except (FieldfedError, OSError) as error:
            again = False
            self._say(f"{self._name}: {error}")
        except Exception:
            again = False
            log.exception("%s failed; it is tried again", self._name)
        self._due = self._clock() if again else due

    def _say(self, words: str) -> None:
        if words != self._said:
            log.error("%s; tried again later", words)
        self._said = words
