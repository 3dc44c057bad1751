"""FarmLink to regions: a thread for each gives it the order of the moment and takes the answer.

A region never calls. Its thread asks every few seconds for as long as an answer is awaited; when
the line is lost it waits, longer each time and by a random part, and goes on where it was. What
comes is believed when the region's own key has sealed it for this centre as the answer to this very
question (server/region_record.py), and only the round loop makes it count.
"""

import hashlib
import logging
import random
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self

from common.errors import FieldfedError
from common.messages import HelloRequest, Reply, Request
from common.signing import KeySet
from server.centre import Describe
from server.link import Delivery, Sent
from server.region_record import HELLO, opened

log = logging.getLogger(__name__)

ASK_SECONDS, REST_SECONDS = 2.0, 10.0
PAUSE_SECONDS, PAUSE_LIMIT = 1.0, 60.0
SPARE_SECONDS = 60.0
"""For which an answer is still looked for when it is late."""


class Line(Protocol):
    """A connection to one region's desk; every call has a time limit, and may raise LinkError."""

    def give(self, order: bytes) -> None:
        """Leave an order; the same again changes nothing."""
        ...

    def take(self, key: str, attempt: int) -> bytes | None:
        """The sealed answer, or None while there is none."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


@dataclass(frozen=True)
class Region:
    """A region as its centre knows it: its name, the keys that it seals with, the way there."""

    name: str
    keys: KeySet
    line: Line

    @property
    def node(self) -> int:
        """A number that is the region's whatever other regions there are."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6])


@dataclass
class _Flight:
    message_id: str
    key: str
    attempt: int
    order: bytes | None
    until: float
    given: bool = False


@dataclass
class _Talk:
    """One region and its thread."""

    region: Region
    flights: list[_Flight] = field(default_factory=list)
    arrived: dict[str, Delivery] = field(default_factory=dict)
    wake: threading.Event = field(default_factory=threading.Event)
    online: bool = False
    lost: int = 0


class RegionLink:
    """The regions of a centre; a context, because threads speak to them.

    Args:
        regions: by name, all different.
        centre: the name of this network.
        describe: makes an order of a request.
        ask_seconds: between two questions whether an answer is there.
        seed: of the pauses.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        centre: str,
        describe: Describe,
        ask_seconds: float = ASK_SECONDS,
        seed: int | None = None,
    ) -> None:
        self._centre, self._describe, self._ask = centre, describe, ask_seconds
        self._talks = {region.node: _Talk(region) for region in regions}
        self._random, self._count = random.Random(seed), 0  # noqa: S311 - jitter is no secret
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads = [
            threading.Thread(
                target=self._speak, args=(talk,), name=f"region-{talk.region.name}", daemon=True
            )
            for talk in self._talks.values()
        ]

    def __enter__(self) -> Self:
        """Begin to speak."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Hang up; a call that does not end is not waited for."""
        self._stop.set()
        for talk in self._talks.values():
            talk.wake.set()
            talk.region.line.close()
        for thread in self._threads:
            thread.join(5.0)

    def online(self) -> Sequence[int]:
        """Regions that have introduced themselves, and whose last call went well."""
        return sorted(node for node, talk in self._talks.items() if talk.online)

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        """Leave an order for a region's thread; its answer is looked for while somebody may ask."""
        self._count += 1
        message_id, until = f"m{self._count}", time.monotonic() + ttl_seconds + SPARE_SECONDS
        if isinstance(request, HelloRequest):
            flight = _Flight(message_id, HELLO, 1, None, until, given=True)
        else:
            order = self._describe(request)
            flight = _Flight(message_id, order.key, request.attempt, order.to_bytes(), until)
        talk = self._talks[node]
        with self._lock:
            talk.flights.append(flight)
        talk.wake.set()
        return Sent(message_id, len(flight.order or b""))

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        """What has come for these messages; does not wait."""
        wanted, now, found = set(message_ids), time.monotonic(), []
        with self._lock:
            for talk in self._talks.values():
                found += [talk.arrived.pop(one) for one in wanted & talk.arrived.keys()]
                talk.flights = [one for one in talk.flights if now < one.until]
        return found

    # --- one region ------------------------------------------------------------------------

    def _speak(self, talk: _Talk) -> None:
        while not self._stop.is_set():
            talk.wake.clear()
            try:
                self._visit(talk)
                talk.lost = 0
                talk.wake.wait(self._ask if talk.flights else REST_SECONDS)
            except FieldfedError as error:
                self._lose(talk, error)

    def _visit(self, talk: _Talk) -> None:
        """Whatever is to be said to a region now; it counts once it has introduced itself."""
        with self._lock:
            flights = list(talk.flights)
        for flight in flights:
            self._turn(talk, flight)
        if flights and talk.online:
            return
        there = talk.region.line.take(HELLO, 1) is not None
        if there != talk.online:
            said = "can be reached" if there else "can be reached, and waits for its farms"
            log.info("region %s %s", talk.region.name, said)
        talk.online = there

    def _turn(self, talk: _Talk, flight: _Flight) -> None:
        """Give an order once, and look for its answer."""
        if not flight.given and flight.order is not None:
            talk.region.line.give(flight.order)
            flight.given = True
        data = talk.region.line.take(flight.key, flight.attempt)
        if data is None:
            return
        delivery = self._delivery(talk.region, flight, data)
        with self._lock:
            if flight in talk.flights:
                # what was asked again is answered once
                talk.flights = [one for one in talk.flights if one.key != flight.key]
                talk.arrived[flight.message_id] = delivery

    def _delivery(self, region: Region, flight: _Flight, data: bytes) -> Delivery:
        try:
            reply: Reply = opened(
                data,
                region=region.name,
                centre=self._centre,
                key=flight.key,
                keys=region.keys,
                now=datetime.now(UTC),
            )
        except FieldfedError as error:
            return Delivery(
                flight.message_id, None, len(data), error=str(error)[:500], malformed=True
            )
        if hasattr(reply, "attempt"):
            reply = reply.model_copy(update={"attempt": flight.attempt})
        return Delivery(flight.message_id, reply, len(data))

    def _lose(self, talk: _Talk, error: FieldfedError) -> None:
        """The line is lost: wait, longer each time. What was given is on the region's disk."""
        if talk.online or not talk.lost:
            log.warning("region %s cannot be reached: %s", talk.region.name, error)
        talk.online, talk.lost = False, talk.lost + 1
        limit = min(PAUSE_LIMIT, PAUSE_SECONDS * 2 ** min(talk.lost - 1, 10))
        self._stop.wait(limit * self._random.uniform(0.5, 1.0))
