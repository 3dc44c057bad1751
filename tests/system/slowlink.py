"""A loopback TCP link as a field has it: narrow, far away, with stalls and broken connections.

Each direction of a link carries ``bits_per_second`` in all, every byte arrives half a round trip
after it was sent, now and then nothing moves for some seconds, and now and then a connection is
reset in the middle. What TCP makes of lost packets cannot be imitated from user space: a packet is
never lost here, only late. Bytes are counted as they are read from the farm and from the server.
"""

import contextlib
import queue
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Self, TypeAlias

PIECE = 2048
Pieces: TypeAlias = "queue.Queue[tuple[float, bytes]]"

QUEUED = 16
"""Pieces on their way: as much as a socket's buffers would hold."""


@dataclass(frozen=True)
class Conditions:
    """Of a link; the default is one that only counts.

    Attributes:
        bits_per_second: each way; None: as fast as it goes.
        round_trip: seconds.
        stall_every: seconds between stalls; 0: none.
        stall: seconds that nothing moves.
        reset_every: seconds after which the connection that moves next is reset; 0: never.
    """

    bits_per_second: float | None = None
    round_trip: float = 0.0
    stall_every: float = 0.0
    stall: float = 0.0
    reset_every: float = 0.0


GOOD = Conditions()
RURAL = Conditions(128_000, 0.6, stall_every=30, stall=4, reset_every=40)


@dataclass
class _Way:
    """One direction of the link: who may send next, and what was sent."""

    free_at: float = 0.0
    total: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pass_on(self, size: int, conditions: Conditions) -> float:
        """Count bytes, wait for the line to take them; when they arrive at the other end."""
        with self.lock:
            self.total += size
            now = time.monotonic()
            start = max(now, self.free_at)
            if conditions.stall_every:
                since = start % (conditions.stall_every + conditions.stall)
                if since > conditions.stall_every:
                    start += conditions.stall_every + conditions.stall - since
            rate = conditions.bits_per_second
            self.free_at = start + (8 * size / rate if rate else 0.0)
        time.sleep(max(0.0, self.free_at - now))
        return self.free_at + conditions.round_trip / 2


class SlowLink:
    """One farm's link to the server; a context.

    ``up`` and ``down`` are bytes so far, ``resets`` the connections that were broken.
    """

    def __init__(self, host: str, port: int, conditions: Conditions = GOOD, seed: int = 0) -> None:
        self._server, self._conditions = (host, port), conditions
        self._random = random.Random(seed)
        self._up, self._down = _Way(), _Way()
        self._ended = threading.Event()
        self._next_reset = time.monotonic() + self._until_reset()
        self.resets = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def up(self) -> int:
        """Bytes that the farm sent."""
        return self._up.total

    @property
    def down(self) -> int:
        """Bytes that the farm received."""
        return self._down.total

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                farm, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(farm,), daemon=True).start()

    def _connect(self, farm: socket.socket) -> None:
        time.sleep(self._conditions.round_trip)  # TCP's own handshake
        try:
            server = socket.create_connection(self._server, timeout=10)
        except OSError:
            farm.close()
            return
        server.settimeout(None)
        for one in (farm, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with farm, server:
            broken = threading.Event()
            ways = [
                *self._carry(farm, server, self._up, broken),
                *self._carry(server, farm, self._down, broken),
            ]
            for way in ways:
                way.join()

    def _carry(
        self, source: socket.socket, target: socket.socket, way: _Way, broken: threading.Event
    ) -> list[threading.Thread]:
        pieces: Pieces = queue.Queue(QUEUED)
        read, write = (source, target, way, pieces, broken), (source, target, pieces, broken)
        threads = [
            threading.Thread(target=self._read, args=read, daemon=True),
            threading.Thread(target=_write, args=write, daemon=True),
        ]
        for thread in threads:
            thread.start()
        return threads

    def _read(
        self,
        source: socket.socket,
        target: socket.socket,
        way: _Way,
        pieces: Pieces,
        broken: threading.Event,
    ) -> None:
        while True:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            arrives = way.pass_on(len(data), self._conditions) if data else 0.0
            if data and self._resets_now():
                _break(source, target, broken)
            pieces.put((arrives, data))
            if not data:
                return

    def _until_reset(self) -> float:
        every = self._conditions.reset_every
        return every * self._random.uniform(0.5, 1.5) if every else float("inf")

    def _resets_now(self) -> bool:
        if time.monotonic() < self._next_reset:
            return False
        self._next_reset = time.monotonic() + self._until_reset()
        self.resets += 1
        return True


def _write(
    source: socket.socket, target: socket.socket, pieces: Pieces, broken: threading.Event
) -> None:
    while True:
        arrives, data = pieces.get()  # to the end, or the reader would wait for room for ever
        time.sleep(max(0.0, arrives - time.monotonic()))
        try:
            if data and not broken.is_set():
                target.sendall(data)
            elif not broken.is_set():
                target.shutdown(socket.SHUT_WR)
        except OSError:
            _break(source, target, broken)
        if not data:
            return


def _break(farm: socket.socket, server: socket.socket, broken: threading.Event) -> None:
    """Have both ends of a connection reset, instead of ended, when they are closed."""
    broken.set()
    for one in (farm, server):
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.shutdown(socket.SHUT_RD)  # wakes whoever reads; sends nothing
