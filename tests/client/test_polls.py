"""Idle polls are answered on the farm; everything else reaches the server, byte for byte."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client.polls import Head, Polls
from client.relay import Relay

POLL, OTHER = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
NOTHING, WORK = b"\x12\x02\x08\x05", b"m" * 400


class Web:
    """An HTTP server that knows how often it was asked what, and has work when told so."""

    def __init__(self) -> None:
        self.asked = Counter[str]()
        self.work = False
        self.chunked = False
        self.status = 200
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 1.0  # ends connections that are silent, as the SuperLink does

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                web.asked[self.path] += 1
                answer = (WORK if web.work else NOTHING) if self.path == POLL else body[::-1]
                self.send_response(web.status)
                if web.chunked:
                    self.send_header("transfer-encoding", "chunked")
                    self.end_headers()
                    self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(answer), answer))
                    return
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def web() -> Iterator[Web]:
    found = Web()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def relay(web: Web, tmp_path: Path) -> Iterator[Relay]:
    with Relay(web.address, tmp_path, poll_seconds=30) as relay:
        yield relay


@pytest.fixture
def supernode(relay: Relay) -> Iterator[http.client.HTTPConnection]:
    host, _, port = relay.address.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    yield connection
    connection.close()


def ask(supernode: http.client.HTTPConnection, path: str, body: bytes = b"node 1") -> bytes:
    supernode.request("POST", path, body)
    answer = supernode.getresponse()
    return answer.read()


def test_polls_that_bring_nothing_stay_on_the_farm(
    web: Web, relay: Relay, supernode: http.client.HTTPConnection
) -> None:
    assert [ask(supernode, POLL) for _ in range(20)] == [NOTHING] * 20
    assert web.asked[POLL] == 1
    once = relay.counters
    assert 0 < once.sent < 1000
    ask(supernode, POLL)
    assert relay.counters == once


def test_everything_else_goes_through_at_once_and_whole(
    web: Web, supernode: http.client.HTTPConnection
) -> None:
    body = bytes(range(256)) * 4000
    for _ in range(3):
        assert ask(supernode, OTHER, body) == body[::-1]
        assert ask(supernode, POLL) == NOTHING
    assert web.asked == {OTHER: 3, POLL: 1}


def test_work_is_never_answered_again(web: Web, supernode: http.client.HTTPConnection) -> None:
    web.work = True
    assert ask(supernode, POLL) == WORK
    assert ask(supernode, POLL) == WORK
    assert web.asked[POLL] == 2
    web.work = False
    assert ask(supernode, POLL) == NOTHING  # asked: nothing was known any more
    assert web.asked[POLL] == 3


def test_an_error_is_not_nothing(web: Web, supernode: http.client.HTTPConnection) -> None:
    web.status = 503
    for _ in range(3):
        ask(supernode, POLL)
    assert web.asked[POLL] == 3


def test_a_connection_that_the_server_has_ended_is_opened_again(
    web: Web, supernode: http.client.HTTPConnection
) -> None:
    assert ask(supernode, OTHER, b"ab") == b"ba"
    time.sleep(2.5)
    assert ask(supernode, OTHER, b"cd") == b"dc"
    assert web.asked[OTHER] == 2


def test_what_is_not_plain_is_passed_on_as_it_is(
    web: Web, supernode: http.client.HTTPConnection
) -> None:
    web.chunked = True
    for _ in range(3):
        assert ask(supernode, POLL) == NOTHING
        assert ask(supernode, OTHER, b"abc") == b"cba"
    assert web.asked == {OTHER: 3, POLL: 3}


def test_a_server_that_is_away_is_an_error_and_is_found_again(tmp_path: Path, web: Web) -> None:
    with Relay("127.0.0.1:9", tmp_path, poll_seconds=30) as relay:
        host, _, port = relay.address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(connection, POLL)
        connection.close()
        assert relay.counters.sent == 0


def test_nothing_is_believed_for_so_long() -> None:
    now = [0.0]
    polls = Polls(30, lambda: now[0])
    head = Head(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
    assert polls.answer() is None
    polls.learn(head, NOTHING)
    now[0] = 29.9
    assert polls.answer() == head.data + NOTHING
    now[0] = 30.0
    assert polls.answer() is None
    polls.learn(head, None)
    assert polls.answer() is None
