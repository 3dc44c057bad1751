"""Who calls, where a TCP proxy stands before a listener: the PROXY protocol, version 1.

nginx, HAProxy and others put one line before what they pass on, which says whose connection it is
(``PROXY TCP4 203.0.113.7 192.0.2.1 51342 443``); all after it is the caller's own TLS, which the
proxy cannot read. The line is believed, so only a proxy may reach such a listener.
https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial

from common.errors import ProtocolError

log = logging.getLogger("server.door")

LINE_BYTES = 107
"""The longest line that version 1 knows, with its end."""
LINE_SECONDS = 15.0
BACKLOG = 2048
REST_SECONDS = 1.0
UNKNOWN = "unknown"
UNTOLD = b"PROXY UNKNOWN\r\n"
"""From the proxy's own machine, for nobody else."""


def announced(line: bytes) -> str:
    """The caller's address, as a line says it with its end; UNKNOWN where it says that it is not.

    Raises:
        ProtocolError: this is no such line.
    """
    words = line.removesuffix(b"\r\n").decode("ascii", "replace").split(" ")
    if not line.endswith(b"\r\n") or words[0] != "PROXY":
        raise ProtocolError("a connection did not come by a proxy that says who calls")
    if words[1:2] == ["UNKNOWN"]:
        return UNKNOWN
    if len(words) == 6 and words[1] in ("TCP4", "TCP6"):
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(words[2])
            if address.version == int(words[1][-1]):
                return str(address)
    raise ProtocolError("the proxy does not say who calls")


class ProxyListener:
    """Takes connections from a proxy, hears who calls, and lets TLS begin.

    Args:
        host: to listen on.
        port: to listen on.
        tls: of the listener.
        protocol: makes what handles a connection of an address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext,
        protocol: Callable[[str], asyncio.Protocol],
    ) -> None:
        self._tls, self._protocol = tls, protocol
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self._socket.setblocking(False)
        self._beginning: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Let callers in until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    line, _ = await loop.sock_accept(self._socket)
                except OSError as error:  # too many open files, for example: it passes
                    log.error("no connection can be taken: %s", error)
                    await asyncio.sleep(REST_SECONDS)
                    continue
                task = loop.create_task(self._begin(line))
                self._beginning.add(task)
                task.add_done_callback(self._beginning.discard)
        finally:
            self._socket.close()
            for task in self._beginning:
                task.cancel()
            await asyncio.gather(*self._beginning, return_exceptions=True)

    async def _begin(self, line: socket.socket) -> None:
        line.setblocking(False)
        try:
            async with asyncio.timeout(LINE_SECONDS):
                address = announced(await _first_line(line))
            await asyncio.get_running_loop().connect_accepted_socket(
                partial(self._protocol, address), line, ssl=self._tls
            )
        except ProtocolError as error:
            log.warning("%s; set up what stands before the door, or take proxy_port away", error)
            line.close()
        except (OSError, TimeoutError):  # gone again, or no TLS of ours: as without a proxy
            line.close()
        except asyncio.CancelledError:
            line.close()
            raise


async def _first_line(line: socket.socket) -> bytes:
    """Byte by byte: what follows belongs to TLS."""
    loop, read = asyncio.get_running_loop(), b""
    while not read.endswith(b"\n") and len(read) < LINE_BYTES:
        byte = await loop.sock_recv(line, 1)
        if not byte:
            raise ConnectionResetError("it ended before it said who calls")
        read += byte
    return read
