"""The device agent in the field: versions by order, a camera, a broker that goes, a power cut."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from PIL import Image

import client.schedule
from client.camera import results_file
from client.device import Device
from common.broker import Broker
from common.mqtt import Connection
from common.outbox import Outbox
from common.topics import DeviceState, Event, Result, Topic
from server.registry import STABLE
from tests.lab.agent import Place
from tests.lab.broker import FakeBroker
from tests.lab.hub import LabHub
from tests.lab.versions import add_version, learnt, model_of, registry_in
from tests.system.mosquitto import MOSQUITTO, Mosquitto
from tests.system.site import words
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system, pytest.mark.timeout(600)]

SECONDS = 120.0
KEEPALIVE, LOOKS = 5, 5
"""Mosquitto looks for silent devices every five seconds."""


# --- versions and photographs --------------------------------------------------------------------


def updates(broker: FakeBroker) -> list[Event]:
    found = [Event.parse(payload) for payload in broker.said("event")]
    return [one for one in found if one.kind == "update"]


def state(broker: FakeBroker) -> DeviceState:
    return DeviceState.parse(broker.said("state")[-1])


def test_a_version_comes_in_by_order_and_classifies_what_the_camera_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The camera's process is killed and its folder vanishes: each photograph is told once."""
    monkeypatch.setattr(client.schedule, "JITTER_SECONDS", 1e6)  # by itself it never looks
    camera, order = tmp_path / "camera", "fieldfed/valley/oak/command/install"
    with ExitStack() as stack:
        broker = stack.enter_context(FakeBroker())
        where = {"host": "127.0.0.1", "port": broker.port}
        place = Place(tmp_path, broker=where, watch={"folder": str(camera)})
        registry = stack.enter_context(registry_in(tmp_path / "server"))
        add_version(registry, *model_of())
        registry.promote(STABLE, 1)
        hub = stack.enter_context(LabHub(tmp_path / "server").running())
        hub.join(Device(place.config, place.state), "oak", registry.keys.text)
        agent = stack.enter_context(place.running(monkeypatch))
        wait_until(lambda: broker.said("state"), SECONDS, "a first state")

        broker.push(order, b'{"version":1}', 1)
        wait_until(lambda: updates(broker), SECONDS, "an installation")
        assert (updates(broker)[0].outcome, updates(broker)[0].version) == ("committed", 1)
        wait_until(lambda: state(broker).version == 1, SECONDS, "the new version")
        assert state(broker).accuracy is not None
        assert state(broker).f1 is not None
        broker.push(order, b'{"version":1}', 2)
        wait_until(lambda: len(updates(broker)) == 2, SECONDS, "an answer")
        assert updates(broker)[1].words == "version 1 is in use"

        camera.mkdir()  # it was not there before
        (camera / "broken.png").write_bytes(b"no image")
        lines = results_file(place.state)
        wait_until(lambda: lines.is_file() and "broken" in lines.read_text(), SECONDS, "a line")
        draw(camera / "leaf.png", 160)
        wait_until(lambda: broker.said("result"), SECONDS, "a result")
        (watching,) = [one for one in psutil.Process().children() if "client.camera" in words(one)]
        assert not any("libtorch" in one.path for one in watching.memory_maps())
        watching.kill()
        camera.rename(tmp_path / "gone")
        camera.mkdir()
        draw(camera / "leaf2.png", 100)
        wait_until(lambda: len(broker.said("result")) == 2, SECONDS, "another result")
        assert not agent.faults
    results = [Result.parse(payload) for payload in broker.said("result")]
    assert [one.version for one in results] == [1, 1]
    assert not any(b"leaf" in payload for payload in broker.said("result"))
    names = ("leaf.png", "leaf2.png", "broken.png")
    assert [lines.read_text().count(f'"image": "{name}"') for name in names] == [1, 1, 1]


# As 'fieldfed-client', but it does not wait for a minute before each look.
AT_ONCE = """
import client.schedule
client.schedule.JITTER_SECONDS = 0.1
from client.cli import main
main()
"""


def test_to_follow_is_to_try_what_the_hub_tells_of(tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = Place(tmp_path)
        registry = stack.enter_context(registry_in(tmp_path / "server"))
        model, spec = model_of()
        add_version(registry, model, spec)
        registry.promote(STABLE, 1)
        hub = stack.enter_context(LabHub(tmp_path / "server").running())
        hub.join(Device(place.config, place.state), "oak", registry.keys.text)
        command = [sys.executable, "-P", "-c", AT_ONCE, "update", str(place.folder), "--follow"]
        following = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE))
        stack.callback(following.kill)
        wait_until(lambda: registry.rows.installs(1), SECONDS, "a first version")
        add_version(registry, learnt(model, 1), spec)
        registry.promote(STABLE, 2)
        wait_until(lambda: registry.rows.installs(2), SECONDS, "another one")
        process = psutil.Process(following.pid)
        wait_until(lambda: not process.children(), SECONDS, "the end of the try")
        assert not any("libtorch" in one.path for one in process.memory_maps())
        os.kill(following.pid, signal.SIGINT)
        assert following.wait(20) == 130
        assert following.stderr is not None
        assert b"version 1 is in use" in following.stderr.read()


def draw(path: Path, green: int) -> None:
    Image.new("RGB", (40, 40), (90, green, 40)).save(path)


# --- a real broker -------------------------------------------------------------------------------


@dataclass
class Server:
    """Who listens: what was said of the device, and when."""

    availability: list[tuple[float, str]] = field(default_factory=list)
    states: list[DeviceState] = field(default_factory=list)
    telemetry: int = 0

    def take(self, text: str, payload: bytes, _retained: bool) -> None:
        topic = Topic.parse(text)
        if topic is None:
            return
        if topic.part == "availability":
            self.availability.append((time.monotonic(), payload.decode()))
        elif topic.part == "state":
            self.states.append(DeviceState.parse(payload))
        elif topic.part == "telemetry":
            self.telemetry += 1

    @property
    def said(self) -> list[str]:
        return [word for _, word in self.availability]


@dataclass
class Valley:
    """A broker, who listens there, and a device."""

    broker: Mosquitto
    server: Server
    place: Place


@pytest.fixture
def valley(tmp_path: Path) -> Iterator[Valley]:
    with ExitStack() as stack:
        broker, server = Mosquitto(tmp_path / "broker"), Server()
        stack.callback(broker.stop)
        broker.start()
        where = {"host": "127.0.0.1", "port": broker.port, "keepalive": KEEPALIVE}
        outbox = stack.enter_context(Outbox.open(tmp_path / "server.db"))
        connection = Connection(
            Broker(host="127.0.0.1", port=broker.port),
            "fieldfed",
            "server",
            outbox,
            server.take,
            first_pause=0.1,
        )
        connection.subscribe("fieldfed/fieldfed/oak/+")
        stack.enter_context(connection)
        yield Valley(broker, server, Place(tmp_path, broker=where))


def started(place: Place) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(place.command, stderr=subprocess.DEVNULL, start_new_session=True)


def family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    own = psutil.Process(process.pid)
    return [own, *own.children(recursive=True)]


@pytest.mark.skipif(MOSQUITTO is None, reason="the broker 'mosquitto' is not installed")
def test_power_cuts_and_a_broker_that_is_restarted(valley: Valley) -> None:
    server, device = valley.server, started(valley.place)
    try:
        wait_until(lambda: server.said == ["online"], SECONDS, "the birth")
        wait_until(lambda: server.states and server.telemetry, SECONDS, "a state and telemetry")

        valley.broker.stop()
        before = len(server.states)
        valley.broker.start()
        wait_until(lambda: server.said[-1] == "online" and len(server.said) > 1, SECONDS, "birth")
        wait_until(lambda: len(server.states) > before, SECONDS, "the state again")
        assert server.states[-1] == server.states[0]

        # killed, its system closes the line; frozen, it says nothing, as without power
        for one in (processes := family(device)):
            one.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        wait_until(lambda: server.said[-1] == "offline", 3 * KEEPALIVE + 30, "the last will")
        assert server.availability[-1][0] - begin < 1.5 * KEEPALIVE + LOOKS + 2
        for one in processes:
            one.kill()
        device.wait(20)

        device = started(valley.place)
        wait_until(lambda: server.said[-1] == "online", SECONDS, "the second birth")
        begin = time.monotonic()
        for one in family(device):
            one.kill()
        device.wait(20)
        wait_until(lambda: server.said[-1] == "offline", SECONDS, "the last will")
        assert server.availability[-1][0] - begin < 1.5 * KEEPALIVE

        device = started(valley.place)
        wait_until(lambda: server.said[-1] == "online", SECONDS, "the third birth")
        os.kill(device.pid, signal.SIGTERM)
        assert device.wait(20) == 0
        wait_until(lambda: server.said[-1] == "offline", SECONDS, "the farewell")
    finally:
        device.kill()
        device.wait(20)
