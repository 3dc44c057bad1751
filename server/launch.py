"""Starts and supervises Flower on the server, and starts, watches and stops runs on it.

    SuperLink   one port on 127.0.0.1: farms fetch work from it, commands start runs on it
    SuperExec   asks the SuperLink for runs and starts our ServerApp (server/app.py) for each
    door        lets farms on other machines in (server/door.py), where one is configured
    hub         hands signed models to devices (server/hub.py), where one is configured
    region      takes the orders of a centre (server/region.py), where this server is a region
    metrics     shows figures to Prometheus (server/metrics.py), where they are configured
    bridge      hears and tells devices over MQTT (server/bridge.py), where a broker is configured
    page        shows operators what goes on (server/page.py), where it is configured

They are separate processes that share a secret: nobody else on the machine can take a run's token,
and a run survives a restart of the SuperLink. Everything lies below the state folder; both are
started again when they end, and stopped, with all that they started, when the context closes.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import notify
from common.config import ServerConfig
from common.errors import LaunchError
from common.files import write_atomically
from common.processes import (
    Child,
    Supervisor,
    require_free_port,
    require_loopback,
    terminate_like_interrupt,
    wait_for_port,
)
from common.programs import (
    flower_environment,
    flower_home,
    logs_of,
    programs_of,
    write_program,
)
from common.services import require_near
from server.members import authority_of

log = logging.getLogger(__name__)

START_SECONDS = 60.0
COMMAND_SECONDS = 60.0
_CONNECTION = "fieldfed"

# Flower ships an app as a bundle. Ours is this file alone: code is installed on both sides by our
# own releases, and the bundle only names it and carries where the run finds its settings.
_APP = """\
[project]
name = "fieldfed"
version = "1.0.0"
description = "Runs the installed fieldfed; carries no code"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fieldfed"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
state-dir = ""
settings = ""
"""


@dataclass(frozen=True)
class Network:
    """Where a server listens and where it keeps its files."""

    host: str
    port: int
    state_dir: Path

    @property
    def address(self) -> str:
        """What a farm's ``superlink`` setting says, seen from this machine."""
        return f"{self.host}:{self.port}"

    @classmethod
    def of(cls, config: ServerConfig, state_dir: Path) -> "Network":
        """The network of a server's settings.

        Raises:
            ConfigError: it would be open to other machines without encryption.
        """
        require_loopback(config.server.host, "[server] host")
        return cls(config.server.host, config.server.port, state_dir.absolute())


@dataclass(frozen=True)
class RunStatus:
    """What Flower says of a run.

    ``state`` is pending, starting, running, finished:completed, finished:failed or
    finished:stopped; ``details`` is the reason of a failure; bytes are as the SuperLink sees them.
    """

    run_id: int
    state: str
    details: str
    bytes_in: int
    bytes_out: int

    @property
    def finished(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.state.startswith("finished")


# --- the servers ---------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(config: ServerConfig, state_dir: Path) -> Iterator[Network]:
    """Run SuperLink and SuperExec while the context is open; SIGTERM ends it as Ctrl-C does.

    Raises:
        ConfigError: the host is not on this machine.
        LaunchError: the port is taken (nothing was started), or a program did not start.
    """
    network = Network.of(config, state_dir)
    require_free_port(network.host, network.port, "[server] port")
    secret = _prepare(network)
    env = flower_environment(network.state_dir)
    if any((config.door, config.hub, config.region)):
        authority_of(config, network.state_dir)  # here, so that no two of them create it
    superlink, superexec = _superlink(network, secret, env), _superexec(network, secret, env)
    services = list(_services(network, config))
    with terminate_like_interrupt(), Supervisor() as supervisor:
        listening = partial(wait_for_port, network.host, network.port, START_SECONDS, superlink)
        supervisor.start(superlink, ready=listening)
        supervisor.start(superexec)
        for child in services:
            supervisor.start(child)
        log.info("farms reach this server at %s", network.address)
        if config.page is not None:
            where = (config.page.address, network.state_dir / "page.token")
            log.info("operators look at %s; the token for changes is in '%s'", *where)
        notify.ready(f"network {config.server.name} on {network.address}")
        yield network


def _prepare(network: Network) -> Path:
    """Write what Flower's programs read; returns the file of the shared secret."""
    home = flower_home(network.state_dir)
    connection = (
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
        f'[superlink.{_CONNECTION}]\naddress = "{network.address}"\ninsecure = true\n'
    )
    write_atomically(home / "config.toml", connection.encode())
    write_atomically(_bundle(network) / "pyproject.toml", _APP.encode())
    log_file = logs_of(network.state_dir) / "serverapp.log"
    write_program(programs_of(network.state_dir) / "flwr-serverapp", "server.app", log_file)
    secret = home / "superexec.secret"
    if not secret.exists():
        descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return secret


def _bundle(network: Network) -> Path:
    return network.state_dir / "flower-app"


def _superlink(network: Network, secret: Path, env: dict[str, str]) -> Child:
    command = [
        "flower-superlink",
        "--insecure",
        *("--host", network.host, "--port", str(network.port)),
        *("--database", str(flower_home(network.state_dir) / "superlink.db")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        "--disable-runtime-dependency-installation",
    ]
    return Child("superlink", lambda: command, logs_of(network.state_dir) / "superlink.log", env)


def _superexec(network: Network, secret: Path, env: dict[str, str]) -> Child:
    command = [
        "flower-superexec",
        "--insecure",
        *("--runtime-api-address", network.address),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    return Child("superexec", lambda: command, logs_of(network.state_dir) / "superexec.log", env)


def _services(network: Network, config: ServerConfig) -> Iterator[Child]:
    """Our own programs beside Flower, as far as they are configured; each is ``server.NAME``."""
    for name, open_ in (("door", config.door), ("hub", config.hub), ("region", config.region)):
        if open_ is not None:
            require_free_port(open_.host, open_.port, f"[{name}] port")
            yield _service(network, name)
    for name, shown in (("metrics", config.metrics), ("page", config.page)):
        if shown is not None:
            require_near(shown, f"[{name}]")
            require_free_port(shown.host, shown.port, f"[{name}] port")
            yield _service(network, name)
    if config.broker is not None:
        yield _service(network, "bridge")


def _service(network: Network, name: str) -> Child:
    command = [sys.executable, "-P", "-m", f"server.{name}", str(network.state_dir)]
    log_file = logs_of(network.state_dir) / f"{name}.log"
    return Child(name, lambda: command, log_file, dict(os.environ))


# --- runs ----------------------------------------------------------------------------------------


def submit_run(network: Network, settings: Path, bundle: Path | None = None) -> int:
    """Start a run that reads ``settings``; returns Flower's run id.

    Args:
        network: of a server that is up, started by this or another process.
        settings: the file that ``server.rounds`` reads.
        bundle: another Flower app; it must know the keys ``state-dir`` and ``settings``.

    Raises:
        LaunchError: the server is not up, or Flower refused the run; quotes it.
    """
    values = {"state-dir": str(network.state_dir), "settings": str(settings.absolute())}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    overrides = flower_home(network.state_dir) / "run.toml"  # a file: paths need no quoting
    write_atomically(overrides, "\n".join(lines).encode())
    bundle = bundle or _bundle(network)
    answer = _flwr(network, "run", str(bundle), _CONNECTION, "-c", str(overrides))
    return int(answer["run-id"])


def run_status(network: Network, run_id: int) -> RunStatus:
    """What has become of a run.

    Raises:
        LaunchError: the server is not up, or does not know the run.
    """
    answer = _flwr(network, "ls", _CONNECTION, "--run-id", str(run_id))
    for run in answer.get("runs", []):
        if int(run["run-id"]) == run_id:
            traffic = run["network-traffic"]
            return RunStatus(
                run_id,
                run["status"],
                run["status-details"],
                traffic["inbound-bytes"],
                traffic["outbound-bytes"],
            )
    raise LaunchError(f"the server at {network.address} knows no run {run_id}")


def stop_run(network: Network, run_id: int) -> None:
    """Stop a run.

    Raises:
        LaunchError: the server is not up, or the run has ended already.
    """
    _flwr(network, "stop", str(run_id), _CONNECTION)


def _flwr(network: Network, *arguments: str) -> dict[str, Any]:
    """Call Flower's command line, its stable surface, and parse what it prints."""
    env = flower_environment(network.state_dir) | {"NO_COLOR": "1"}
    what = f"'flwr {arguments[0]}' on the server at {network.address}"
    program = shutil.which("flwr", path=env["PATH"])
    if program is None:
        raise LaunchError("the program 'flwr' is not installed; install fieldfed[server]")
    try:
        done = subprocess.run(
            [program, *arguments, "--format", "json"],
            env=env,
            cwd=network.state_dir,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{what} gave no answer in {COMMAND_SECONDS:.0f} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        words = (done.stderr or done.stdout).strip()[-300:]
        raise LaunchError(f"{what} failed (status {done.returncode}): {words}") from None
    if not isinstance(answer, dict) or not answer.get("success"):
        words = str(answer.get("error-message", answer)) if isinstance(answer, dict) else "?"
        last = words.strip().rpartition("\n\n")[2]  # what comes before is progress
        raise LaunchError(f"{what} failed: {last[:300]}")
    return answer
