"""One exchange: quorum, deadline, retries, farms at work at once; time is simulated."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from common.config import RoundConfig
from common.errors import RejectReason
from common.messages import HelloReply, HelloRequest, Reply, Request
from server.collect import Collector, Exchange, Owed, Verdict, greeting_rules, quorum_of
from server.link import Delivery, Sent
from tests.lab.link import LabClock


@dataclass
class Scripted:
    """A link whose farms answer after a delay of their own; None: never, text: lost."""

    clock: LabClock
    delays: dict[int, float | str | None]
    offline: set[int] = field(default_factory=set)
    sent: list[tuple[int, float]] = field(default_factory=list)
    most_at_once: int = 0
    _flights: dict[str, tuple[int, float]] = field(default_factory=dict)

    def online(self) -> Sequence[int]:
        return [node for node in sorted(self.delays) if node not in self.offline]

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        self.sent.append((node, self.clock.now()))
        self._flights[str(len(self.sent))] = (node, self.clock.now())
        at_work = {node for node, _ in self._flights.values()}
        self.most_at_once = max(self.most_at_once, len(at_work))
        return Sent(str(len(self.sent)), 10)

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        found = []
        for name in message_ids:
            if name not in self._flights:
                continue
            node, since = self._flights[name]
            delay = self.delays[node]
            if isinstance(delay, str):
                found.append(Delivery(name, None, error=delay, malformed=delay == "malformed"))
            elif delay is not None and self.clock.now() - since >= delay:
                found.append(Delivery(name, HelloReply(farm=f"f{node}", examples=1, classes=2)))
        for delivery in found:
            del self._flights[delivery.message_id]
        return found


@dataclass
class Heard:
    accepted: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    faults: list[tuple[int, RejectReason]] = field(default_factory=list)


def play(
    link: Scripted,
    owed: dict[str, Owed] | None = None,
    joining: Callable[[], Sequence[int]] | None = None,
    **rules: object,
) -> tuple[int, Heard]:
    heard = Heard()

    def accept(node: int, _attempt: int, _reply: Reply, _size: int) -> Verdict:
        heard.accepted.append(node)
        return Verdict.ACCEPTED

    def late(node: int, _attempt: int, _reply: Reply, _size: int) -> Verdict:
        heard.late.append(node)
        return Verdict.ACCEPTED

    exchange = Exchange(
        nodes=list(link.online()) if joining else list(link.delays),
        request=lambda _node, _attempt: HelloRequest(),
        accept=accept,
        sent=lambda _node, _attempt, _size: None,
        fault=lambda node, reason, _detail: heard.faults.append((node, reason)),
        late=late,
        joining=joining,
    )
    config = RoundConfig.model_validate({"deadline_seconds": 100, "grace_seconds": 5} | rules)
    return Collector(link, link.clock, config).run(exchange, owed), heard


def test_all_farms_answer() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: 3.0, 3: 2.0})
    assert play(link)[0] == 3
    assert link.clock.now() < 4


def test_a_round_closes_at_quorum_plus_grace() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: 2.0, 3: 4.0, 4: None})
    count, heard = play(link, quorum=0.5)
    assert (count, heard.accepted) == (3, [1, 2, 3])
    assert 6.5 < link.clock.now() < 7.6


def test_a_round_closes_at_the_deadline_with_what_there_is() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: None})
    count, heard = play(link)
    assert count == 1
    assert heard.faults == [(2, RejectReason.LOST)]
    assert 100 <= link.clock.now() < 101


def test_a_lost_message_is_sent_again_as_often_as_the_rules_say() -> None:
    link = Scripted(LabClock(), {1: "node unavailable", 2: 1.0})
    count, heard = play(link, attempts=3)
    assert count == 1
    assert [node for node, _ in link.sent].count(1) == 3
    assert heard.faults == [(1, RejectReason.LOST)] * 3


def test_a_malformed_reply_is_not_asked_for_again() -> None:
    link = Scripted(LabClock(), {1: "malformed"})
    count, heard = play(link)
    assert count == 0
    assert heard.faults == [(1, RejectReason.MALFORMED)]
    assert len(link.sent) == 1


def test_no_more_farms_work_at_once_than_allowed_and_queued_ones_are_not_late() -> None:
    link = Scripted(LabClock(), dict.fromkeys(range(1, 7), 60.0))
    count, heard = play(link, max_in_flight=2, attempts=1)
    assert link.most_at_once == 2
    assert count == 6, "a farm was given up while it waited for its turn"
    assert not heard.faults


def test_a_farm_that_stays_offline_does_not_hold_the_round_for_ever() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: 1.0}, offline={2})
    count, heard = play(link)
    assert count == 1
    assert heard.faults == [(2, RejectReason.LOST)]
    assert link.clock.now() < 101


def test_a_quorum_is_rounded_up_and_at_least_one() -> None:
    assert quorum_of(10, RoundConfig(quorum=0.75)) == 8
    assert quorum_of(3, RoundConfig(quorum=0.01)) == 1
    assert quorum_of(7, RoundConfig(quorum=1.0)) == 7


def test_a_silent_farm_is_asked_again_and_its_first_answer_counts_once() -> None:
    link = Scripted(LabClock(), {1: 50.0})
    count, heard = play(link, attempt_seconds=20)
    assert (count, heard.accepted) == (1, [1])
    assert [node for node, _ in link.sent] == [1, 1, 1]
    first, second = (when for _, when in link.sent[:2])
    assert 16 <= second - first <= 24.4
    assert 50 <= link.clock.now() < 51


def test_a_lost_message_waits_longer_each_time() -> None:
    link = Scripted(LabClock(), {1: "node unavailable"})
    play(link, attempts=4)
    times = [when for _, when in link.sent]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert 0.8 <= gaps[0] < gaps[1] < gaps[2] <= 5.2


def test_what_is_owed_comes_in_the_next_exchange_and_is_not_asked_for_before() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: 30.0})
    owed: dict[str, Owed] = {}
    assert play(link, owed, quorum=0.5, grace_seconds=0)[0] == 1
    assert [debt.node for debt in owed.values()] == [2]
    count, heard = play(link, owed)
    assert (count, heard.accepted, heard.late) == (2, [1], [2])
    assert [node for node, _ in link.sent].count(2) == 1
    assert not owed


def test_a_debt_that_is_never_paid_is_forgiven_at_its_deadline() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: None})
    owed: dict[str, Owed] = {}
    play(link, owed, quorum=0.5, grace_seconds=0)
    link._flights.clear()
    link.delays[2] = 1.0
    count, heard = play(link, owed)
    assert (count, heard.late) == (2, [])
    assert (2, RejectReason.LOST) in heard.faults
    assert link.clock.now() < 105


def test_farms_that_still_owe_count_as_at_work() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: 40.0, 3: 1.0})
    owed: dict[str, Owed] = {}
    play(link, owed, quorum=0.3, grace_seconds=1)
    link.most_at_once = 0
    play(link, owed, max_in_flight=2, attempts=1)
    assert link.most_at_once == 2


def test_asynchronous_rounds_close_after_a_number_of_replies_without_grace() -> None:
    link = Scripted(LabClock(), {1: 1.0, 2: 2.0, 3: 30.0})
    assert play(link, {}, mode="async", buffer=2)[0] == 2
    assert link.clock.now() < 2.5
    assert quorum_of(1, RoundConfig(mode="async", buffer=5)) == 1


def greeted(
    delays: dict[int, float | str | None], known: int, **rules: object
) -> tuple[int, float]:
    """How many say who they are, and when that is over."""
    link = Scripted(LabClock(), delays)
    config = RoundConfig.model_validate({"deadline_seconds": 1800, "grace_seconds": 5} | rules)
    count, _ = play(link, **greeting_rules(config, known, len(delays)).model_dump())
    return count, link.clock.now()


def test_a_farm_that_is_gone_holds_nobody_up_once_enough_have_said_who_they_are() -> None:
    count, over = greeted({1: 10.0, 2: None, 3: 60.0}, known=0)
    assert count == 2
    assert 130 <= over < 132
    count, over = greeted({2: None}, known=1)
    assert count == 0
    assert 120 <= over < 122


def test_farms_without_which_a_run_cannot_begin_are_waited_for() -> None:
    count, over = greeted({1: 1.0, 2: 900.0}, known=0, min_farms=2)
    assert count == 2
    assert 900 <= over < 902
    assert greeted({1: 700.0}, known=0)[0] == 1


class Restarted(Scripted):
    """Node 1 ends after five seconds and never answers; it is back as node 2 after eight."""

    def online(self) -> Sequence[int]:
        now = self.clock.now()
        return [1] if now < 5 else [2] if now >= 8 else []


def test_a_farm_that_starts_again_while_it_is_asked_who_it_is_says_so_by_its_new_number() -> None:
    link = Restarted(LabClock(), {1: None, 2: 1.0})
    rules = greeting_rules(RoundConfig(min_farms=1, deadline_seconds=280), 0, 1).model_dump()
    count, heard = play(link, None, link.online, **rules)
    assert (count, heard.accepted) == (1, [2])
    assert [node for node, _ in link.sent] == [1, 2]
    assert link.clock.now() < 8 + 1 + 2 + 121, "a greeting of which nobody else is wanted goes on"


@given(known=st.integers(0, 300), strangers=st.integers(1, 300), least=st.integers(1, 300))
def test_a_greeting_wants_as_many_as_are_missing(known: int, strangers: int, least: int) -> None:
    rules = greeting_rules(RoundConfig(min_farms=least), known, strangers)
    assert quorum_of(strangers, rules) == min(max(least - known, 1), strangers)
