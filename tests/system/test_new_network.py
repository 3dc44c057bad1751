"""From bare devices to a running network, by our commands alone, each machine a namespace.

A server and two farms that reach each other over a bridge and nothing else, TLS on every line. What
each step took is printed, and kept in test-output/new-network.txt; by hand, as root:

    python -P -m pytest -s tests/system/test_new_network.py
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from common.errors import LinkError
from common.processes import Child, stop_all
from server.store import Store
from tests.conftest import ROOT
from tests.lab.network import SIDE, TINY, draw_folder
from tests.system.namespaces import Machine, left_over, machines, missing
from tests.system.site import command, finish, start, tell, toml
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system, pytest.mark.timeout(1500)]

TABLE = ROOT / "test-output" / "new-network.txt"
DOOR, HUB, SUPERLINK = 8443, 8444, 8000
OUT_SECONDS = 15
"""Within which a farm that is revoked is refused, on a machine that is busy with other things."""


@dataclass
class Diary:
    """What was done, by whom, and how long it took."""

    rows: list[tuple[str, str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, where: str, what: str) -> Iterator[None]:
        """A step, from here to the end of the context."""
        begin = time.monotonic()
        yield
        self.rows.append((where, what, time.monotonic() - begin))

    def table(self) -> str:
        """All of it, as text."""
        total = ("", "in all", sum(row[2] for row in self.rows))
        width = max(len(what) for _, what, _ in self.rows)
        lines = [f"{where:<8}{what:<{width}}{took:>8.1f} s" for where, what, took in
                 [*self.rows, total]]  # fmt: skip
        return "\n".join(lines) + "\n"


@dataclass
class Place:
    """A machine, the folder of our state on it, and what runs there."""

    machine: Machine
    folder: Path
    children: list[Child]

    def call(self, *arguments: str, code: int = 0) -> str:
        """One of our commands, to its end; the folder comes first."""
        return finish(self.machine.inside(*self._words(*arguments)), code)

    def start(self, *arguments: str) -> Child:
        """One of our commands, to stay."""
        words = self.machine.inside(*self._words(*arguments))
        child = start(self.machine.name, words, self.folder.parent)
        self.children.append(child)
        return child

    def log(self, program: str) -> str:
        """What a program has written so far."""
        path = self.folder / "state" / "logs" / f"{program}.log"
        path = path if path.exists() else self.folder / "logs" / f"{program}.log"
        return path.read_text() if path.exists() else ""

    def _words(self, verb: str, *rest: str) -> list[str]:
        program = "fieldfed-server" if self.machine.name == "server" else "fieldfed-client"
        first, *more = verb.split()
        return command(program, first, *more, str(self.folder), *rest)


@dataclass
class Network:
    """A server and two farms, each on its machine."""

    server: Place
    oak: Place
    vine: Place
    diary: Diary = field(default_factory=Diary)

    @property
    def farms(self) -> list[Place]:
        """Those that are not the server."""
        return [self.oak, self.vine]

    @property
    def address(self) -> str:
        """Of the server."""
        return self.server.machine.address


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with ExitStack() as stack:
        stack.callback(lambda: _none_left())
        spaces = stack.enter_context(machines(["server", "oak", "vine"]))
        children: list[Child] = []
        stack.callback(lambda: tell(children))
        stack.callback(lambda: stop_all(children, 15))
        server, oak, vine = (Place(one, tmp_path / one.name / one.name, children) for one in spaces)
        made = Network(server, oak, vine)
        yield made
    table = made.diary.table()
    print(table)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table)


def _none_left() -> None:
    assert not left_over(), "namespaces are left over"


def test_from_bare_devices_to_a_running_network_and_one_of_them_out_again(network: Network) -> None:
    set_the_server_up(network)
    let_the_farms_in(network)
    only_door_and_hub_are_open(network)
    train_together(network)
    deliver_a_version(network)
    put_one_out(network)
    the_other_works_on(network)


def set_the_server_up(network: Network) -> None:
    server, step = network.server, network.diary.step
    source = draw_folder(server.folder.parent / "photos", 3, 16, 7)
    with step("server", "init"):
        flags = ("--backbone", "vit_tiny_patch16_224", "--image-size", str(SIDE))
        said = server.call("init", "--source", str(source), "--name", "valley", *flags)
    assert "next: fieldfed-server pretrain" in said
    listening: dict[str, object] = {"host": "0.0.0.0", "names": [network.address]}
    more: dict[str, dict[str, object]] = {
        "door": listening | {"port": DOOR},
        "hub": listening | {"port": HUB},
        "backbone.options": dict(TINY),
    }
    settings = server.folder / "server.toml"  # what an operator does with an editor:
    text = settings.read_text().replace("prune_events = 2", "prune_events = 1\nwarmup = 0")
    settings.write_text(text + toml(more))
    with step("server", "pretrain"):
        assert "next: fieldfed-server up" in server.call("pretrain")
    with step("server", "up"):
        server.start("up")
        device, address = network.oak.machine, network.address
        wait_until(lambda: device.reaches(address, DOOR), 120, "an open door")
        wait_until(lambda: device.reaches(address, HUB), 120, "a hub that listens")


def let_the_farms_in(network: Network) -> None:
    server, step = network.server, network.diary.step
    for number, farm in enumerate(network.farms):
        name = farm.machine.name
        data = draw_folder(farm.folder.parent / "photos", 2 + number, 15, 50 + number)
        with step("server", f"enrol {name}"):
            asked = json.loads(server.call("enrol", name, "--json"))
        assert asked["door"] == f"https://{network.address}:{DOOR}"
        with step(name, "init"):
            farm.call("init", "--data", str(data), "--threads", "1")
        with step(name, "join"):
            said = farm.call("join", asked["door"], asked["code"])
        assert f"farm {name} is a member of network valley" in said
        with step(name, "run"):
            farm.start("run")
            wait_until(partial(_came, server, name), 120, f"farm {name} at the door")


def only_door_and_hub_are_open(network: Network) -> None:
    """Of all that listens on the server, and nothing at all of a farm."""
    inside = network.server.machine.listening()
    assert {SUPERLINK, DOOR, HUB} <= inside
    assert network.server.machine.reaches("127.0.0.1", SUPERLINK)
    open_ = {port for port in inside if network.oak.machine.reaches(network.address, port)}
    assert open_ == {DOOR, HUB}
    ports = network.vine.machine.listening()
    assert ports, "the relay and the SuperNode listen on the farm's loopback"
    address = network.vine.machine.address
    assert not [port for port in ports if network.server.machine.reaches(address, port)]


def train_together(network: Network) -> None:
    with network.diary.step("server", "train, 2 rounds, a cut"):
        said = network.server.call("train", "--rounds", "2", "--prune-heads", "0.4")
    assert "run 1 is done" in said
    assert took_part(network, 1) == {"oak", "vine"}


def took_part(network: Network, run: int) -> set[str]:
    with Store.open(network.server.folder / "fieldfed.db", read_only=True) as store:
        rounds = {row.round for row in store.rounds(run) if row.kind == "align"}
        return {row.farm for number in rounds for row in store.replies(run, number)}


def deliver_a_version(network: Network) -> None:
    """One device is told to look, and classifies with it; the other takes it by itself."""
    server, oak, vine, step = network.server, network.oak, network.vine, network.diary.step
    with step("server", "registry publish"):
        assert "run 1 is version 1" in server.call("registry publish")
    with step("server", "registry promote"):
        assert "names version 1" in server.call("registry promote", "1", "stable")
    with step("oak", "update"):
        assert "version 1 is in use" in oak.call("update")
    bundle = str(oak.folder.parent / "oak.bundle")
    image = next((oak.folder.parent / "photos" / "test").rglob("*.png"))
    with step("oak", "bundle"):
        assert "version 1, 2 classes" in oak.call("bundle", "--out", bundle)
    words = command("fieldfed-client", "classify", bundle, str(image), "--json")
    with step("oak", "classify, an image"):
        said = json.loads(finish(oak.machine.inside(*words)).splitlines()[0])
    assert {guess["class"] for guess in said["likely"]} == {"class0", "class1"}
    with step("vine", "takes it by itself, the rest"):
        words_of = vine.folder.parent / "vine.log"
        wait_until(lambda: "version 1 is in use" in words_of.read_text(), 300, "version 1 on vine")
    assert "version 1 since" in vine.call("serving")


def put_one_out(network: Network) -> None:
    server, vine, step = network.server, network.vine, network.diary.step
    with step("server", "revoke vine"):
        assert "farm vine is out" in server.call("revoke", "vine")
    with step("vine", "refused at the door"):
        wait_until(lambda: "farm vine is revoked" in server.log("door"), OUT_SECONDS, "the end")
    with step("vine", "update, refused at the hub"):
        said = vine.call("update", code=LinkError.exit_code)
    assert "the certificate of farm vine is revoked" in said
    with step("vine", "the device's own log says so"):
        wait_until(lambda: "403" in vine.log("supernode"), 60, "a refusal")
    door = vine.call("leave", code=LinkError.exit_code)
    assert "says no (403): the certificate of farm vine is revoked" in door


def the_other_works_on(network: Network) -> None:
    server, oak, step = network.server, network.oak, network.diary.step
    with step("oak", "update, nothing new"):
        assert "version 1 is in use" in oak.call("update")
    with step("server", "train, oak alone"):
        said = server.call("train", "--rounds", "2", "--prune-heads", "0.2")
    assert "run 2 is done" in said
    assert took_part(network, 2) == {"oak"}
    states = {
        row["farm"]: row["state"] for row in json.loads(server.call("enrol", "--list", "--json"))
    }
    assert states == {"oak": "member", "vine": "revoked"}


def _came(server: Place, farm: str) -> bool:
    """Whether the door has written down that a farm's SuperNode came in."""
    path = server.folder / "nodes.json"
    return path.exists() and farm in path.read_text()
