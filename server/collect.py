"""Ask farms and gather their answers: one exchange, with quorum, deadline and retries.

Delivery is at most once, so a lost request is sent again as a new message. At most
``max_in_flight`` farms work at once, and a farm's deadline starts when its request is sent. The
exchange ends when every farm has answered or given up, or ``grace_seconds`` after the quorum.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from common.config import RoundConfig
from common.errors import RejectReason
from common.messages import Reply, Request
from server.link import Clock, Delivery, FarmLink

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


class Verdict(Enum):
    """What becomes of a farm after one of its replies."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    RETRY = "retry"


@dataclass(frozen=True)
class Exchange:
    """What is asked of whom, and what to do with the answers.

    Attributes:
        nodes: the farms to ask.
        request: makes the request for (node, attempt).
        accept: judges (node, attempt, reply, size in bytes).
        sent: told of (node, attempt, size in bytes) for every message sent.
        fault: told of (node, reason, detail) for every message lost or malformed.
    """

    nodes: Sequence[int]
    request: Callable[[int, int], Request]
    accept: Callable[[int, int, Reply, int], Verdict]
    sent: Callable[[int, int, int], None]
    fault: Callable[[int, RejectReason, str], None]


@dataclass
class _Farm:
    node: int
    attempt: int = 0
    message_id: str | None = None
    deadline: float = 0.0
    outcome: bool | None = None


@dataclass
class _Progress:
    farms: dict[int, _Farm]
    by_message: dict[str, _Farm] = field(default_factory=dict)
    quorum_at: float | None = None

    @property
    def accepted(self) -> int:
        return sum(farm.outcome is True for farm in self.farms.values())

    @property
    def open(self) -> list[_Farm]:
        return [farm for farm in self.farms.values() if farm.outcome is None]


def collect(link: FarmLink, clock: Clock, rules: RoundConfig, exchange: Exchange) -> int:
    """Run one exchange; returns how many farms were accepted."""
    progress = _Progress({node: _Farm(node) for node in sorted(exchange.nodes)})
    quorum = quorum_of(len(progress.farms), rules)
    while progress.open and not _closed(progress, quorum, clock.now(), rules):
        _send_waiting(link, clock, rules, exchange, progress)
        for delivery in link.poll(list(progress.by_message)):
            _take(delivery, rules, exchange, progress)
        _expire(clock.now(), rules, exchange, progress)
        if progress.open:
            clock.sleep(POLL_SECONDS)
    return progress.accepted


def quorum_of(farms: int, rules: RoundConfig) -> int:
    """Replies that make a round complete: the configured share, rounded up, at least one."""
    return max(1, -int(-farms * rules.quorum // 1))


def _closed(progress: _Progress, quorum: int, now: float, rules: RoundConfig) -> bool:
    if progress.accepted < quorum:
        return False
    if progress.quorum_at is None:
        progress.quorum_at = now
    return now >= progress.quorum_at + rules.grace_seconds


def _send_waiting(
    link: FarmLink, clock: Clock, rules: RoundConfig, exchange: Exchange, progress: _Progress
) -> None:
    online = set(link.online())
    for farm in progress.open:
        if farm.message_id:
            continue
        if not farm.deadline or farm.node in online:
            # queued is not late; but a farm that stays offline does not hold the round for ever
            farm.deadline = clock.now() + rules.deadline_seconds
        if farm.node not in online or len(progress.by_message) >= rules.max_in_flight:
            continue
        farm.attempt += 1
        sent = link.send(
            farm.node, exchange.request(farm.node, farm.attempt), rules.deadline_seconds
        )
        farm.message_id, farm.deadline = sent.message_id, clock.now() + rules.deadline_seconds
        progress.by_message[sent.message_id] = farm
        exchange.sent(farm.node, farm.attempt, sent.size_bytes)


def _take(delivery: Delivery, rules: RoundConfig, exchange: Exchange, progress: _Progress) -> None:
    farm = progress.by_message.pop(delivery.message_id, None)
    if farm is None or farm.outcome is not None:
        return
    farm.message_id = None
    if delivery.reply is None:
        reason = RejectReason.MALFORMED if delivery.malformed else RejectReason.LOST
        exchange.fault(farm.node, reason, delivery.error or "no reply")
        verdict = Verdict.REJECTED if delivery.malformed else Verdict.RETRY
    else:
        verdict = exchange.accept(farm.node, farm.attempt, delivery.reply, delivery.size_bytes)
    if verdict is Verdict.ACCEPTED:
        farm.outcome = True
    elif verdict is Verdict.REJECTED or farm.attempt >= rules.attempts:
        farm.outcome = False


def _expire(now: float, rules: RoundConfig, exchange: Exchange, progress: _Progress) -> None:
    for farm in progress.open:
        if not farm.deadline or now < farm.deadline:
            continue
        if farm.message_id:
            progress.by_message.pop(farm.message_id, None)
        farm.outcome = False
        detail = f"no answer within {rules.deadline_seconds:.0f} s (attempt {farm.attempt})"
        exchange.fault(farm.node, RejectReason.LOST, detail)
