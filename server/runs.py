"""Start a run on a network that is up, show it, keep it going, and stop it when the operator does.

    active-run.json    the run that the operator wants: its settings and Flower's number for it

A run whose server process died (crash, power cut, ``kill -9``) is still wanted: ``up`` starts
another process for it, which goes on behind the last committed round.
"""

import logging
import time
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from common.config import ServerConfig
from common.errors import ConfigError, LaunchError
from common.files import write_atomically
from server.follow import follow, last_run
from server.launch import Network, run_status, stop_run, submit_run
from server.rows import RunRow
from server.settings import RunSettings
from server.store import Store

log = logging.getLogger(__name__)

CHECK_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
"""How long a run may be without a living server process before it is given up."""
WAIT_SECONDS, WAIT_LIMIT = 5.0, 300.0


class ActiveRun(BaseModel):
    """The run that is wanted; ``after`` is the last run that had ended before it was started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flower_run: int
    settings: str
    after: int


def play(network: Network, settings: RunSettings, console: Console) -> RunRow:
    """Run to the end; Ctrl-C stops the run, which continues when it is started again.

    Raises:
        LaunchError: the network is not up, or the server process died and none replaced it.
        FieldfedError: the run failed; the message is the run's own.
    """
    store = network.state_dir / "fieldfed.db"
    after = last_run(store)
    ended = _last_ended(store)
    path = network.state_dir / f"run-{settings.label}.json"
    write_atomically(path, settings.model_dump_json(indent=2).encode())
    _start(network, path, ended)
    seen = time.monotonic()

    def alive() -> bool:
        nonlocal seen
        if _lives(network):
            seen = time.monotonic()
        return time.monotonic() - seen < PATIENCE_SECONDS

    try:
        return follow(store, settings, after, alive, console)
    except KeyboardInterrupt:
        active = _active(network)
        _path(network).unlink(missing_ok=True)
        if active is not None:
            stop_run(network, active.flower_run)
        raise


def ended(state_dir: Path, label: str) -> int | None:
    """The last run of a label, where it has come to its end; None where one may go on, or begin.

    Raises:
        ConfigError: it failed, and would do so again; says why.
    """
    store_path = state_dir / "fieldfed.db"
    if not store_path.is_file():
        return None
    with Store.open(store_path, read_only=True) as store:
        last = next((row for row in reversed(store.runs()) if row.message == label), None)
    if last is None or last.state == "running":
        return None
    if last.state != "done":
        raise ConfigError(
            f"run {last.run} of the label '{label}' {last.state}: {last.detail}; mend that, and "
            "begin another with another --label"
        )
    return last.run


class Keeper:
    """Starts the wanted run again when its server process has died; ``up`` asks it now and then."""

    news: ClassVar[str] = "the server process of the run died; another one continues it"

    def __init__(self, network: Network) -> None:
        self._network = network
        self._next, self._wait = 0.0, WAIT_SECONDS

    def check(self) -> bool:
        """One look; returns whether a run was started again."""
        if time.monotonic() < self._next:
            return False
        active = self._wanted()
        if active is None:
            return False
        try:
            if _lives(self._network):
                self._wait = WAIT_SECONDS
                return False
            if self._wanted() is None:  # it ended while Flower was asked, which takes seconds
                return False
            # by its name: a folder that was restored may lie elsewhere now
            settings = self._network.state_dir / Path(active.settings).name
            _start(self._network, settings, active.after)
        except LaunchError as error:
            log.warning("the run cannot be continued yet: %s", error)
            return False
        finally:
            self._next = time.monotonic() + CHECK_SECONDS
        log.warning("%s", self.news)
        self._next = time.monotonic() + self._wait
        self._wait = min(WAIT_LIMIT, 2 * self._wait)
        return True

    def _wanted(self) -> ActiveRun | None:
        """The run that is wanted and has not come to an end."""
        active = _active(self._network)
        if active is None:
            return None
        if _last_ended(self._network.state_dir / "fieldfed.db") > active.after:
            _path(self._network).unlink(missing_ok=True)
            return None
        return active


class RegionKeeper(Keeper):
    """The same for the process that plays a centre's orders, which is always wanted."""

    news: ClassVar[str] = "nobody was playing the centre's orders; a process is started that does"

    def _wanted(self) -> ActiveRun | None:
        settings = self._network.state_dir / "server.toml"
        return ActiveRun(flower_run=0, settings=str(settings), after=0)


def keeper_of(config: ServerConfig, network: Network) -> Keeper:
    """What keeps a server at work."""
    return Keeper(network) if config.region is None else RegionKeeper(network)


def _start(network: Network, settings: Path, after: int) -> None:
    number = submit_run(network, settings)
    active = ActiveRun(flower_run=number, settings=str(settings), after=after)
    write_atomically(_path(network), active.model_dump_json().encode())


def _lives(network: Network) -> bool:
    active = _active(network)
    try:
        return active is not None and not run_status(network, active.flower_run).finished
    except LaunchError as error:
        log.warning("%s", error)
        return False


def _active(network: Network) -> ActiveRun | None:
    try:
        return ActiveRun.model_validate_json(_path(network).read_bytes())
    except (OSError, ValidationError):
        return None


def _path(network: Network) -> Path:
    return network.state_dir / "active-run.json"


def _last_ended(store_path: Path) -> int:
    """Number of the last run that came to an end, 0 when there is none."""
    if not store_path.is_file():
        return 0
    with Store.open(store_path, read_only=True) as store:
        return max((row.run for row in store.runs() if row.state != "running"), default=0)
