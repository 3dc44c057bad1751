"""Ports of a server: free, held by its own programs, or taken by something else."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
from cryptography import x509

from common.certificates import UNREADABLE, parse_certificate
from common.checkup import ANSWER_SECONDS, near, port, shows
from common.config import ServerConfig
from common.diagnosis import Finding, fault, of_error, ok
from common.door import DoorConfig
from common.errors import ConfigError, ProtocolError
from common.ports import holder
from common.processes import require_loopback
from common.services import require_near
from server.members import address_of
from server.proxy import UNTOLD


def ports(config: ServerConfig, folder: Path) -> Iterator[Finding]:
    """Each port that the settings name."""
    link = config.server
    yield from _tried(partial(require_loopback, link.host, "[server] host"))
    yield port("[server]", link.host, link.port, partial(_superlink, link.host, link.port, folder))
    for setting, open_ in (("[door]", config.door), ("[hub]", config.hub)):
        if open_ is not None:
            yield from _tried(partial(address_of, open_, setting))
            proxied = isinstance(open_, DoorConfig) and open_.proxy_port is not None
            first = UNTOLD if proxied else b""
            where = open_.host, open_.port
            ours = partial(_shows_certificate, *where, folder / "identity", first)
            yield port(setting, open_.host, open_.port, ours)
    if config.door is not None and config.door.proxy_port is not None:
        yield from _before(config.door, config.door.proxy_port, folder / "identity")
    for setting, shown in (("[metrics]", config.metrics), ("[page]", config.page)):
        if shown is not None:
            yield from _tried(partial(require_near, shown, setting))
            ours = partial(_healthy, shown.host, shown.port, folder)
            yield port(setting, shown.host, shown.port, ours)


def _tried(require: Callable[[], object]) -> Iterator[Finding]:
    try:
        require()
    except ConfigError as error:
        yield of_error("settings", error)


def _before(door: DoorConfig, number: int, identity: Path) -> Iterator[Finding]:
    """Whether the proxy before a door that runs leads to it."""
    if not _shows_certificate(door.host, door.port, identity, UNTOLD):
        return
    what = f"port {number}"
    if _shows_certificate(door.host, number, identity, b""):
        yield ok(what, "of [door] proxy_port leads to the door")
    else:
        found = "of [door] proxy_port does not lead to the door, so no farm comes in"
        yield fault(what, found, "start the proxy before the door, or take proxy_port away")


def _superlink(host: str, number: int, folder: Path) -> bool:
    return shows(host, number, "/health", "") and _of(number, folder)


def _healthy(host: str, number: int, folder: Path) -> bool:
    return shows(host, number, "/healthz", "ok") and _of(number, folder)


def _of(number: int, folder: Path) -> bool:
    """Whether the program there works in this folder; also where this user may not know."""
    process, whole = holder(number), folder.resolve()
    if process is None:
        return True
    try:
        where = Path(process.cwd())
        paths = [(where / word).resolve() for word in process.cmdline() if len(word) < 4096]
    except (psutil.Error, OSError, ValueError):
        return True
    return any(path.is_relative_to(whole) for path in paths)


def _said(host: str, number: int, first: bytes) -> socket.socket:
    line = socket.create_connection((near(host), number), ANSWER_SECONDS)
    line.sendall(first)
    return line


def _shows_certificate(host: str, number: int, identity: Path, first: bytes) -> bool:
    """Whether who listens there has the key of this server's certificate.

    ``first`` is said before TLS begins, to one that expects a proxy.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with contextlib.suppress(OSError, ProtocolError, *UNREADABLE):
        own = parse_certificate((identity / "server.crt").read_bytes(), "the server's")
        with (
            _said(host, number, first) as line,
            context.wrap_socket(line) as tls,
        ):
            shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
        return shown.public_key() == own.public_key()
    return False
