"""Ask farms and gather their answers: one exchange, with quorum, deadline and retries.

Delivery is at most once, so a request without an answer is sent again as a new message: after a
jittered back-off when it was lost, after ``attempt_seconds`` when the farm is silent. A farm that
has done the work answers a repeated request from disk, and only its first answer counts. At most
``max_in_flight`` farms work at once, and a farm's deadline starts when it is first asked.

The exchange ends when every farm has answered or given up, or ``grace_seconds`` after the quorum.
Farms that are still at work then are *owed*: a later exchange takes their answers when they come,
and does not ask them before.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from common.config import RoundConfig
from common.errors import ProtocolError, RejectReason
from common.messages import Reply, Request
from server.link import Clock, Delivery, FarmLink

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
BACKOFF_SECONDS, BACKOFF_LIMIT = 1.0, 30.0
JOINING_SECONDS = 2.0
"""Between two looks for nodes that have come online since."""
GREETING_SECONDS = 120.0
"""A device that was just switched on needs a minute to say who it is."""


class Verdict(Enum):
    """What becomes of a farm after one of its replies."""

    ACCEPTED = "accepted"
    FOLDED = "folded"
    """Done for this exchange, but it does not count towards the quorum."""
    REJECTED = "rejected"
    RETRY = "retry"


Accept = Callable[[int, int, Reply, int], Verdict]


@dataclass(frozen=True)
class Exchange:
    """What is asked of whom, and what to do with the answers.

    Attributes:
        nodes: the farms to ask, in this order where they have to take turns.
        request: makes the request for (node, attempt); a ProtocolError leaves the farm out.
        accept: judges (node, attempt, reply, size in bytes).
        sent: told of (node, attempt, size in bytes) for every message sent.
        fault: told of (node, reason, detail) for every message lost, malformed or not made.
        late: judges an answer owed from an earlier exchange, as ``accept`` does.
        joining: nodes to ask too, looked for while the exchange goes on; those asked before are
            not asked anew.
    """

    nodes: Sequence[int]
    request: Callable[[int, int], Request]
    accept: Accept
    sent: Callable[[int, int, int], None]
    fault: Callable[[int, RejectReason, str], None]
    late: Accept | None = None
    joining: Callable[[], Sequence[int]] | None = None


@dataclass(frozen=True)
class Owed:
    """An answer that a farm still owes from an earlier exchange."""

    node: int
    attempt: int
    until: float


@dataclass
class _Farm:
    node: int
    attempt: int = 0
    flights: dict[str, int] = field(default_factory=dict)
    deadline: float = 0.0
    next_at: float = 0.0


class _Progress:
    """Farms without an outcome yet, and what is in the air."""

    def __init__(self, nodes: Sequence[int], owed: dict[str, Owed]) -> None:
        self.open = {node: _Farm(node) for node in nodes}
        self.known = set(nodes)
        self.look_at = 0.0
        self.owed = owed
        self.busy = {debt.node for debt in owed.values()}
        self.by_message: dict[str, _Farm] = {}
        self.accepted = 0
        self.at_work = len(self.busy)
        self.quorum_at: float | None = None

    def join(self, nodes: Sequence[int]) -> None:
        """Ask these, too, unless they are known already."""
        self.open |= {node: _Farm(node) for node in nodes if node not in self.known}
        self.known |= set(nodes)

    def launch(self, farm: _Farm, message_id: str) -> None:
        self.at_work += not farm.flights
        farm.flights[message_id] = farm.attempt
        self.by_message[message_id] = farm

    def land(self, message_id: str) -> tuple[_Farm, int] | None:
        farm = self.by_message.pop(message_id, None)
        if farm is None:
            return None
        attempt = farm.flights.pop(message_id)
        self.at_work -= not farm.flights
        return farm, attempt

    def settle(self, farm: _Farm, accepted: bool) -> None:
        """The farm is done with; whatever else it sends is not waited for."""
        for message_id in list(farm.flights):
            self.land(message_id)
        self.open.pop(farm.node, None)
        self.accepted += accepted

    def paid(self, message_id: str) -> Owed:
        """A debt is settled, or forgiven."""
        debt = self.owed.pop(message_id)
        if all(other.node != debt.node for other in self.owed.values()):
            self.busy.discard(debt.node)
            self.at_work -= 1
        return debt


class Collector:
    """One exchange on a link.

    Args:
        link: to the farms.
        clock: time of deadlines.
        rules: quorum, deadlines, attempts.
        seed: of the jitter between attempts.
    """

    def __init__(self, link: FarmLink, clock: Clock, rules: RoundConfig, seed: int = 0) -> None:
        self._link, self._clock, self._rules = link, clock, rules
        self._random = random.Random(seed)  # noqa: S311 - jitter is no secret

    def run(self, exchange: Exchange, owed: dict[str, Owed] | None = None) -> int:
        """Ask and gather.

        Args:
            exchange: what is asked.
            owed: answers owed from earlier exchanges, by message; left holding those that are
                still owed, with the farms that have not answered this one.

        Returns:
            How many farms were accepted.
        """
        owed = {} if owed is None else owed
        progress = _Progress(exchange.nodes, owed)
        quorum = quorum_of(len(progress.open), self._rules)
        while progress.open and not self._closed(progress, quorum):
            self._look_for_more(exchange, progress)
            self._send_waiting(exchange, progress)
            for delivery in self._link.poll([*progress.by_message, *progress.owed]):
                if delivery.message_id in progress.owed:
                    self._take_late(delivery, exchange, progress)
                else:
                    self._take(delivery, exchange, progress)
            self._expire(exchange, progress)
            if progress.open:
                self._clock.sleep(POLL_SECONDS)
        for farm in progress.open.values():
            for message_id, attempt in farm.flights.items():
                owed[message_id] = Owed(farm.node, attempt, farm.deadline)
        return progress.accepted

    def _look_for_more(self, exchange: Exchange, progress: _Progress) -> None:
        now = self._clock.now()
        if exchange.joining is not None and now >= progress.look_at:
            progress.look_at = now + JOINING_SECONDS
            progress.join(exchange.joining())

    def _closed(self, progress: _Progress, quorum: int) -> bool:
        if progress.accepted < quorum:
            return False
        now = self._clock.now()
        if progress.quorum_at is None:
            progress.quorum_at = now
        grace = 0.0 if self._rules.mode == "async" else self._rules.grace_seconds
        return now >= progress.quorum_at + grace

    def _send_waiting(self, exchange: Exchange, progress: _Progress) -> None:
        now, rules = self._clock.now(), self._rules
        idle = [farm for farm in progress.open.values() if now >= farm.next_at]
        if not idle:
            return
        online = set(self._link.online())
        for farm in idle:
            if farm.node in progress.busy:
                continue
            if farm.attempt == 0 and (not farm.deadline or farm.node in online):
                # queued is not late; but a farm that stays offline does not hold the round for ever
                farm.deadline = now + rules.deadline_seconds
            if farm.node not in online or farm.attempt >= rules.attempts:
                continue
            if not farm.flights and progress.at_work >= rules.max_in_flight:
                continue
            farm.attempt += 1
            try:
                request = exchange.request(farm.node, farm.attempt)
            except ProtocolError as error:  # the farm is too old for it
                exchange.fault(farm.node, error.reason, str(error))
                progress.settle(farm, False)
                continue
            left = farm.deadline - now
            sent = self._link.send(farm.node, request, left)
            progress.launch(farm, sent.message_id)
            farm.next_at = now + self._jittered(rules.patience_seconds)
            exchange.sent(farm.node, farm.attempt, sent.size_bytes)

    def _jittered(self, seconds: float) -> float:
        return seconds * self._random.uniform(0.8, 1.2)

    def _take(self, delivery: Delivery, exchange: Exchange, progress: _Progress) -> None:
        landed = progress.land(delivery.message_id)
        if landed is None:
            return
        farm, attempt = landed
        verdict = _judge(delivery, farm.node, attempt, exchange, exchange.accept)
        if verdict in (Verdict.ACCEPTED, Verdict.FOLDED):
            progress.settle(farm, verdict is Verdict.ACCEPTED)
        elif verdict is Verdict.REJECTED:
            progress.settle(farm, False)
        elif not farm.flights:
            if farm.attempt >= self._rules.attempts:
                progress.settle(farm, False)
            else:
                wait = min(BACKOFF_LIMIT, BACKOFF_SECONDS * 2 ** (farm.attempt - 1))
                farm.next_at = self._clock.now() + self._jittered(wait)

    def _take_late(self, delivery: Delivery, exchange: Exchange, progress: _Progress) -> None:
        debt = progress.paid(delivery.message_id)
        accept = exchange.late or (lambda *_: Verdict.RETRY)
        verdict = _judge(delivery, debt.node, debt.attempt, exchange, accept)
        farm = progress.open.get(debt.node)
        if farm is not None and verdict in (Verdict.ACCEPTED, Verdict.FOLDED):
            progress.settle(farm, verdict is Verdict.ACCEPTED)
        if delivery.reply is not None:  # repeated requests bring the same answer
            for message_id in [m for m, o in progress.owed.items() if o.node == debt.node]:
                progress.paid(message_id)

    def _expire(self, exchange: Exchange, progress: _Progress) -> None:
        now = self._clock.now()
        for farm in list(progress.open.values()):
            if farm.deadline and now >= farm.deadline:
                progress.settle(farm, False)
                detail = f"no answer within {self._rules.deadline_seconds:.0f} s"
                exchange.fault(farm.node, RejectReason.LOST, f"{detail} (attempt {farm.attempt})")
        for message_id in [m for m, debt in progress.owed.items() if now >= debt.until]:
            debt = progress.paid(message_id)
            exchange.fault(debt.node, RejectReason.LOST, "an earlier answer never came")


def quorum_of(farms: int, rules: RoundConfig) -> int:
    """Replies that make a round complete, at least one.

    The configured share of the farms asked, rounded up; in asynchronous mode a fixed number.
    """
    if rules.mode == "async":
        return max(1, min(rules.buffer, farms))
    return max(1, -int(-farms * rules.quorum // 1))


def _judge(
    delivery: Delivery, node: int, attempt: int, exchange: Exchange, accept: Accept
) -> Verdict:
    if delivery.reply is not None:
        return accept(node, attempt, delivery.reply, delivery.size_bytes)
    reason = RejectReason.MALFORMED if delivery.malformed else RejectReason.LOST
    exchange.fault(node, reason, delivery.error or "no reply")
    return Verdict.REJECTED if delivery.malformed else Verdict.RETRY


def greeting_rules(rules: RoundConfig, known: int, strangers: int) -> RoundConfig:
    """The rules by which farms are asked who they are, where so many are known already.

    SuperLink calls a farm online for up to a minute after it has gone. Once enough have answered,
    nobody waits longer than ``GREETING_SECONDS`` for it; who is late is asked again next round.
    """
    wanted = rules.min_farms - known
    changes: dict[str, object] = {
        "max_in_flight": 10_000,  # a hello trains nothing: nobody needs to wait for a turn
        "mode": "sync",
        # an older farm says which protocol it speaks, and is asked again
        "attempts": max(2, rules.attempts),
        "quorum": min(1.0, max(wanted - 0.5, 0.5) / strangers),
        "grace_seconds": GREETING_SECONDS,
    }
    if wanted <= 0 and known:
        changes["deadline_seconds"] = min(rules.deadline_seconds, GREETING_SECONDS)
    return rules.model_copy(update=changes)
