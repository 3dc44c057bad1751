"""The systemd units: what they start exists, and a real server and farm say what they wait for.

That systemd takes them, and what it thinks of them, is in tests/system/test_units.py.
"""

import configparser
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.main import get_command

from client.cli import app as client_app
from common.command import INTERRUPTED
from common.errors import FieldfedError, LaunchError, LinkError, StateError
from common.processes import Child, free_port, stop_all
from server.cli import app as server_app
from server.store import Store
from tests.lab.network import Lab
from tests.server.test_region_line import CENTRE as COOP
from tests.server.test_region_line import Site
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
CENTRE = "fieldfed-centre@.service"
ALWAYS = ("fieldfed-server.service", "fieldfed-client@.service")
NAMES = (*ALWAYS, CENTRE)
BIN = Path(sys.executable).parent
START_SECONDS = 90.0

each = pytest.mark.parametrize("name", NAMES)


class Unit(configparser.RawConfigParser):
    """A unit file: of a key that is given again the last counts."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",))
        self.read_string((UNITS / name).read_text())

    def optionxform(self, optionstr: str) -> str:
        return optionstr


@each
def test_a_unit_starts_a_command_that_exists(name: str) -> None:
    command = Unit(name)["Service"]["ExecStart"].split()
    program = Path(command[0]).name
    apps = {"fieldfed-server": server_app, "fieldfed-client": client_app}
    found = get_command(apps[program])
    assert command[1] in found.commands  # type: ignore[attr-defined]
    options = {one for given in found.commands[command[1]].params for one in given.opts}  # type: ignore[attr-defined]
    assert {word for word in command if word.startswith("--")} <= options
    folder = command[2].removeprefix("/var/lib/")
    assert folder == Unit(name)["Service"]["StateDirectory"]


@pytest.mark.parametrize("name", ALWAYS)
def test_a_unit_comes_back_and_is_watched(name: str) -> None:
    service = Unit(name)["Service"]
    assert service["Type"] == "notify"
    assert service["Restart"] == "always"
    assert Unit(name)["Unit"]["StartLimitIntervalSec"] == "0"
    assert int(service["WatchdogSec"]) >= 60  # against a look every two seconds
    assert int(service["TimeoutStopSec"]) > 16  # both patiences of common/processes.py
    assert service["KillMode"] == "mixed"
    assert service["MemoryMax"].endswith("%")


def test_a_centre_comes_back_until_its_run_has_ended() -> None:
    service, unit = Unit(CENTRE)["Service"], Unit(CENTRE)["Unit"]
    assert service["Type"] == "exec"  # it says nothing to systemd
    assert not service.keys() & {"WatchdogSec", "NotifyAccess"}
    assert service["Restart"] == "on-failure"
    assert unit["StartLimitIntervalSec"] == "0"
    assert {"--once", "%i"} < set(service["ExecStart"].split())
    assert service["SuccessExitStatus"] == str(INTERRUPTED)
    given_up = {int(code) for code in service["RestartPreventExitStatus"].split()}
    comes_back = {1, StateError.exit_code, LaunchError.exit_code, LinkError.exit_code}
    assert given_up == {kind.exit_code for kind in kinds(FieldfedError)} - comes_back


def kinds(error: type[FieldfedError]) -> Iterator[type[FieldfedError]]:
    """An error and all its kinds."""
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


def test_what_a_service_may_do_is_the_same_for_all() -> None:
    server, client, centre = (may_do(name) for name in NAMES)
    assert len(server) > 25
    assert centre == server
    read = "ProtectHome=read-only"  # photographs
    assert client == [read if line == "ProtectHome=yes" else line for line in server]


def may_do(name: str) -> list[str]:
    text = (UNITS / name).read_text()
    return text.partition("NoNewPrivileges=")[2].partition("[Install]")[0].splitlines()


def test_farms_need_no_clock_and_no_network_to_start() -> None:
    unit = Unit("fieldfed-client@.service")["Unit"]
    assert "time-sync.target" not in unit["After"].split()
    assert "network-online.target" not in str(dict(unit))


def test_who_they_run_as_is_made_by_the_file_beside_them() -> None:
    made = (UNITS / "fieldfed.sysusers").read_text().splitlines()[-1].split()
    assert {Unit(name)["Service"]["User"] for name in NAMES} == {made[1]}


class Manager:
    """Listens as systemd does."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.heard: list[str] = []

    def wait_for(self, line: str) -> None:
        """Until a line is heard."""
        self._listener.settimeout(START_SECONDS)
        while line not in self.heard:
            self.heard += self._listener.recv(4096).decode().splitlines()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield Manager(listener)


def command_of(name: str, folder: Path, instance: str = "") -> list[str]:
    """What a unit starts, from where this Python has it, in another folder."""
    command = Unit(name)["Service"]["ExecStart"].replace("%i", instance).split()
    return [str(BIN / Path(command[0]).name), command[1], str(folder), *command[3:]]


@pytest.mark.processes
def test_a_server_is_ready_when_it_listens_and_says_when_it_ends(
    manager: Manager, tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "network"
    folder.mkdir()
    (folder / "server.toml").write_text(f"[server]\nport = {port}\n")
    command = command_of("fieldfed-server.service", folder)
    server = Child("server", lambda: command, tmp_path / "server.log")
    try:
        server.start()
        manager.wait_for("READY=1")
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        alive = [sys.executable, "-P", str(ROOT / "deploy" / "containers" / "alive.py"), "http"]
        where = f"http://127.0.0.1:%FIELDFED_TEST__PORT:{port}%/health"
        assert subprocess.run([*alive, where], check=False, timeout=60).returncode == 0
        manager.heard.clear()
        manager.wait_for("WATCHDOG=1")
    finally:
        stop_all([server], 30)
    manager.wait_for("STOPPING=1")


@pytest.mark.processes
def test_a_farm_is_ready_without_a_server(manager: Manager, tmp_path: Path) -> None:
    folder = tmp_path / "apple"
    folder.mkdir()
    (folder / "farm.toml").write_text(
        f'[farm]\nname = "apple"\ndata = "none"\nsuperlink = "127.0.0.1:{free_port()}"\n'
    )
    command = command_of("fieldfed-client@.service", folder)
    farm = Child("farm", lambda: command, tmp_path / "farm.log")
    try:
        farm.start()
        manager.wait_for("READY=1")
        manager.heard.clear()
        manager.wait_for("WATCHDOG=1")
    finally:
        stop_all([farm], 30)
    manager.wait_for("STOPPING=1")


@pytest.mark.processes
def test_a_centre_keeps_its_run_when_it_is_told_to_end_and_begins_it_once(tmp_path: Path) -> None:
    site = Site(tmp_path)  # its region does not listen, so the centre waits
    folder, made = site.centre, Lab(tmp_path / "lab", 1).server_dir
    for name in ("base.safetensors", "anchors.safetensors"):
        (folder / name).write_bytes((made / name).read_bytes())
    (folder / "server.toml").write_text(
        f'[server]\nname = "{COOP}"\n\n[[regions]]\nname = "north"\n'
        f'address = "{site.entry.address}"\nmember = "north.member"\n'
    )
    command, store = command_of(CENTRE, folder, "spring"), folder / "fieldfed.db"
    centre = Child("centre", lambda: command, tmp_path / "centre.log")
    try:
        centre.start()
        wait_until(
            lambda: store.exists() or centre.returncode is not None, START_SECONDS, "the run"
        )
        wait_until(lambda: "waiting for" in centre.last_words(), START_SECONDS, centre.last_words())
    finally:
        stop_all([centre], 30)
    assert centre.returncode == INTERRUPTED
    with Store.open(store) as opened:
        assert [(row.message, row.state) for row in opened.runs()] == [("spring", "running")]
        opened.finish_run(1, "done")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run 1 of the label 'spring' is done already" in done.stdout
    with Store.open(store, read_only=True) as opened:
        assert len(opened.runs()) == 1
