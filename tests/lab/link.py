"""The lab: farms in this process behind FarmLink, running the product's own farm and round code.

Every message crosses as text and arrays, as it would on the wire, so nothing can be passed that
a real link would refuse. Faults are injected by a function that sees each reply.
"""

import random
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import cast

from client.bodies import with_body
from client.farm import Farm
from common.config import FarmConfig
from common.errors import LinkError
from common.messages import Array, HelloRequest, Refusal, Reply, Request, from_parts, to_parts
from server.link import Delivery, Sent

Parts = tuple[str, dict[str, Array]]
Fault = Callable[[int, Request, Reply], Reply | str | None]


class LabClock:
    """A clock that does not wait."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Simulated seconds."""
        return self.time

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self.time += seconds


class LabLink:
    """Farms by node id (1, 2, ...), answering when polled, in a shuffled order.

    Args:
        farms: configuration and state folder of each farm.
        order: seed of the order in which replies arrive.
        fault: may replace a reply, lose it (a text) or leave it (None).
        pool: processes that farms work in; without one they work in this process.
    """

    def __init__(
        self,
        farms: Sequence[tuple[FarmConfig, Path]],
        order: int = 0,
        fault: Fault | None = None,
        pool: ProcessPoolExecutor | None = None,
    ) -> None:
        self._farms = dict(enumerate(farms, start=1))
        self._random = random.Random(order)
        self._fault, self._pool = fault, pool
        self._waiting: dict[str, tuple[int, Request, Future[Parts] | None]] = {}
        self._count = 0
        self.requests: list[tuple[int, Request]] = []

    def online(self) -> Sequence[int]:
        """All farms, always."""
        return list(self._farms)

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        """Queue a request."""
        self._count += 1
        message_id = f"m{self._count}"
        parts = to_parts(request)
        future = self._pool.submit(work, *self._farms[node], parts) if self._pool else None
        self._waiting[message_id] = (node, request, future)
        if not isinstance(request, HelloRequest):
            self.requests.append((node, request))
        return Sent(message_id, size_of(parts))

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        """Answer one waiting request, chosen at random, or collect what the pool finished."""
        ready = [
            name
            for name in sorted(message_ids)
            if name in self._waiting and _finished(self._waiting[name][2])
        ]
        if not ready:
            return []
        return [self._deliver(self._random.choice(ready))]

    def _deliver(self, message_id: str) -> Delivery:
        node, request, future = self._waiting.pop(message_id)
        parts = future.result() if future else work(*self._farms[node], to_parts(request))
        reply = from_parts(*parts)
        changed = self._fault(node, request, reply) if self._fault else None  # type: ignore[arg-type]
        if isinstance(changed, str):
            return Delivery(message_id, None, error=changed)
        return Delivery(message_id, changed or reply, size_of(parts))  # type: ignore[arg-type]


def work(config: FarmConfig, state: Path, parts: Parts) -> Parts:
    """One farm answers one message, from its folders alone, as a fresh process would."""
    request = cast(Request, from_parts(*parts))
    try:
        request = with_body(request, config, state)
    except LinkError as error:
        return to_parts(Refusal(reason="missing_base", detail=str(error)))
    return to_parts(Farm.open(config, state).handle(request))


def size_of(parts: Parts) -> int:
    """Bytes of a message without an envelope."""
    text, arrays = parts
    return len(text) + sum(array.nbytes for array in arrays.values())


def _finished(future: Future[Parts] | None) -> bool:
    return future is None or future.done()
