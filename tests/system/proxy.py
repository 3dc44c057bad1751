"""A loopback HTTP proxy between SuperNodes and the SuperLink: keeps what passes, or spoils it."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

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

    ``suffered`` counts the answers by request name and fate, without those that passed.
    """

    def __init__(self, host: str, port: int, choose: Choose = unharmed) -> None:
        self._lock = threading.Lock()
        self._choose, self._exchanges = choose, list[Exchange]()
        self.suffered: Counter[tuple[str, Fate]] = Counter()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(host, port, self._decide))
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

    def take(self) -> list[Exchange]:
        """What has passed since the last call."""
        with self._lock:
            taken, self._exchanges = self._exchanges, []
        return taken


def _handler(
    host: str, port: int, decide: Callable[[Exchange], Fate]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
