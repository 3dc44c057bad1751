"""What a service manager hears, on a real socket."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common import notify
from common.processes import Child, Supervisor


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a manager that listens."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.settimeout(20)
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_ready_alive_and_stopping(manager: socket.socket) -> None:
    assert notify.ready("farm apple")
    assert manager.recv(1000) == b"READY=1\nSTATUS=farm apple"
    assert notify.alive()
    assert manager.recv(1000) == b"WATCHDOG=1"
    assert notify.stopping()
    assert manager.recv(1000) == b"STOPPING=1"


def test_a_status_of_several_lines_says_nothing_else(manager: socket.socket) -> None:
    notify.ready("farm\nSTOPPING=1")
    assert manager.recv(1000) == b"READY=1\nSTATUS=farm STOPPING=1"


def test_an_abstract_socket_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"fieldfed-test-{os.getpid()}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.settimeout(20)
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert notify.alive()
        assert listener.recv(1000) == b"WATCHDOG=1"


@pytest.mark.parametrize("value", ["", "relative", "vsock:2:1234", "/nobody/listens/here"])
def test_nothing_is_said_where_nobody_listens(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify.alive()


def test_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.ready("farm apple")


def test_a_supervisor_is_alive_as_long_as_it_looks(manager: socket.socket, tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Supervisor(watch_seconds=0.01) as supervisor:
        supervisor.start(Child("sleeper", lambda: program, tmp_path / "log"))
        assert manager.recv(1000) == b"WATCHDOG=1"
        assert manager.recv(1000) == b"WATCHDOG=1"
    heard = b""
    while heard != b"STOPPING=1":
        heard = manager.recv(1000)


def test_a_supervisor_that_is_stuck_is_not_alive(manager: socket.socket) -> None:
    with Supervisor(watch_seconds=0.01) as supervisor:
        assert manager.recv(1000) == b"WATCHDOG=1"
        with supervisor._lock:  # as while a restart hangs
            manager.settimeout(0.5)
            with pytest.raises(TimeoutError):
                while True:
                    manager.recv(1000)
