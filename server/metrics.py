"""Figures for Prometheus, read from what is on disk whenever they are asked for.

    python -P -m server.metrics FOLDER

    /metrics    the families of server/families.py, as text or OpenMetrics
    /healthz    200 while this process answers
    /readyz     200 when the store can be opened and its newest commit read, else 503 and why

A process of its own that only reads: nothing else has to count, and a restart loses nothing. A
source that cannot be read is left out and named by ``fieldfed_up_source``; the others are shown.
"""

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common import logs
from common.config import MetricsConfig, ServerConfig
from common.errors import ConfigError, FieldfedError, LaunchError
from common.processes import require_loopback, terminate_like_interrupt
from common.settings import load_settings
from server import families
from server.figures import Figures, RegistryFigures, reading
from server.identity import expiries

log = logging.getLogger("server.metrics")  # also where this module is the program

REQUEST_SECONDS = 30.0
"""After which a connection is cut, whatever goes on there."""
MOST_REQUESTS = 8
"""At once; further connections are closed."""

STORE: Mapping[str, Callable[[Figures], Iterable[Metric]]] = {
    "runs": families.of_runs,
    "replies": families.of_replies,
    "farms": families.of_farms,
    "model": families.of_model,
    "store": families.of_store,
}
"""Sources that lie in the store: a damaged table takes away no more than what it tells."""

Read = TypeVar("Read")


# --- what is shown -------------------------------------------------------------------------------


class StateCollector(Collector):
    """Every family of a server's folder."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._faults: dict[str, str] = {}

    def collect(self) -> list[Metric]:
        """Read everything now; what cannot be read is logged and left out."""
        found: dict[str, list[Metric] | None] = {}
        with contextlib.ExitStack() as opened:
            store = self._tried("database", lambda: opened.enter_context(self._figures()))
            for name, read in STORE.items():
                found[name] = (
                    None if store is None else self._tried(name, partial(_all, read, store))
                )
        found["registry"] = self._tried("registry", self._registry)
        found["certificates"] = self._tried("certificates", self._certificates)
        shown = [family for source in found.values() for family in source or ()]
        up = {name: source is not None for name, source in found.items()}
        return [families.build_info(), *shown, families.sources_up(up)]

    def require_ready(self) -> None:
        """Raises StateError when there is no store, or its newest commit cannot be read."""
        with self._figures() as figures:
            figures.last_commit()
            run = figures.newest_run()
            if run is not None:
                figures.mask_now(run)

    def _figures(self) -> contextlib.AbstractContextManager[Figures]:
        return reading(Figures, self._state_dir / "fieldfed.db")

    def _registry(self) -> list[Metric]:
        with reading(RegistryFigures, self._state_dir / "registry" / "registry.db") as figures:
            return list(families.of_registry(figures))

    def _certificates(self) -> list[Metric]:
        return list(families.of_certificates(expiries(self._state_dir / "identity")))

    def _tried(self, name: str, read: Callable[[], Read]) -> Read | None:
        """What ``read`` yields; None where it raises, which is logged when it is news."""
        try:
            value = read()
        except Exception as error:  # whatever damage does to one source, the others are shown
            known = isinstance(error, FieldfedError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
            if self._faults.get(name) != why:
                log.warning("no figures of '%s': %s", name, why)
            self._faults[name] = why
            return None
        if self._faults.pop(name, None) is not None:
            log.info("figures of '%s' can be read again", name)
        return value


def _all(read: Callable[[Figures], Iterable[Metric]], figures: Figures) -> list[Metric]:
    return list(read(figures))


# --- over HTTP -----------------------------------------------------------------------------------


class MetricsServer(ThreadingTCPServer):
    """Listens once it is made; ``serve_forever`` answers until ``shutdown``."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, config: MetricsConfig, state_dir: Path) -> None:
        require_loopback(config.host, "[metrics] host")
        self.collector = StateCollector(state_dir)
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
        answers = {"/metrics": self._metrics, "/healthz": self._healthy, "/readyz": self._ready}
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
            self.server.collector.require_ready()
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


def _main(folder: Path) -> None:
    config = load_settings(ServerConfig, folder / "server.toml").metrics
    if config is None:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [metrics]; add that line there")
    with (
        contextlib.suppress(KeyboardInterrupt),
        terminate_like_interrupt(),
        MetricsServer(config, folder) as server,
    ):
        server.serve_forever()


if __name__ == "__main__":
    logs.start_logging()
    try:
        _main(Path(sys.argv[1]))
    except FieldfedError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
