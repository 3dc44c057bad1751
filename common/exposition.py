"""Figures over HTTP on this machine, as Prometheus asks for them.

    /metrics    what a collector yields, as text or OpenMetrics
    /healthz    200 while this process answers
    /readyz     200 where the owner is ready, else 503 and why; absent where nobody says

Nothing is counted here: a collector (server/metrics.py, client/figures.py) looks when it is asked.
"""

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from common.errors import LaunchError
from common.services import MetricsConfig, require_near

log = logging.getLogger(__name__)

REQUEST_SECONDS = 30.0
"""After which a connection is cut, whatever goes on there."""
MOST_REQUESTS = 8
"""At once; further connections are closed."""


class MetricsServer(ThreadingTCPServer):
    """Listens once it is made; ``serve_forever`` answers until ``shutdown``.

    Args:
        config: where to listen.
        collector: yields the families, in the thread of whoever asks, and raises nothing.
        ready: raises when the owner is not ready; without it there is no ``/readyz``.

    Raises:
        ConfigError: others than this machine would be listened for.
        LaunchError: something else listens there.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, config: MetricsConfig, collector: Collector, ready: Callable[[], None] | None = None
    ) -> None:
        require_near(config, "[metrics]")
        self.collector, self.ready = collector, ready
        self._places = threading.BoundedSemaphore(MOST_REQUESTS)
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise LaunchError(
                f"metrics cannot be shown on {config.host}:{config.port}: {error.strerror}; stop "
                "what listens there, or choose another port in [metrics]"
            ) from error
        log.info("figures are at http://%s:%d/metrics", config.host, config.port)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, where one is free."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and cut the connection should that take too long."""
        end = threading.Timer(REQUEST_SECONDS, _cut, [request])
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Whoever asked has gone or was cut off, or there is a fault of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a request was not answered")


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version, sys_version = "fieldfed", ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer; what follows a question mark is ignored."""
        answers = {"/metrics": self._metrics, "/healthz": self._healthy}
        if self.server.ready is not None:
            answers["/readyz"] = self._ready
        path = urlsplit(self.path).path
        if path in answers:
            answers[path]()
        else:
            self._say(HTTPStatus.NOT_FOUND, f"only {', '.join(answers)} are here")

    do_HEAD = do_GET  # noqa: N815

    def _not_allowed(self) -> None:
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _not_allowed  # noqa: N815

    def _metrics(self) -> None:
        try:
            encode, kind = choose_encoder(", ".join(self.headers.get_all("Accept", [])))
        except (TypeError, ValueError):  # what it does with a version that is none
            encode, kind = choose_encoder("")
        self._send(HTTPStatus.OK, encode(self.server.collector), {"Content-Type": kind})

    def _healthy(self) -> None:
        self._say(HTTPStatus.OK, "ok")

    def _ready(self) -> None:
        try:
            if self.server.ready is not None:
                self.server.ready()
        except Exception as error:  # a damaged store may raise anything
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, " ".join(str(error).split()))
        else:
            self._say(HTTPStatus.OK, "ok")

    def _say(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        kind = {"Content-Type": "text/plain; charset=utf-8"}
        self._send(status, f"{text}\n".encode(), kind | dict(headers or {}))

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: Prometheus asks every few seconds."""
