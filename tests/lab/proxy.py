"""A TCP proxy before a door: a thread of the test, which says what a test has it say."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from common.door import DoorConfig

LINE = b"PROXY TCP4 203.0.113.7 192.0.2.1 51342 443\r\n"


class Saying:
    """A proxy that says one line before what it passes on, whoever calls."""

    def __init__(self, line: bytes = LINE) -> None:
        self.line = line

    @contextmanager
    def before(self, config: DoorConfig, _folder: Path) -> Iterator[None]:
        """Pass on what comes while the context is open, as LabDoor has it."""
        assert config.proxy_port is not None
        with socket.create_server((config.host, config.proxy_port)) as listening:
            thread = Thread(target=self._accept, args=(listening, config), daemon=True)
            thread.start()
            yield
            listening.shutdown(socket.SHUT_RDWR)
        thread.join()

    def _accept(self, listening: socket.socket, config: DoorConfig) -> None:
        with suppress(OSError):
            while True:
                outside, _ = listening.accept()
                Thread(target=self._pass_on, args=(outside, config), daemon=True).start()

    def _pass_on(self, outside: socket.socket, config: DoorConfig) -> None:
        with outside, socket.create_connection((config.host, config.port)) as inside:
            inside.sendall(self.line)
            back = Thread(target=_pump, args=(inside, outside), daemon=True)
            back.start()
            _pump(outside, inside)
            back.join()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65_536):
            other.sendall(data)
    with suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)
