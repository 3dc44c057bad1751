"""The imitated link itself: what it lets through, how fast, and what it counts."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.system.slowlink import Conditions, SlowLink


@contextmanager
def echo() -> Iterator[int]:
    """A server that sends back what it is sent; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    while data := connection.recv(65_536):
                        connection.sendall(data)
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def exchange(link: SlowLink, data: bytes) -> bytes:
    host, port = link.address.split(":")
    back = b""
    with socket.create_connection((host, int(port)), timeout=30) as farm:

        def send() -> None:
            with contextlib.suppress(OSError):
                farm.sendall(data)
                farm.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while piece := farm.recv(65_536):
            back += piece
        sender.join()
    return back


def test_bytes_arrive_and_are_counted() -> None:
    data = bytes(range(256)) * 2000
    with echo() as port, SlowLink("127.0.0.1", port) as link:
        assert exchange(link, data) == data
        assert (link.up, link.down) == (len(data), len(data))


def test_the_line_is_narrow_and_far_away() -> None:
    conditions = Conditions(bits_per_second=400_000, round_trip=0.4)
    with echo() as port, SlowLink("127.0.0.1", port, conditions) as link:
        began = time.monotonic()
        assert exchange(link, b"x" * 50_000) == b"x" * 50_000
        took = time.monotonic() - began
    # a second each way, partly at the same time, and two round trips
    assert 1.8 < took < 6


def test_nothing_moves_during_a_stall() -> None:
    conditions = Conditions(stall_every=0.2, stall=0.5)
    with echo() as port, SlowLink("127.0.0.1", port, conditions) as link:
        longest, last = 0.0, time.monotonic()
        until = last + 2
        while last < until:
            exchange(link, b"x")
            now = time.monotonic()
            longest, last = max(longest, now - last), now
    assert longest > 0.25


def test_connections_are_reset_in_the_middle() -> None:
    with echo() as port, SlowLink("127.0.0.1", port, Conditions(reset_every=0.1)) as link:
        with pytest.raises(ConnectionResetError):
            for _ in range(1000):
                assert exchange(link, b"x" * 1000) == b"x" * 1000
                time.sleep(0.01)
        assert link.resets >= 1
