"""A front door that really listens, in a thread of the test, and a SuperLink that takes notes."""

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, TypeAlias

from client.door import Conversation, Way
from client.identity import FarmIdentity
from common.config import ServerConfig
from common.door import DoorConfig
from common.errors import FieldfedError
from common.membership import Membership
from common.processes import free_port
from server.door import Door
from server.identity import Authority
from server.members import authority_of, member_of

NETWORK = "orchard"
START_SECONDS = 20.0


@dataclass
class Heard:
    """A request that has come through."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Link:
    """What stands behind the door: answers with what it heard last, or what a test has set."""

    heard: list[Heard] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)
    port: int = 0

    @contextmanager
    def running(self) -> Iterator["Link"]:
        """Listen while the context is open."""
        link = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                link.heard.append(Heard(self.command, self.path, dict(self.headers.items()), body))
                answer = link.answers.get(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.send_header("Connection", "keep-alive")
                self.send_header("X-Secret", "of the inside")
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_HEAD = do_PUT = do_DELETE = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # type: ignore[method-assign]
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


Before: TypeAlias = Callable[[DoorConfig, Path], AbstractContextManager[None]]
"""Runs a TCP proxy before a door of these settings; the folder is for its files."""


class LabDoor:
    """The door of a server's folder; ``limits`` are settings of it.

    ``before`` is what stands before every one of them: nothing, or a proxy.
    """

    before: ClassVar[tuple[Before, ...]] = ()

    def __init__(self, folder: Path, link: Link, **limits: float) -> None:
        self.folder, self.link = folder, link
        door = {"host": "127.0.0.1", "port": free_port()} | limits
        if self.before:
            door["proxy_port"] = free_port()
        server = {"name": NETWORK, "port": link.port or free_port()}
        self.config = ServerConfig.model_validate({"server": server, "door": door})
        assert self.config.door is not None
        self.port = self.config.door.outside_port
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"https://{self.address}"

    @property
    def authority(self) -> Authority:
        """Of the network."""
        return authority_of(self.config, self.folder)

    def identity(self, farm: str = "apple") -> FarmIdentity:
        """The key of a farm's device; no certificate yet."""
        return FarmIdentity.create(self.folder / "farms" / farm, farm)

    def member(self, farm: str = "apple") -> FarmIdentity:
        """A farm with a certificate, given by hand."""
        identity = self.identity(farm)
        given = member_of(self.config, self.folder, identity.request())
        accept(identity, given)
        return identity

    def way(self, farm: str = "apple") -> Way:
        """A member's way in."""
        return Way(self.address, self.member(farm).tls)

    def conversation(self, farm: str = "apple") -> Conversation:
        """A connection of a member, to be opened."""
        return Conversation(self.address, self.member(farm).tls())

    @contextmanager
    def running(self) -> Iterator["LabDoor"]:
        """Let farms in while the context is open."""
        with self._open(), ExitStack() as stack:
            for before in self.before:
                assert self.config.door is not None
                stack.enter_context(before(self.config.door, self.folder / "before"))
            yield self

    @contextmanager
    def _open(self) -> Iterator[None]:
        loop, ready = asyncio.new_event_loop(), threading.Event()
        until, failed = asyncio.Event(), list[FieldfedError]()

        async def serve() -> None:
            try:
                await Door(self.config, self.folder).serve(until, ready.set)
            except FieldfedError as error:
                failed.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        try:
            assert ready.wait(START_SECONDS)
            if failed:
                raise failed[0]
            yield
        finally:
            if not failed:
                loop.call_soon_threadsafe(until.set)
            thread.join(START_SECONDS)
            loop.close()


def accept(identity: FarmIdentity, given: Membership) -> None:
    """A device takes what it was given."""
    identity.accept(given.certificate.encode(), given.authority.encode())


def stranger() -> ssl.SSLContext:
    """TLS without a certificate of one's own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
