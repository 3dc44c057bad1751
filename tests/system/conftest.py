"""A real network on loopback: one SuperLink, two SuperNodes, and a recording proxy between.

Server and farms are started from a working directory in which modules named like ours lie in
wait, so every test here also shows that they are never imported.

Runs use a stand-in: a Flower app whose server sends what a test asks for through FlowerLink, and
whose farm answers through client.app, with a farm behind it that needs no images. A farm runs no
code that comes with a run, so both are installed beside ours, on the import path of every process.
"""

import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.processes import Child, free_port, stop_all, wait_for_port
from server.launch import Network, submit_run
from tests.system.proxy import Exchange, Proxy
from tests.system.site import Site, call, open_site
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
FARMS = ("alpha", "beta")

PYPROJECT = """
[project]
name = "standin"
version = "1.0.0"
description = "tests"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"
[tool.flwr.app.config]
state-dir = ""
settings = ""
"""

# What lies in wait under our names; importing it leaves a mark.
TRAP = """
from pathlib import Path
Path({mark!r}).open("a").write(__name__ + " from " + __file__ + "\\n")
raise SystemExit("imported the trap " + __file__)
app = None
"""

# Python imports this at its start: whoever imports client.farm gets the stand-in.
INSTALLED = """
import importlib.abc, importlib.util, pathlib, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "client.farm":
            file = pathlib.Path(__file__).with_name("standin_farm.py")
            return importlib.util.spec_from_file_location(name, file)
sys.meta_path.insert(0, Finder())
"""

SERVER_PROGRAM = """
import time; from pathlib import Path
from common.config import ServerConfig
from common.logs import start_logging; from server.launch import serve
start_logging()
config = ServerConfig.model_validate({{"server": {{"port": {port}}}}})
try:
    with serve(config, Path({state!r})):
        print("serving", flush=True)
        while True: time.sleep(1)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""

FARM_PROGRAM = """
from pathlib import Path
from common.config import FarmConfig
from common.logs import start_logging
from common.settings import load_settings
from client.agent import run_device
start_logging()
path = Path({config!r})
run_device(load_settings(FarmConfig, path), path, Path({state!r}))
"""


def set_traps(folder: Path, mark: Path) -> None:
    """Modules named like ours, as a careless working directory or a hostile app has them."""
    for package in ("client", "server", "common"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()  # "flwr run" imports packages to check an app
        for module in ("app", "messages", "wire", "link"):
            (folder / package / f"{module}.py").write_text(TRAP.format(mark=str(mark)))


def write_bundle(
    folder: Path, server: str = "standin_server:app", client: str = "client.app:app"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(server=server, client=client))
    return folder


def install_standins(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("standin_server.py", "standin_farm.py"):
        (folder / name).write_text((Path(__file__).parent / name).read_text())
    (folder / "sitecustomize.py").write_text(INSTALLED)
    return folder


@dataclass
class Plant:
    """A running network; the launchers are processes of their own, as on real machines."""

    folder: Path
    network: Network
    server: Child
    recorder: Proxy
    farms: dict[str, Child] = field(default_factory=dict)

    @property
    def mark(self) -> Path:
        """Names every trap that was imported."""
        return self.folder / "trapped.txt"

    @property
    def launchers(self) -> list[Child]:
        return [*self.farms.values(), self.server]

    def log(self, name: str, program: str) -> str:
        path = self.folder / name / "logs" / f"{program}.log"
        return path.read_text() if path.exists() else ""

    def submit(self, steps: Sequence[dict[str, Any]], bundle: Path, name: str = "run") -> Path:
        """Start a run of the stand-in; returns where its report will lie."""
        report, settings = self.folder / f"{name}.report.json", self.folder / f"{name}.json"
        values = {"farms": len(self.farms), "steps": list(steps), "report": str(report)}
        settings.write_text(json.dumps(values))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{self.folder / 'standins'}")
            submit_run(self.network, settings, bundle)
        return report

    def run(
        self, steps: Sequence[dict[str, Any]], bundle: Path, name: str = "run"
    ) -> dict[str, Any]:
        report = self.submit(steps, bundle, name)
        wait_until(report.exists, 90, f"{name}: {self.log('server', 'serverapp')[-2000:]}")
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def program(name: str, text: str, folder: Path) -> Child:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(text)}"
    command = [sys.executable, "-P", "-c", code]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PYTHONPATH": f".{os.pathsep}{folder / 'standins'}",
    }
    return Child(name, lambda: command, folder / f"{name}.log", env, cwd=folder / "cwd")


def start_plant(folder: Path, farms: Sequence[str], stack: ExitStack) -> Plant:
    port = free_port()
    children: list[Child] = []
    stack.callback(lambda: stop_all(children, 15))
    set_traps(folder / "cwd", folder / "trapped.txt")
    install_standins(folder / "standins")
    text = SERVER_PROGRAM.format(port=port, state=str(folder / "server"))
    server = program("server-launcher", text, folder)
    children.append(server)
    server.start()
    wait_for_port("127.0.0.1", port, 60, server)
    recorder = stack.enter_context(Proxy("127.0.0.1", port))
    plant = Plant(folder, Network("127.0.0.1", port, folder / "server"), server, recorder)
    for name in farms:
        settings = folder / f"{name}.toml"
        address = recorder.address
        settings.write_text(f'[farm]\nname = "{name}"\ndata = "none"\nsuperlink = "{address}"\n')
        text = FARM_PROGRAM.format(config=str(settings), state=str(folder / name))
        plant.farms[name] = program(f"{name}-launcher", text, folder)
        children.append(plant.farms[name])
        plant.farms[name].start()
    return plant


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """The network that most tests share."""
    with ExitStack() as stack:
        yield start_plant(tmp_path_factory.mktemp("plant"), FARMS, stack)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in app."""
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@dataclass
class Told:
    """What the whole story left behind: pretrain, up, two farms, train."""

    site: Site
    recording: list[Exchange]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """The whole story once."""
    with open_site(tmp_path_factory.mktemp("site")) as site:
        assert "run 1 is done" in call("fieldfed-server", "train", site.server)
        yield Told(site, site.proxy.take())
