"""A bell that ends the wait of another thread, whatever it waits for."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Bell:
    """Rung by any thread, for one that waits; it stays rung until that one has waited again."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._end: Callable[[], object] | None = None

    @property
    def rung(self) -> bool:
        """Whether the next wait ends at once."""
        return self._event.is_set()

    def ring(self) -> None:
        """End the wait, or the next one."""
        self._event.set()
        if (end := self._end) is not None:
            end()

    def wait(self, seconds: float) -> bool:
        """Wait so long; returns whether it was rung."""
        rung = self._event.wait(seconds)
        self._event.clear()
        return rung

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """Inside, ringing calls this, which ends what the thread waits for."""
        self._end = end
        try:
            if self.rung:
                end()
            yield
        finally:
            self._end = None
