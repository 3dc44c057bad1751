"""Answers a SuperNode's idle polls on this machine, so that most of them cost the link nothing.

Flower's SuperNode asks for work every 3 s, with a kilobyte of headers; that interval is fixed. Here
its HTTP/1.1 requests are passed on one by one; a poll is answered with what the last one brought,
as long as that was "nothing" and is younger than ``poll_seconds``. Everything else goes through at
once. Whatever is not plain HTTP is passed on as it is from there on.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

POLL = b"POST /v1/fleet/pull-messages "
NOTHING_BYTES = 100
"""An answer without a message is shorter; one with a message names it by ids and digests."""
PIECE_BYTES = 4096
STALE_SECONDS = 2.0
"""A web server ends a connection that was silent for some seconds: better not to rely on it."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]
Count = Callable[[int, bool], None]


class NotPlainError(Exception):
    """What follows cannot be told apart into messages."""


@dataclass(frozen=True)
class Head:
    """The first lines of an HTTP message, up to the empty one."""

    data: bytes

    @property
    def poll(self) -> bool:
        """Whether it asks for work."""
        return self.data.startswith(POLL)

    @property
    def ok(self) -> bool:
        """Whether it is an answer of status 200."""
        return self.data.split(b"\r\n", 1)[0].split(b" ")[1:2] == [b"200"]

    @property
    def plain(self) -> bool:
        """Whether it says how long its body is."""
        try:
            return self.length >= 0
        except NotPlainError:
            return False

    @property
    def length(self) -> int:
        """Bytes of the body.

        Raises:
            NotPlainError: it does not say so.
        """
        fields = self.data.lower().split(b"\r\n")[1:]
        named = dict(field.split(b":", 1) for field in fields if b":" in field)
        length = named.get(b"content-length", b"").strip()
        if b"transfer-encoding" in named or b"upgrade" in named or not length.isdigit():
            raise NotPlainError
        return int(length)


class Polls:
    """What all connections of a farm know of its last poll.

    Args:
        seconds: for which "nothing to do" is believed.
        clock: seconds that only ever grow.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._nothing: tuple[float, bytes] | None = None

    def answer(self) -> bytes | None:
        """The whole answer to a poll; None when the server has to be asked."""
        if self._nothing is None or self._clock() >= self._nothing[0] + self._seconds:
            return None
        return self._nothing[1]

    def learn(self, head: Head, body: bytes | None) -> None:
        """What a poll brought; ``body`` None: more than nothing."""
        nothing = head.ok and body is not None
        self._nothing = (self._clock(), head.data + (body or b"")) if nothing else None


async def serve(
    near: Streams, connect: Connect, polls: Polls, count: Count, stale: float = STALE_SECONDS
) -> Streams | None:
    """Pass requests on until the SuperNode ends the connection.

    Args:
        near: streams from and to the SuperNode.
        connect: opens a connection to the server.
        polls: shared by the connections of a farm.
        count: told of bytes at the server's side, and whether they go up.
        stale: seconds after which a silent connection to the server is not relied on.

    Returns:
        None at the end, or the server's streams from which on both ways are to be copied as they
        are, because what comes is not plain HTTP.

    Raises:
        OSError: one of the two sides is gone.
    """
    reader, writer = near
    far: Streams | None = None
    used = 0.0
    try:
        while (head := await _head(reader)) is not None:
            known = polls.answer() if head.poll and head.plain else None
            if known is not None:
                await _exactly(reader, head.length)
                writer.write(known)
                await writer.drain()
                continue
            if far is None or time.monotonic() > used + stale:
                _abort(far)
                far = await connect()
            raw = await _exchange(head, near, far, polls, count)
            if raw:
                kept, far = far, None
                return kept
            used = time.monotonic()
        return None
    finally:
        _abort(far)


async def _exchange(request: Head, near: Streams, far: Streams, polls: Polls, count: Count) -> bool:
    """One request and its answer; whether the rest of the connection is to be copied as it is."""
    try:
        await _send(request.data, far[1], count, up=True)
        await _body(near[0], far[1], request.length, count, up=True)
        answer = await _head(far[0])
        if answer is None:
            raise ConnectionResetError("the server ended the connection without an answer")
        count(len(answer.data), False)
        near[1].write(answer.data)
        short = request.poll and answer.length < NOTHING_BYTES
        body = await _body(far[0], near[1], answer.length, count, up=False)
    except NotPlainError:
        return True
    if request.poll:
        polls.learn(answer, body if short else None)
    return False


async def _head(reader: asyncio.StreamReader) -> Head | None:
    """The next message's first lines, or None at the end of the stream."""
    try:
        return Head(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ConnectionResetError("the connection ended within a message") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise ConnectionResetError("a message with endless headers") from error


async def _send(data: bytes, writer: asyncio.StreamWriter, count: Count, up: bool) -> None:
    count(len(data), up)  # first: who has received it may ask for the count
    writer.write(data)
    await writer.drain()


async def _body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int, count: Count, up: bool
) -> bytes:
    """Pass a body on; its last piece is returned, which is all of a short one."""
    piece = b""
    while length:
        piece = await _exactly(reader, min(length, PIECE_BYTES))
        length -= len(piece)
        await _send(piece, writer, count, up)
    return piece


async def _exactly(reader: asyncio.StreamReader, length: int) -> bytes:
    try:
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("the connection ended within a body") from error


def _abort(streams: Streams | None) -> None:
    if streams is not None:
        streams[1].transport.abort()
