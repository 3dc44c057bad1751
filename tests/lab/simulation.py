"""Thousands of farms on a simulated clock: speeds, drop-outs and outages, and nobody sleeps.

The product's own round loop runs on it unchanged. A farm works on one request after another; what
it answers is a function of the request, called when its answer is delivered. The time jumps from
event to event, at most ``STRIDE_SECONDS`` at once, so that deadlines are seen.
"""

import heapq
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from common.messages import AlignReply, AlignRequest, HelloReply, HelloRequest, Reply, Request
from server.link import Delivery, Sent

STRIDE_SECONDS = 5.0
NOTICE_SECONDS = 54.0
"""Until Flower tells that a farm is gone."""


class SimClock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self._time = 0.0
        self._due: list[float] = []

    def now(self) -> float:
        """Seconds since the beginning."""
        return self._time

    def sleep(self, seconds: float) -> None:
        """Go on to the next event."""
        while self._due and self._due[0] <= self._time:
            heapq.heappop(self._due)
        limit = self._time + max(seconds, STRIDE_SECONDS)
        self._time = min(limit, self._due[0]) if self._due else limit

    def remind(self, when: float) -> None:
        """Something happens then."""
        heapq.heappush(self._due, when)


@dataclass
class SimFarm:
    """One simulated farm.

    ``seconds`` is what one alignment takes; ``begun`` is the (run, round) of the last one, which is
    answered from disk when it is asked for again; ``loss`` is the chance that a request or its
    answer is lost; in ``outages`` (from, to) it cannot be reached and what it was doing is lost.
    """

    name: str
    seconds: float
    examples: int = 10
    classes: int = 2
    loss: float = 0.0
    outages: Sequence[tuple[float, float]] = ()
    busy_until: float = 0.0
    begun: tuple[int, int] | None = None
    done: dict[tuple[int, int], Reply] = field(default_factory=dict)

    def away(self, start: float, end: float) -> bool:
        """Whether an outage touches this time."""
        return any(start < until and end >= since for since, until in self.outages)


@dataclass
class _Flight:
    node: int
    request: Request
    since: float
    arrives: float
    lost: bool


Answer = Callable[[int, SimFarm, Request], Reply]


class SimLink:
    """FarmLink to simulated farms, by node (1, 2, ...)."""

    def __init__(
        self, clock: SimClock, farms: Sequence[SimFarm], answer: Answer, seed: int = 0
    ) -> None:
        self.farms = dict(enumerate(farms, start=1))
        self._clock, self._answer, self._random = clock, answer, random.Random(seed)
        self._flights: dict[str, _Flight] = {}
        self._arrivals: list[tuple[float, str]] = []
        self._steady = not any(farm.outages for farm in farms)
        self._nodes = tuple(self.farms)
        self.sent = 0
        self.trained = 0
        """Alignments that farms have done; a repeated request costs none."""

    def online(self) -> Sequence[int]:
        """Farms that can be reached now."""
        if self._steady:
            return self._nodes
        now = self._clock.now()
        return [node for node, farm in self.farms.items() if not farm.away(now, now)]

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        """Queue a request at its farm."""
        self.sent += 1
        farm, now, message_id = self.farms[node], self._clock.now(), f"m{self.sent}"
        start = max(now, farm.busy_until)
        arrives = start + self._takes(farm, request)
        lost = self._random.random() < farm.loss
        expired = start >= now + ttl_seconds  # before the farm came to it
        if lost or expired or farm.away(start, arrives):
            lost, arrives = True, now + NOTICE_SECONDS
        else:
            farm.busy_until = arrives
            if isinstance(request, AlignRequest):
                farm.begun = request.run, request.round
        self._flights[message_id] = _Flight(node, request, now, arrives, lost)
        heapq.heappush(self._arrivals, (arrives, message_id))
        self._clock.remind(arrives)
        return Sent(message_id, 0)

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        """What has arrived; answers that nobody asks for any more are dropped."""
        wanted, found = set(message_ids), []
        while self._arrivals and self._arrivals[0][0] <= self._clock.now():
            _, message_id = heapq.heappop(self._arrivals)
            flight = self._flights.pop(message_id)
            if message_id in wanted:
                found.append(self._deliver(message_id, flight))
        return found

    def _takes(self, farm: SimFarm, request: Request) -> float:
        if not isinstance(request, AlignRequest):
            return 1.0
        return 1.0 if (request.run, request.round) == farm.begun else farm.seconds

    def _deliver(self, message_id: str, flight: _Flight) -> Delivery:
        if flight.lost:
            return Delivery(message_id, None, error="node unavailable")
        farm, request = self.farms[flight.node], flight.request
        if isinstance(request, HelloRequest):
            hello = HelloReply(farm=farm.name, examples=farm.examples, classes=farm.classes)
            return Delivery(message_id, hello)
        if not isinstance(request, AlignRequest):
            return Delivery(message_id, self._answer(flight.node, farm, request))
        key = (request.run, request.round)
        if key not in farm.done:
            farm.done = {key: self._answer(flight.node, farm, request)}
            self.trained += 1
        reply = farm.done[key]
        if isinstance(reply, AlignReply):
            reply = reply.model_copy(update={"attempt": request.attempt})
        return Delivery(message_id, reply)
