"""Counts every byte between a farm and its server: a TCP relay on this machine.

The SuperNode speaks to the relay, the relay to the server. What it counts is TCP payload at the
server's side, in both directions: all that Flower sends, with its polls, heartbeats and HTTP
headers, also what is sent again after a lost connection. TCP and IP headers (about 3 % of large
transfers, 80 bytes per poll), retransmissions and name look-ups are not in it.

Where the server is on another machine, what is sent to it is encrypted here (client/door.py), so
that the SuperNode need not know. The counters then are of what is encrypted: TLS adds 22 bytes to
each piece and 3 kB to each new connection.

The counters go on over the farm's life. They are written at most once a second while messages
move, once a minute while there are polls alone, and when the relay ends; a power cut loses no more.
"""

import asyncio
import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from client.door import explain
from client.polls import STALE_SECONDS, Polls, Streams, serve
from client.traffic import Counters, keep, resume
from common.errors import DiskError, LaunchError, StateError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
CONNECT_SECONDS = 10.0
LINGER_SECONDS = 60.0
"""How long one side may stay silent after the other has ended its half."""
SAVE_SECONDS = 1.0
IDLE_SAVE_SECONDS = 60.0
"""Polls on a connection that stays are not worth a write every second: memory cards wear out."""
START_SECONDS = 10.0
TLS_STALE_SECONDS = 60.0
"""The door keeps a silent connection for longer, and a new one costs 3 kB."""
CHUNK_BYTES = 65_536
BODY_BYTES = 2_000
"""More than this in one direction, before the other answers, carries the body of a message: polls,
heartbeats, registrations and what answers them have at most 1,100 with their headers."""


class Relay:
    """Passes bytes on to the server while its context is open; works in a thread of its own.

    Args:
        server: ``host:port``.
        state_dir: of the farm; its counters are kept there.
        poll_seconds: how long a poll that brought nothing is good for; None: for itself alone.
        tls: makes what connections are encrypted with; None: they are not. Raises StateError.
    """

    def __init__(
        self,
        server: str,
        state_dir: Path,
        poll_seconds: float | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._tls = tls
        self._polls = None if poll_seconds is None else Polls(poll_seconds)
        host, _, port = server.rpartition(":")
        self._server, self._host, self._port = server, host, int(port)
        self._state_dir = state_dir
        counters = resume(state_dir)
        self._sent, self._received = counters.sent, counters.received
        self._kept = counters
        self._saving = threading.Lock()
        self._reachable, self._writable = True, True
        self._body_at: float | None = None
        self._passing = set[asyncio.Task[None]]()
        self._ended, self._moved = asyncio.Event(), asyncio.Event()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self.address = ""

    def __enter__(self) -> Self:
        """Listen; ``address`` says where.

        Raises:
            LaunchError: this machine gives no port.
        """
        self._thread.start()
        self._started.wait(START_SECONDS)
        if not self.address:
            raise LaunchError(f"the relay to {self._server} did not start: {self._failure}")
        return self

    def __exit__(self, *_error: object) -> None:
        """End every connection and write the counters."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    @property
    def counters(self) -> Counters:
        """Bytes of the farm's life."""
        return Counters(sent=self._sent, received=self._received)

    def body_since(self, moment: float) -> bool:
        """Whether more than a poll has passed since this moment (``time.monotonic``)."""
        return self._body_at is not None and self._body_at >= moment

    # --- in the relay's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        listener = await asyncio.start_server(self._accept, HOST, 0)
        self.address = f"{HOST}:{listener.sockets[0].getsockname()[1]}"
        self._started.set()
        saving = asyncio.create_task(self._save_regularly())
        await self._ended.wait()
        listener.close()
        ending = [saving, *self._passing]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._save()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass_on(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its last."""
        connection = _Connection(self)
        try:
            far = await self._far_end((reader, writer), connection)
        except OSError as error:  # also a timeout
            self.tell_fault(error)
            writer.transport.abort()  # Flower tries again, as after a refused connection
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        if far is None:
            await _close(writer)
            return
        far_reader, far_writer = far
        ways = {
            asyncio.create_task(connection.copy(reader, far_writer, up=True)),
            asyncio.create_task(connection.copy(far_reader, writer, up=False)),
        }
        try:
            if await connection.through(ways):
                await asyncio.gather(_close(writer), _close(far_writer))
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, far_writer):
                end.transport.abort()  # no harm where it is closed already

    async def _far_end(self, near: Streams, connection: "_Connection") -> Streams | None:
        """The server's streams, to be copied from and to; None when all is done already."""
        if self._polls is None:
            return await self._connect()
        stale = STALE_SECONDS if self._tls is None else TLS_STALE_SECONDS
        return await serve(near, self._connect, self._polls, connection.count, stale)

    async def _connect(self) -> Streams:
        try:
            tls = None if self._tls is None else self._tls()
            async with asyncio.timeout(CONNECT_SECONDS):
                streams = await asyncio.open_connection(self._host, self._port, ssl=tls)
        except (OSError, StateError) as error:
            self._tell_reachable(False, error)
            raise ConnectionError(str(error)) from error
        self._tell_reachable(True)
        return streams

    def tell_fault(self, error: BaseException | None) -> None:
        """Say it once when the server ends a connection because of its certificate."""
        if isinstance(error, ssl.SSLError) and "ALERT" in str(error).upper():
            self._tell_reachable(False, error)

    def count(self, size: int, up: bool, body: bool) -> None:
        """Bytes that have reached this machine's or the server's side of the link."""
        if up:
            self._sent += size
        else:
            self._received += size
        if body:
            self._body_at = time.monotonic()
        self._moved.set()

    def _tell_reachable(self, reachable: bool, why: Exception | None = None) -> None:
        if reachable and not self._reachable:
            log.info("the server at %s is reached again", self._server)
        if not reachable and self._reachable:
            log.warning("%s", explain(why, self._server) if why else self._server)
        self._reachable = reachable

    # --- counters on disk ------------------------------------------------------------------

    async def _save_regularly(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            await asyncio.to_thread(self._save)  # a slow disk holds up no connection
            saved = time.monotonic()
            while time.monotonic() < saved + IDLE_SAVE_SECONDS:
                await asyncio.sleep(SAVE_SECONDS)
                if self.body_since(saved) or not self._passing:
                    break

    def _save(self) -> None:
        with self._saving:  # the last time may come while the one before is still writing
            counters = self.counters
            if counters == self._kept:
                return
            try:
                keep(self._state_dir, counters)
            except DiskError as error:
                if self._writable:
                    log.error("bytes at the socket are counted, but not kept: %s", error)
                self._writable = False
                return
            self._kept, self._writable = counters, True


class _Connection:
    """Both ways of one connection."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._moved = 0
        self._up, self._run = True, 0

    async def copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool
    ) -> None:
        """One way: until its sender ends it, and then its receiver is told."""
        while data := await reader.read(CHUNK_BYTES):
            self.count(len(data), up)  # first: who has received it may ask for the count
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()  # TLS has no half of a connection

    async def through(self, ways: set[asyncio.Task[None]]) -> bool:
        """Wait for the end of both ways; returns whether both were ended in order.

        A way whose sender has gone without a word is given up: the one that hears of it first is
        the other side, which then ends its own way.
        """
        waiting = ways
        limit: float | None = None
        while waiting:
            before = self._moved
            done, waiting = await asyncio.wait(
                waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            limit = LINGER_SECONDS
            faults = [way.exception() for way in done]
            if any(fault is not None for fault in faults):
                self._relay.tell_fault(faults[0])
                return False  # torn off on one side: the other is to learn of it at once
            if not done and self._moved == before:
                return False
        return True

    def count(self, size: int, up: bool) -> None:
        """Bytes at the server's side."""
        self._run = size if up != self._up else self._run + size
        self._up = up
        self._moved += size
        self._relay.count(size, up, body=self._run > BODY_BYTES)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close behind what is still to be written; its reader may not want it any more."""
    writer.close()
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            await writer.wait_closed()
    except OSError:
        pass
