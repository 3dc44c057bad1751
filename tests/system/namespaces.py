"""Machines of their own on this one: network namespaces, joined by a bridge that leads nowhere.

    server  10.203.0.1 ─┐
    oak     10.203.0.2 ─┼─ bridge, in a namespace of its own
    vine    10.203.0.3 ─┘

Each has its own loopback, ports and routes, so what listens on one machine's loopback is out of
reach for the others, as between real machines. Needs root and Debian's iproute2.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
NETWORK = "10.203.0"
COMMAND_SECONDS = 30
_OURS = re.compile(r"ff(\d+)-")
_LISTENING = "0A"
_CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
except OSError:
    sys.exit(1)
"""


def missing() -> str | None:
    """Why there can be no namespaces here, or None."""
    if IP is None:
        return "the program 'ip' is not installed (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"ff{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", probe)
    return None


@dataclass(frozen=True)
class Machine:
    """A namespace with one address."""

    name: str
    space: str
    address: str

    def inside(self, *command: str) -> list[str]:
        """A command that runs there; its process is the one that is started."""
        return [str(IP), "netns", "exec", self.space, *command]

    def reaches(self, address: str, port: int) -> bool:
        """Whether something there takes a connection from here."""
        command = self.inside(sys.executable, "-I", "-S", "-c", _CONNECT, address, str(port))
        done = subprocess.run(command, timeout=COMMAND_SECONDS, check=False)
        return done.returncode == 0

    def listening(self) -> set[int]:
        """TCP ports on which anything here listens, on whatever address."""
        text = "".join(
            _output(self.inside("cat", f"/proc/net/{table}")) for table in ("tcp", "tcp6")
        )
        rows = [line.split() for line in text.splitlines()]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENING}


@contextmanager
def machines(names: Sequence[str]) -> Iterator[list[Machine]]:
    """Namespaces that reach each other and nothing else, gone with the context.

    End what runs in them first: a process keeps its namespace.
    """
    _sweep()
    here = os.getpid()
    with ExitStack() as stack:
        bridge = _namespace(stack, f"ff{here}-bridge")
        _ip("-n", bridge, "link", "add", "lan", "type", "bridge")
        _ip("-n", bridge, "link", "set", "lan", "up")
        made = []
        for number, name in enumerate(names, 1):
            one = Machine(name, f"ff{here}-{name}", f"{NETWORK}.{number}")
            _namespace(stack, one.space)
            _plug_in(one, bridge, f"port{number}")
            made.append(one)
        yield made


def left_over() -> set[str]:
    """Namespaces of this process that are still there."""
    return {name for name in _names() if name.startswith(f"ff{os.getpid()}-")}


def _namespace(stack: ExitStack, name: str) -> str:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("-n", name, "link", "set", "lo", "up")
    return name


def _plug_in(one: Machine, bridge: str, port: str) -> None:
    peer = ("peer", "name", port, "netns", bridge)
    _ip("link", "add", "eth0", "netns", one.space, "type", "veth", *peer)
    _ip("-n", bridge, "link", "set", port, "master", "lan", "up")
    _ip("-n", one.space, "address", "add", f"{one.address}/24", "dev", "eth0")
    _ip("-n", one.space, "link", "set", "eth0", "up")


def _sweep() -> None:
    """Remove what a test that was killed has left."""
    for name in _names():
        owner = _OURS.match(name)
        if owner is not None and not psutil.pid_exists(int(owner[1])):
            _ip("netns", "del", name)


def _names() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _ip(*arguments: str) -> None:
    _output([str(IP), *arguments])


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
    )
    return done.stdout
