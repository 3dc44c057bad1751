"""Answers requests without starting Python anew: everything is imported once, then forked.

Flower starts the program ``flwr-clientapp`` for every message, and the imports of torch and timm
take it 4 s of CPU on a PC and far longer on a Pi. So that program is only a messenger here
(client/messenger.py): it hands its arguments to this executor, which forks a child that has all
modules in memory. Where no executor answers, the program does the work itself, as Flower means it.

The executor computes nothing and starts no threads, so that forking it is safe; parent and children
share the memory of the modules.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from client.messenger import SOCKET
from common.logs import start_logging
from common.processes import rotate

log = logging.getLogger(__name__)

READ_SECONDS = 10.0
MAX_BYTES = 65_536


def main() -> None:
    """The program ``executor FOLDER LOG``: do what messengers to ``FOLDER`` ask for."""
    start_logging()
    with listen(Path(sys.argv[1])) as listener:
        # the socket exists by now: messengers wait in line while the imports take their time
        from client import app

        app.load()
        gc.collect()
        gc.freeze()  # a collection in a child would otherwise copy every page that it looks at
        arguments = next_work(listener)
    write_output_to(Path(sys.argv[2]))
    sys.argv = ["flwr-clientapp", *arguments]
    app.main()


def listen(folder: Path) -> socket.socket:
    """A socket in a private folder, bound by a short name: its path may have 108 bytes at most."""
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(folder):
        Path(SOCKET).unlink(missing_ok=True)
        listener.bind(SOCKET)
    listener.listen(16)
    return listener


def next_work(listener: socket.socket) -> list[str]:
    """Fork a child for every messenger; returns its arguments, and only in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a child ended
    while True:
        connection, _ = listener.accept()
        with connection:
            arguments = _read(connection)
            if arguments is None:
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return arguments
            with contextlib.suppress(OSError):
                connection.sendall(b"\n")


def write_output_to(log_file: Path) -> None:
    """Append what this process prints to a log file of its own."""
    rotate(log_file)
    sys.stdout.flush()
    sys.stderr.flush()
    with log_file.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def _read(connection: socket.socket) -> list[str] | None:
    """The arguments, one line of JSON; None if they are anything else."""
    connection.settimeout(READ_SECONDS)
    line = b""
    try:
        while not line.endswith(b"\n"):
            more = connection.recv(MAX_BYTES)
            line += more
            if not more or len(line) > MAX_BYTES:
                return None
        words = json.loads(line)
    except (OSError, ValueError) as error:
        log.warning("a messenger was not understood: %s", error)
        return None
    return words if isinstance(words, list) and all(isinstance(w, str) for w in words) else None
