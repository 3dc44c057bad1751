"""Starts and supervises a farm's programs: Flower's SuperNode, and the executor of its requests.

The SuperNode fetches requests and starts ``flwr-clientapp`` for each, which has the executor answer
it (client/executor.py). It reaches the server through a relay that counts (client/relay.py), and on
a metered link it runs only while the farm is awake (client/shifts.py).
"""

import json
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import client.messenger
from client.relay import Relay
from client.shifts import Signs, keep_shifts
from common import notify
from common.config import FarmConfig
from common.errors import ConfigError
from common.files import write_atomically
from common.processes import (
    Child,
    Supervisor,
    free_port,
    require_loopback,
    terminate_like_interrupt,
)
from common.programs import (
    flower_environment,
    flower_home,
    logs_of,
    programs_of,
    python_command,
    write_program,
)

log = logging.getLogger(__name__)

_LOCAL = "127.0.0.1"


def run_supernode(
    config: FarmConfig,
    config_path: Path,
    state_dir: Path,
    stop: threading.Event | None = None,
) -> None:
    """Keep a SuperNode connected until Ctrl-C, SIGTERM or ``stop``; then end all it started.

    It waits for a server that is not up yet. After a power cut the server refuses it for up to a
    minute, and it exits: it is started again with a jittered back-off until it is let in.

    Args:
        config: the farm's settings.
        config_path: the file they came from; the ClientApp reads it again for each request.
        state_dir: where the farm keeps its state and Flower's files.
        stop: ends the call when set, for use outside the main thread.

    Raises:
        ConfigError: the server is on another machine, or the settings file does not exist.
        LaunchError: Flower is not installed.
    """
    require_loopback(config.farm.superlink.rpartition(":")[0], "[farm] superlink")
    if not config_path.is_file():
        raise ConfigError(f"no settings at '{config_path}'; create them with the init command")
    env = _environment(config, state_dir)
    stop = stop or threading.Event()
    link = Relay(config.farm.superlink, state_dir, config.farm.seconds_between_polls)
    try:
        with terminate_like_interrupt(), link, Supervisor() as supervisor:
            notify.ready(f"farm {config.farm.name}")
            worker = executor(state_dir, env)
            node = supernode(config_path, state_dir, link.address, env)
            supervisor.start(worker)
            log.info("%s works for the server at %s", config.farm.name, config.farm.superlink)
            if config.farm.link == "metered":
                signs = Signs(link, worker, node)
                keep_shifts(config.farm, state_dir, supervisor, node, signs, stop.wait)
            else:
                supervisor.start(node)
                while not stop.wait(1.0):
                    pass
    except KeyboardInterrupt:
        log.info("%s stopped", config.farm.name)


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
