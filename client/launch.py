"""A farm's part in training: Flower's SuperNode, and the executor of its requests.

The SuperNode fetches requests and starts ``flwr-clientapp`` for each, which has the executor answer
it (client/executor.py). It reaches the server through a relay that counts (client/relay.py), and on
a metered link it runs only while the farm is awake (client/shifts.py).
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import client.messenger
from client.door import way_of
from client.joining import look_after
from client.relay import Relay
from client.shifts import Signs, keep_shifts
from common.config import FarmConfig
from common.errors import ConfigError, DiskError
from common.files import write_atomically
from common.processes import Child, Supervisor, free_port, rotate
from common.programs import (
    flower_environment,
    flower_home,
    logs_of,
    programs_of,
    python_command,
    write_program,
)

log = logging.getLogger(__name__)

DISK_SECONDS = 60.0
_LOCAL = "127.0.0.1"


class Training:
    """Takes part in training.

    It waits for a server that is not up yet. After a power cut the server refuses the SuperNode for
    up to a minute, and that exits: it is started again with a jittered back-off until it is let in.

    Args:
        config: the farm's settings.
        config_path: the file they came from; the ClientApp reads it again for each request.
        state_dir: where the farm keeps its state and Flower's files.

    Raises:
        ConfigError: the server is on another machine and the farm has not joined its network, or
            the settings file does not exist.
    """

    def __init__(self, config: FarmConfig, config_path: Path, state_dir: Path) -> None:
        self._way = way_of(config.farm, state_dir)
        if not config_path.is_file():
            raise ConfigError(f"no settings at '{config_path}'; create them with the init command")
        self._config, self._config_path, self._state_dir = config, config_path, state_dir
        polls = config.farm.seconds_between_polls
        self._link = Relay(self._way.address, state_dir, polls, self._way.tls)
        self._ended = threading.Event()
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        """Open the relay, through which the SuperNode signs off at last.

        Raises:
            LaunchError: this machine gives no port.
        """
        self._link.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the relay, which keeps what it has counted."""
        self._ended.set()
        self._link.__exit__(*error)

    def run(
        self,
        supervisor: Supervisor,
        wait: Callable[[float], bool],
        tell: Callable[[bool], None] = lambda _awake: None,
    ) -> None:
        """Stay connected, or on a metered link keep shifts, until ``wait`` says that this is over.

        Args:
            supervisor: that keeps the programs running; they end with it.
            wait: so many seconds; returns whether to end.
            tell: hears when the farm has woken, or has fallen asleep.

        Raises:
            LaunchError: Flower is not installed.
        """
        farm = self._config.farm
        prepared = self._prepared(wait)
        if prepared is None:
            return
        worker, node = self.children = prepared
        supervisor.start(worker)
        log.info("%s works for the server at %s", farm.name, self._way.address)
        if self._way.tls is not None:
            look_after(farm, self._state_dir, self._way, self._ended)
        if farm.link == "metered":
            signs = Signs(self._link, worker, node)
            keep_shifts(farm, self._state_dir, supervisor, node, signs, wait, tell)
            return
        supervisor.start(node)
        while not wait(1.0):
            pass

    def _prepared(self, wait: Callable[[float], bool]) -> list[Child] | None:
        """The executor and the SuperNode, once the disk takes what they read; None at the end."""
        while True:
            try:
                env = _environment(self._config, self._state_dir)
                worker = executor(self._state_dir, env)
                node = supernode(self._config_path, self._state_dir, self._link.address, env)
                for child in (worker, node):
                    rotate(child.log_file)
                    child.log_file.touch()
                return [worker, node]
            except (DiskError, OSError) as error:
                log.error("%s; training begins when there is room", error)
            if wait(DISK_SECONDS):
                return None


def executor(state_dir: Path, env: Mapping[str, str]) -> Child:
    """The executor of a farm's requests, ready to start; writes the program that reaches it."""
    home, logs = flower_home(state_dir), logs_of(state_dir)
    messenger = [sys.executable, "-I", "-S", client.messenger.__file__, str(home)]
    log_file = logs / "clientapp.log"
    write_program(programs_of(state_dir) / "flwr-clientapp", "client.app", log_file, messenger)
    command = [*python_command("client.executor"), str(home), str(log_file)]
    return Child("executor", lambda: command, logs / "executor.log", env)


def supernode(config_path: Path, state_dir: Path, link: str, env: Mapping[str, str]) -> Child:
    """The SuperNode of a farm, ready to start; writes what it and its children read.

    ``link`` is the address of the relay to the server.
    """
    node_config = flower_home(state_dir) / "node.toml"  # a file: paths need no quoting
    values = {"config": str(config_path.absolute()), "state-dir": str(state_dir.absolute())}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    write_atomically(node_config, "\n".join(lines).encode())

    def command() -> Sequence[str]:
        return [
            "flower-supernode",
            "--insecure",
            *("--superlink", link),
            # its children reach it there; another port at each start, should one be taken
            *("--host", _LOCAL, "--port", str(free_port(_LOCAL))),
            *("--node-config", str(node_config)),
        ]

    return Child("supernode", command, logs_of(state_dir) / "supernode.log", env)


def _environment(config: FarmConfig, state_dir: Path) -> dict[str, str]:
    env = flower_environment(state_dir, poll_seconds=1.0)
    if config.farm.threads:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(config.farm.threads)
    return env
