"""The executor forks a child for every messenger; where it does not answer, the program works."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import messenger
from client.launch import executor
from common.programs import flower_home, programs_of
from tests.waiting import wait_until

# What client.executor.main does, with a print in place of Flower's program.
_EXECUTOR = """
import os, sys
from pathlib import Path
from client.executor import listen, next_work, write_output_to
arguments = next_work(listen(Path(sys.argv[1])))
write_output_to(Path(sys.argv[2]))
print(os.getppid(), *arguments, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose path is longer than the path of a socket may be."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    return folder


@pytest.fixture
def running(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _EXECUTOR, str(folder), str(tmp_path / "work.log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        wait_until((folder / messenger.SOCKET).exists, 30, "a socket")
        time.sleep(0.1)  # from bind to listen
        yield process
        process.kill()


def _send(folder: Path, *arguments: str) -> int:
    command = [sys.executable, "-I", "-S", messenger.__file__, str(folder), *arguments]
    return subprocess.run(command, timeout=60, check=False).returncode


def _lines(log_file: Path) -> list[str]:
    return log_file.read_text().splitlines() if log_file.exists() else []


def _wait_for_lines(log_file: Path, count: int) -> None:
    wait_until(lambda: len(_lines(log_file)) == count, 30, f"{count} lines of work")


def test_each_messenger_gets_a_child_of_the_same_executor(
    running: subprocess.Popen[bytes], folder: Path, tmp_path: Path
) -> None:
    assert _send(folder, "--token", "first word") == 0
    _wait_for_lines(tmp_path / "work.log", 1)
    assert _send(folder) == 0
    _wait_for_lines(tmp_path / "work.log", 2)
    assert _lines(tmp_path / "work.log") == [f"{running.pid} --token first word", f"{running.pid}"]


@pytest.mark.parametrize("words", [b"no json\n", b'{"a": 1}\n', b"[1]\n", b"[]", b"[" * 70_000])
def test_what_is_no_messenger_is_sent_away_and_the_next_is_served(
    running: subprocess.Popen[bytes], folder: Path, tmp_path: Path, words: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as connection, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        connection.connect(messenger.SOCKET)
        connection.settimeout(30)
        try:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass  # sent away before all was read
    assert _send(folder, "again") == 0
    _wait_for_lines(tmp_path / "work.log", 1)
    assert running.poll() is None


def test_a_messenger_without_an_executor_fails_so_that_the_program_does_the_work(
    running: subprocess.Popen[bytes], folder: Path, tmp_path: Path
) -> None:
    running.kill()
    running.wait()
    assert (folder / messenger.SOCKET).exists()
    assert _send(folder) == 1  # nobody listens there any more
    (folder / messenger.SOCKET).unlink()
    assert _send(folder) == 1
    assert _send(tmp_path / "missing") == 1


def test_the_program_of_a_farm_works_without_its_executor(tmp_path: Path) -> None:
    child = executor(tmp_path, {})
    assert child.name == "executor"
    assert flower_home(tmp_path).stat().st_mode & 0o077 == 0
    done = subprocess.run([programs_of(tmp_path) / "flwr-clientapp", "--help"], timeout=120)
    assert done.returncode == 0
    assert "Run a Flower ClientApp" in (tmp_path / "logs" / "clientapp.log").read_text()
