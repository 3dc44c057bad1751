"""The relay passes every byte on, counts it, and keeps the counters over its life."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import pytest

import client.relay
from client import traffic
from client.relay import BODY_BYTES, Relay
from client.traffic import Counters
from common.processes import free_port
from tests.waiting import wait_until

Serve = Callable[[socket.socket], None]


class Server:
    """Accepts connections on loopback and treats each as ``serve`` says, in a thread of its own."""

    def __init__(self, serve: Serve, port: int = 0) -> None:
        self._serve, self._listener = serve, socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._serve(connection)


def everything(connection: socket.socket) -> bytes:
    data = bytearray()
    while more := connection.recv(65_536):
        data += more
    return bytes(data)


def echo_at_the_end(connection: socket.socket) -> None:
    """Hears its client out, to the end of the client's half, and only then answers, twice over."""
    heard = everything(connection)
    connection.sendall(heard + heard)


def answer_each(connection: socket.socket) -> None:
    """100 bytes for every 10 bytes, as an HTTP server on a connection that is kept."""
    while request := connection.recv(10, socket.MSG_WAITALL):
        connection.sendall(request * 10)


def connect(relay: Relay) -> socket.socket:
    host, _, port = relay.address.partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def ask(relay: Relay, data: bytes) -> bytes:
    with connect(relay) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return everything(connection)


@pytest.fixture
def echo() -> Iterator[Server]:
    with Server(echo_at_the_end) as server:
        yield server


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_large_transfers_arrive_whole_and_are_counted_to_the_byte(
    echo: Server, tmp_path: Path
) -> None:
    data = random_bytes(20_000_003)
    with Relay(echo.address, tmp_path) as relay:
        assert ask(relay, data) == data + data  # the answer comes after our half has ended
        assert relay.counters == Counters(sent=len(data), received=2 * len(data))
    assert traffic.read(tmp_path) == Counters(sent=len(data), received=2 * len(data))


def test_a_server_that_ends_its_half_first_still_hears_the_rest(tmp_path: Path) -> None:
    heard = list[bytes]()

    def farewell(connection: socket.socket) -> None:
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        heard.append(everything(connection))

    with Server(farewell) as server, Relay(server.address, tmp_path) as relay:
        with connect(relay) as connection:
            assert everything(connection) == b"bye"
            connection.sendall(b"x" * 100_000)
        wait_until(lambda: heard, 10, "the end of what the client sent")
    assert heard == [b"x" * 100_000]
    assert relay.counters == Counters(sent=100_000, received=3)


def test_connections_do_not_mix(echo: Server, tmp_path: Path) -> None:
    parts = [random_bytes(200_000 + number, number) for number in range(40)]
    with Relay(echo.address, tmp_path) as relay, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda part: ask(relay, part), parts))
    assert answers == [part + part for part in parts]
    total = sum(map(len, parts))
    assert relay.counters == Counters(sent=total, received=2 * total)


def test_many_exchanges_on_one_connection(tmp_path: Path) -> None:
    with Server(answer_each) as server, Relay(server.address, tmp_path) as relay:
        with connect(relay) as connection:
            for _ in range(500):
                connection.sendall(b"0123456789")
                assert len(connection.recv(100, socket.MSG_WAITALL)) == 100
        assert relay.counters == Counters(sent=5_000, received=50_000)


def test_a_server_that_is_away_costs_nothing_and_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    with Relay(f"127.0.0.1:{port}", tmp_path) as relay:
        for _ in range(3):
            with connect(relay) as connection, contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""  # ended at once, no waiting
        assert relay.counters == Counters()
        with Server(echo_at_the_end, port):
            assert ask(relay, b"again") == b"againagain"
    assert caplog.text.count("cannot be reached") == 1, "once, not at every attempt"
    assert caplog.text.count("is reached again") == 1
    assert relay.counters == Counters(sent=5, received=10)


def test_a_torn_connection_is_torn_on_the_other_side(tmp_path: Path) -> None:
    felt = threading.Event()

    def wait_for_the_end(connection: socket.socket) -> None:
        try:
            everything(connection)
        finally:
            felt.set()

    def tear(connection: socket.socket) -> None:
        connection.recv(1)
        linger_zero = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_zero)

    with Server(wait_for_the_end) as server, Relay(server.address, tmp_path) as relay:
        with connect(relay) as connection:
            connection.sendall(b"x")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01" + bytes(7))
        assert felt.wait(10), "the server waits for a client that is gone"
    with Server(tear) as server, Relay(server.address, tmp_path) as relay, connect(relay) as torn:
        torn.sendall(b"x")
        with contextlib.suppress(ConnectionError):  # and no timeout
            assert torn.recv(1) == b""


def test_a_silent_server_does_not_hold_a_finished_connection_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.relay, "LINGER_SECONDS", 0.3)
    ended = threading.Event()

    def say_nothing(_connection: socket.socket) -> None:
        ended.wait(20)

    with (
        Server(say_nothing) as server,
        Relay(server.address, tmp_path) as relay,
        connect(relay) as connection,
    ):
        connection.sendall(b"are you there?")
        connection.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
        assert 0.2 < time.monotonic() - started < 10
        ended.set()


def test_the_relay_ends_with_open_connections(tmp_path: Path) -> None:
    with Server(answer_each) as server:
        with Relay(server.address, tmp_path) as relay:
            connections = [connect(relay) for _ in range(5)]
            for connection in connections:
                connection.sendall(b"0123456789")
                connection.recv(100, socket.MSG_WAITALL)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        for connection in connections:
            with connection, contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert traffic.read(tmp_path) == Counters(sent=50, received=500)
    with pytest.raises(OSError, match="refused"):
        connect(relay)


def test_an_idle_relay_uses_no_time(echo: Server, tmp_path: Path) -> None:
    with Relay(echo.address, tmp_path) as relay, connect(relay):
        time.sleep(0.2)
        before = psutil.Process().cpu_times()
        time.sleep(2.0)
        after = psutil.Process().cpu_times()
    assert after.user + after.system - before.user - before.system < 0.2


# --- counters on disk ----------------------------------------------------------------------------


def test_the_counters_go_on_where_they_were(echo: Server, tmp_path: Path) -> None:
    for life in (1, 2, 3):
        with Relay(echo.address, tmp_path) as relay:
            assert ask(relay, b"12345") == b"1234512345"
        assert traffic.read(tmp_path) == Counters(sent=5 * life, received=10 * life)


def test_the_counters_are_on_disk_within_seconds_and_not_at_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[Counters]()

    def noted(folder: Path, counters: Counters) -> None:
        traffic.keep(folder, counters)
        written.append(counters)

    monkeypatch.setattr(client.relay, "keep", noted)
    with (
        Server(answer_each) as server,
        Relay(server.address, tmp_path) as relay,
        connect(relay) as connection,
    ):
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            connection.sendall(b"0123456789")
            connection.recv(100, socket.MSG_WAITALL)
        assert len(written) <= 1, "polls alone are not worth a write"
        connection.sendall(b"0123456789" * 400)
        for _ in range(400):
            connection.recv(100, socket.MSG_WAITALL)
        wait_until(lambda: traffic.read(tmp_path) == relay.counters, 5, "the counters on disk")
        assert len(written) <= 3


@pytest.mark.parametrize(
    "damage", [b"", b'{"sent": 5, "rec', b"[]", b'{"sent": -1, "received": 0}', b"\xff\x00"]
)
def test_a_damaged_file_counts_from_zero_and_is_told(
    damage: bytes, echo: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "traffic.json").write_bytes(damage)
    assert traffic.fields(tmp_path) == {}
    with Relay(echo.address, tmp_path) as relay:
        ask(relay, b"1")
    assert "cannot be read" in caplog.text
    assert traffic.fields(tmp_path) == {"link_sent": 1, "link_received": 2}


def test_a_full_disk_does_not_stop_the_traffic(
    echo: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    state.write_text("a file where the folder should be: nothing can be written in there")
    with Relay(echo.address, state) as relay:
        for _ in range(3):
            assert ask(relay, b"12") == b"1212"
    assert relay.counters == Counters(sent=6, received=12)
    assert caplog.text.count("not kept") == 1


# --- signs of work -------------------------------------------------------------------------------


def test_a_body_on_the_way_down_is_told_from_polls(tmp_path: Path) -> None:
    with (
        Server(answer_each) as server,
        Relay(server.address, tmp_path) as relay,
        connect(relay) as connection,
    ):
        start = time.monotonic()
        for _ in range(200):  # 20 kB in all, in small exchanges
            connection.sendall(b"0123456789")
            connection.recv(100, socket.MSG_WAITALL)
        assert not relay.body_since(start)
        connection.sendall(b"0123456789" * (BODY_BYTES // 100 + 1))  # a long answer
        wait_until(lambda: relay.body_since(start), 5, "a body")


def test_a_body_on_the_way_up_is_told(tmp_path: Path) -> None:
    with (
        Server(echo_at_the_end) as server,
        Relay(server.address, tmp_path) as relay,
        connect(relay) as connection,
    ):
        start = time.monotonic()
        connection.sendall(b"x" * (BODY_BYTES + 1))
        wait_until(lambda: relay.body_since(start), 5, "a body")
        assert not relay.body_since(time.monotonic() + 1)
