"""FlowerLink over a grid that does what Flower's does, and what it does when things break."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from common.errors import LaunchError
from common.messages import AlignRequest, EvaluateRequest, HelloReply, HelloRequest
from common.wire import size_of, to_record
from server.app import FlowerLink
from server.link import Delivery

REPLY = HelloReply(farm="alpha", examples=3, classes=2)
DIGEST = "d" * 64


class FakeGrid:
    """Nodes 7 and 3 are online; ``replies`` make what the SuperLink has for a message."""

    def __init__(self) -> None:
        self.nodes = [7, 3]
        self.sent: dict[str, Message] = {}
        self.replies: dict[str, Callable[[Message], Message]] = {}
        self.pulled: list[str] = []
        self.refused: set[int] = set()
        self.stopped = False

    def get_node_ids(self) -> Iterable[int]:
        if self.stopped:
            raise RunNotRunningException
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.sent[message.metadata.message_id] = message
            known = message.metadata.dst_node_id not in self.refused
            ids.append(message.metadata.message_id if known else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        self.pulled.append(message_id)
        if self.stopped:
            raise RunNotRunningException
        make = self.replies.pop(message_id, None)
        return [] if make is None else [make(self.sent[message_id])]

    def answer(self, message_id: str, content: RecordDict | Error | None = None) -> None:
        answer = to_record(REPLY) if content is None else content
        self.replies[message_id] = lambda message: Message(answer, reply_to=message)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> FakeGrid:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return FakeGrid()


@pytest.fixture
def link(grid: FakeGrid) -> Iterator[FlowerLink]:
    with FlowerLink(cast(Grid, grid), threads=2, pace_seconds=0.01) as link:
        yield link


def gather(link: FlowerLink, ids: list[str], seconds: float = 10) -> list[Delivery]:
    found: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(found) < len(ids) and time.monotonic() < deadline:
        found += link.poll([i for i in ids if i not in {d.message_id for d in found}])
        time.sleep(0.005)
    return found


def quiet(link: FlowerLink, ids: list[str], seconds: float = 0.3) -> None:
    assert not gather(link, ids, seconds)


def test_nodes_are_sorted(link: FlowerLink) -> None:
    assert list(link.online()) == [3, 7]


def test_large_node_ids_become_signed_because_sqlite_has_no_others(
    link: FlowerLink, grid: FakeGrid
) -> None:
    grid.nodes = [5, 2**63 - 1, 2**63, 2**64 - 1]
    nodes = list(link.online())
    assert nodes == sorted(nodes)
    assert all(-(2**63) <= node < 2**63 for node in nodes)
    sent = [grid.sent[link.send(node, HelloRequest(), 9).message_id] for node in nodes]
    assert {message.metadata.dst_node_id for message in sent} == set(grid.nodes)
    ids = list(grid.sent)
    grid.answer(ids[0])  # of a node with a negative id
    assert gather(link, ids[:1])[0].reply == REPLY


def test_a_request_becomes_a_new_flower_message(link: FlowerLink, grid: FakeGrid) -> None:
    work: dict[str, Any] = {"run": 1, "round": 4, "attempt": 2, "seed": 0, "train": {}}
    request = AlignRequest(**work, base=DIGEST, mask=DIGEST)
    first, second = link.send(7, request, 30.0), link.send(7, request, 30.0)
    assert first.message_id != second.message_id
    message = grid.sent[first.message_id]
    assert message.metadata.message_type == "train.align"
    assert message.metadata.ttl == 30.0
    assert message.metadata.dst_node_id == 7
    assert message.metadata.group_id == "4"
    assert first.size_bytes == size_of(message.content)
    evaluate = EvaluateRequest(**work, base=DIGEST, mask=DIGEST, label="probe")
    sent = grid.sent[link.send(7, evaluate, 0.0).message_id]
    assert sent.metadata.message_type == "evaluate.report"
    assert sent.metadata.ttl == 1.0  # not Flower's default of twelve hours


def test_replies_come_back_with_their_size(link: FlowerLink, grid: FakeGrid) -> None:
    ids = [link.send(node, HelloRequest(), 60).message_id for node in (3, 7)]
    quiet(link, ids)
    for message_id in ids:
        grid.answer(message_id)
    found = gather(link, ids)
    assert {d.message_id for d in found} == set(ids)
    assert all(d.reply == REPLY and d.size_bytes == size_of(to_record(REPLY)) for d in found)
    assert all(d.error is None and not d.malformed for d in found)


def test_one_id_is_pulled_at_a_time_and_not_after_its_reply(
    link: FlowerLink, grid: FakeGrid
) -> None:
    message_id = link.send(3, HelloRequest(), 60).message_id
    grid.answer(message_id)
    gather(link, [message_id])
    count = len(grid.pulled)
    (again,) = link.poll([message_id])
    assert again.error == "unknown message"
    time.sleep(0.1)
    assert len(grid.pulled) == count


def test_a_reply_of_a_node_that_is_offline_waits_for_it(link: FlowerLink, grid: FakeGrid) -> None:
    message_id = link.send(3, HelloRequest(), 60).message_id
    grid.nodes = [7]
    grid.answer(message_id)
    time.sleep(0.05)
    quiet(link, [message_id])
    assert not grid.pulled  # a pull now would lose it
    grid.nodes = [3, 7]
    (found,) = gather(link, [message_id])
    assert found.reply == REPLY


def test_an_expired_message_is_asked_for_even_so(link: FlowerLink, grid: FakeGrid) -> None:
    message_id = link.send(3, HelloRequest(), 0.05).message_id
    grid.nodes = []
    grid.answer(message_id, Error(code=3, reason="expired"))
    (found,) = gather(link, [message_id])
    assert found.error == "Flower error 3: expired"
    assert not found.malformed


def test_error_replies_are_losses(link: FlowerLink, grid: FakeGrid) -> None:
    message_id = link.send(3, HelloRequest(), 60).message_id
    grid.answer(message_id, Error(code=2, reason="node unavailable"))
    (found,) = gather(link, [message_id])
    assert (found.reply, found.malformed, found.size_bytes) == (None, False, 0)
    assert found.error == "Flower error 2: node unavailable"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (RecordDict({"x": ConfigRecord({"a": 1})}), "not a fieldfed message"),
        (to_record(HelloRequest()), "answers with a reply"),
        (to_record(REPLY.model_copy(update={"protocol": 5})), "protocol 5"),
    ],
)
def test_what_is_not_a_reply_is_malformed(
    link: FlowerLink, grid: FakeGrid, content: RecordDict, named: str
) -> None:
    message_id = link.send(3, HelloRequest(), 60).message_id
    grid.answer(message_id, content)
    (found,) = gather(link, [message_id])
    assert found.malformed
    assert found.reply is None
    assert found.size_bytes == size_of(content)
    assert named in str(found.error)


def test_objects_that_cannot_be_put_together_are_malformed(
    link: FlowerLink, grid: FakeGrid
) -> None:
    def damaged(_message: Message) -> Message:
        raise KeyError("no such class")

    message_id = link.send(3, HelloRequest(), 60).message_id
    grid.replies[message_id] = damaged
    (found,) = gather(link, [message_id])
    assert found.malformed


def test_a_message_that_the_superlink_refuses_is_lost(link: FlowerLink, grid: FakeGrid) -> None:
    grid.refused = {3}
    message_id = link.send(3, HelloRequest(), 60).message_id
    (found,) = link.poll([message_id])
    assert "does not know node 3" in str(found.error)
    assert not found.malformed


def test_a_pull_that_blocks_holds_up_neither_poll_nor_others(
    link: FlowerLink, grid: FakeGrid
) -> None:
    release = threading.Event()

    def slow(message: Message) -> Message:
        release.wait(20)
        return Message(to_record(REPLY), reply_to=message)

    stuck, other = (link.send(node, HelloRequest(), 60).message_id for node in (3, 7))
    grid.replies[stuck] = slow
    grid.answer(other)
    started = time.monotonic()
    link.poll([stuck, other])
    assert time.monotonic() - started < 1
    found: list[Delivery] = []
    while not found:
        found = link.poll([stuck, other])
    assert [d.message_id for d in found] == [other]
    release.set()
    assert gather(link, [stuck])


def test_no_more_replies_are_held_than_there_are_threads(link: FlowerLink, grid: FakeGrid) -> None:
    ids = [link.send(3, HelloRequest(), 60).message_id for _ in range(12)]
    for message_id in ids:
        grid.answer(message_id)
    link.poll(ids)  # ask, then do not come back for them
    time.sleep(0.3)
    assert 12 - len(grid.replies) <= 4  # two in the queue, and one in each thread's hands
    assert len(gather(link, ids)) == 12


def test_a_stopped_run_ends_the_loop(link: FlowerLink, grid: FakeGrid) -> None:
    message_id = link.send(3, HelloRequest(), 60).message_id
    grid.stopped = True
    time.sleep(0.02)
    with pytest.raises(LaunchError, match="stopped"):
        link.online()
    with pytest.raises(LaunchError, match="stopped"):
        gather(link, [message_id])
