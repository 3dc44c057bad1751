"""FarmLink: the only way the server speaks to farms.

Adapters: Flower's Grid (server/app.py) and the in-process lab of the tests.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.messages import Reply, Request


@dataclass(frozen=True)
class Sent:
    """A request on its way."""

    message_id: str
    size_bytes: int


@dataclass(frozen=True)
class Delivery:
    """What came back for a request: a reply, or the reason why there is none.

    ``error`` set and ``malformed`` false means lost in transit (node gone, message expired);
    ``malformed`` means that bytes arrived which are not a valid reply.
    """

    message_id: str
    reply: Reply | None
    size_bytes: int = 0
    error: str | None = None
    malformed: bool = False


class FarmLink(Protocol):
    """Delivery is at most once; the round loop makes its effect exactly once."""

    def online(self) -> Sequence[int]:
        """Node ids that can be reached now, ascending."""
        ...

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        """Send a new message; it expires after ``ttl_seconds``."""
        ...

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        """Whatever has arrived for these messages; does not wait."""
        ...


class Clock(Protocol):
    """Time, so that tests need not wait."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...
