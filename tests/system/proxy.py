"""A loopback HTTP proxy between SuperNodes and the SuperLink: keeps what passes, or spoils it."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any, Self, cast

PREFIX = "/v1/fleet/"
DELAY_SECONDS = 6.0
UPSTREAM_SECONDS = 200.0


@dataclass(frozen=True)
class Exchange:
    """One HTTP request and its answer, as they were on the wire."""

    path: str
    request: bytes
    status: int
    response: bytes

    @property
    def name(self) -> str:
        """What the farm asked for, such as ``push-object``."""
        return self.path.removeprefix(PREFIX)


class Fate(Enum):
    """What becomes of an answer; the request has reached the SuperLink in every case."""

    PASS = "pass"
    DROP = "drop"
    """The connection ends without an answer."""
    DELAY = "delay"
    TRUNCATE = "truncate"
    """The connection ends in the middle of the answer."""
    REPEAT = "repeat"
    """The SuperLink sees the request twice."""


Choose = Callable[[Exchange], Fate]


def unharmed(_exchange: Exchange) -> Fate:
    """Everything passes."""
    return Fate.PASS


class Proxy:
    """Passes requests on; ``choose`` decides about every answer.

    ``suffered`` counts the answers by request name and fate, without those that passed;
    ``carried`` the bytes on the farms' side of it, "up" and "down", with the headers of HTTP.
    """

    def __init__(self, host: str, port: int, choose: Choose = unharmed) -> None:
        self._lock = threading.Lock()
        self._choose, self._exchanges = choose, list[Exchange]()
        self.suffered: Counter[tuple[str, Fate]] = Counter()
        self.carried: Counter[str] = Counter()
        handler = _handler(host, port, self._decide, self._count)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _decide(self, exchange: Exchange) -> Fate:
        with self._lock:
            self._exchanges.append(exchange)
            fate = self._choose(exchange)
            if fate is not Fate.PASS:
                self.suffered[exchange.name, fate] += 1
        return fate

    def _count(self, way: str, size: int) -> None:
        with self._lock:
            self.carried[way] += size

    def take(self) -> list[Exchange]:
        """What has passed since the last call."""
        with self._lock:
            taken, self._exchanges = self._exchanges, []
        return taken


class _Counted:
    """A file of which is counted what is read and written."""

    def __init__(self, file: Any, count: Callable[[int], None]) -> None:
        self._file, self._count = file, count

    def read(self, size: int = -1) -> bytes:
        return self._counted(self._file.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._counted(self._file.readline(size))

    def write(self, data: bytes) -> int:
        self._count(len(data))
        return int(self._file.write(data))

    def _counted(self, data: bytes) -> bytes:
        self._count(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _handler(
    host: str,
    port: int,
    decide: Callable[[Exchange], Fate],
    count: Callable[[str, int], None],
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.rfile = cast(BufferedIOBase, _Counted(self.rfile, partial(count, "up")))
            self.wfile = cast(BufferedIOBase, _Counted(self.wfile, partial(count, "down")))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            try:
                status, kind, payload = self._ask(body)
            except OSError:
                self.send_error(503)  # the SuperLink is away; Flower tries again
                return
            fate = decide(Exchange(self.path, body, status, payload))
            if fate is Fate.REPEAT:
                self._ask(body)
            if fate is Fate.DELAY:
                time.sleep(DELAY_SECONDS)
            self.close_connection = fate in (Fate.DROP, Fate.TRUNCATE)
            if fate is Fate.DROP:
                return
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            half = len(payload) // 2 if fate is Fate.TRUNCATE else len(payload)
            self.wfile.write(payload[:half])

        def _ask(self, body: bytes) -> tuple[int, str, bytes]:
            left_out = {"host", "connection", "accept-encoding", "content-length"}
            headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
            upstream = HTTPConnection(host, port, timeout=UPSTREAM_SECONDS)
            try:
                upstream.request("POST", self.path, body, headers)
                answer = upstream.getresponse()
                return answer.status, answer.getheader("content-type", ""), answer.read()
            finally:
                upstream.close()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    return Handler
