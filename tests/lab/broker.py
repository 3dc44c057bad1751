"""A broker of a few lines that does as it is told: it acknowledges, or not, and cuts the line."""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
PING, PONG, DISCONNECT = 12, 13, 14


@dataclass(frozen=True)
class Message:
    """Something published; ``visit`` counts connects from 0."""

    visit: int
    topic: str
    payload: bytes
    retained: bool
    qos: int


@dataclass
class Visit:
    """One connect of a client."""

    line: socket.socket
    version: int
    client: str
    will: Message | None
    login: tuple[str, str] | None
    clean: bool
    left: bool = False
    filters: list[str] = field(default_factory=list)


class FakeBroker:
    """Listens on a free port of loopback, from the first line of its context to the last.

    Attributes:
        answer: the reason code of CONNACK for a protocol version; ``None`` hangs up.
        acknowledge: the reason code of PUBACK for a message; ``None`` says nothing.
        properties: of CONNACK, for MQTT 5.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.answer: Callable[[int], int | None] = lambda _version: 0
        self.acknowledge: Callable[[Message], int | None] = lambda _message: 0
        self.properties = b""
        self.visits: list[Visit] = []
        self.messages: list[Message] = []
        self.acknowledged: list[int] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._listen)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def said(self, name: str) -> list[bytes]:
        """Payloads of topics that end so, in the order in which they came."""
        return [one.payload for one in list(self.messages) if one.topic.endswith(f"/{name}")]

    def cut(self) -> None:
        """Close all lines."""
        for visit in list(self.visits):
            with contextlib.suppress(OSError):
                visit.line.shutdown(socket.SHUT_RDWR)

    def push(self, topic: str, payload: bytes, number: int) -> None:
        """Publish to the latest client, QoS 1."""
        visit = self.visits[-1]
        properties = b"\0" if visit.version == 5 else b""
        head = struct.pack("!H", len(topic)) + topic.encode() + struct.pack("!H", number)
        _send(visit.line, PUBLISH << 4 | 2, head + properties + payload)

    def dismiss(self, reason: int) -> None:
        """Send the latest client away, as MQTT 5 does."""
        _send(self.visits[-1].line, DISCONNECT << 4, bytes([reason, 0]))

    def _listen(self) -> None:
        while True:
            try:
                line, _ = self._server.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(line,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, line: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError, EOFError))
            stack.enter_context(line)
            if self._tls is not None:
                line = stack.enter_context(self._tls.wrap_socket(line, server_side=True))
            _, body = _receive(line)
            visit = _visit(line, body, len(self.visits))
            self.visits.append(visit)
            reason = self.answer(visit.version)
            if reason is None:
                return
            more = bytes([len(self.properties)]) + self.properties if visit.version == 5 else b""
            if reason == 1:  # as an old broker says it: in its own format
                more = b""
            _send(line, CONNACK << 4, bytes([0, reason]) + more)
            while not reason and not visit.left:
                self._handle(visit, *_receive(line))

    def _handle(self, visit: Visit, first: int, body: bytes) -> None:
        kind, modern = first >> 4, visit.version == 5
        if kind == PUBLISH:
            topic, rest = _text(body)
            number, rest = rest[:2], rest[2 + modern :]
            visits = [one is visit for one in self.visits].index(True)
            message = Message(visits, topic, rest, bool(first & 1), first >> 1 & 3)
            self.messages.append(message)
            reason = self.acknowledge(message)
            if reason is not None:
                more = bytes([reason, 0]) if modern and reason else b""
                _send(visit.line, PUBACK << 4, number + more)
        elif kind == SUBSCRIBE:
            topic, _ = _text(body[2 + modern :])
            visit.filters.append(topic)
            _send(visit.line, SUBACK << 4, body[:2] + b"\0" * modern + b"\1")
        elif kind == PUBACK:
            self.acknowledged.append(struct.unpack("!H", body[:2])[0])
        elif kind == PING:
            _send(visit.line, PONG << 4, b"")
        elif kind == DISCONNECT:
            visit.left = True


def _visit(line: socket.socket, body: bytes, number: int) -> Visit:
    _, rest = _text(body)
    version, flags = rest[0], rest[1]
    rest = rest[4:]
    modern = version == 5
    rest = rest[rest[0] + 1 :] if modern else rest
    client, rest = _text(rest)
    will = login = None
    if flags & 4:
        topic, rest = _text(rest[rest[0] + 1 :] if modern else rest)
        text, rest = _text(rest)
        will = Message(number, topic, text.encode(), bool(flags & 32), flags >> 3 & 3)
    if flags & 0x80:
        name, rest = _text(rest)
        login = (name, _text(rest)[0])
    return Visit(line, version, client, will, login, bool(flags & 2))


def _text(body: bytes) -> tuple[str, bytes]:
    end = 2 + int.from_bytes(body[:2])
    return body[2:end].decode(), body[end:]


def _receive(line: socket.socket) -> tuple[int, bytes]:
    first = _exactly(line, 1)[0]
    length = shift = 0
    while True:
        byte = _exactly(line, 1)[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return first, _exactly(line, length)


def _exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        some = line.recv(count - len(data))
        if not some:
            raise EOFError
        data += some
    return data


def _send(line: socket.socket, first: int, body: bytes) -> None:
    length, head = len(body), bytes([first])
    while length >= 128:
        head, length = head + bytes([length & 127 | 128]), length >> 7
    line.sendall(head + bytes([length]) + body)
