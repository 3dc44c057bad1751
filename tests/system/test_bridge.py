"""The bridge behind a real broker with the settings that we ship: who may say what, and kills."""

import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from client.identity import FarmIdentity
from common.processes import free_port
from common.topics import Event, ModelNotice, RoundNotice
from server.identity import Authority
from server.registry import STABLE
from server.store import Store
from tests.lab.replies import DIGEST
from tests.lab.versions import two_versions
from tests.system.bridges import Bridge
from tests.system.mosquitto import MOSQUITTO, OURS, Mosquitto, device
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(MOSQUITTO is None, reason="the broker 'mosquitto' is not installed"),
]

SHIPPED = Path(__file__).parents[2] / "deploy" / "mosquitto"
NOT_AUTHORISED = 0x87
EVENT = Event(kind="started", words="it began")
STATE = b'{"farm": "oak", "release": "1"}'


# --- killed ------------------------------------------------------------------------------------


def test_a_bridge_that_is_killed_while_results_flow_loses_none_and_doubles_none(
    tmp_path: Path,
) -> None:
    count = 3000
    with ExitStack() as stack:
        broker = Mosquitto(tmp_path / "broker")
        stack.callback(broker.stop)
        broker.start()
        bridge = stack.enter_context(Bridge(tmp_path / "server", broker.port))
        oak = stack.enter_context(device(OURS, tmp_path, broker.port, 0, count))
        wait_until(lambda: bridge.names == {"oak"}, 30, "the birth")
        oak.tell()
        for part in (500, 1000, 1500):
            wait_until(partial(came, bridge, part), 100, f"{part} results")
            bridge.kill()
            bridge.start()
        wait_until(partial(came, bridge, count), 100, "all results")
        oak.kill()
    assert bridge.numbers() == list(range(count))


def came(bridge: Bridge, count: int) -> bool:
    return len(bridge.numbers()) >= count


# --- the settings that we ship -----------------------------------------------------------------


@dataclass
class Valley:
    """A network whose broker has our settings; ``doors`` are its ports by who is let in."""

    folder: Path
    broker: Mosquitto
    certificates: int
    passwords: int
    authority: Authority

    def identity(self, name: str) -> FarmIdentity:
        """Of a device that the network has taken in."""
        found = FarmIdentity.create(self.folder / "devices" / name, name)
        ca = self.authority.server_credentials().ca
        found.accept(self.authority.sign(found.request()), ca)
        return found

    def context(self, name: str) -> ssl.SSLContext:
        """How a device speaks to the broker."""
        files, folder = self.identity(name).credentials(), self.folder / "files" / name
        folder.mkdir(parents=True)
        for path, data in (("crt", files.certificate), ("key", files.key)):
            (folder / path).write_bytes(data)
        context = ssl.create_default_context(cafile=str(self.folder / "broker" / "ca.crt"))
        context.load_cert_chain(folder / "crt", folder / "key")
        return context


@dataclass
class Said:
    """A client that says what it likes, and remembers what the broker answered."""

    client: Client
    answers: dict[int, ReasonCode] = field(default_factory=dict)
    heard: dict[str, bytes] = field(default_factory=dict)

    def say(self, topic: str, payload: bytes, retain: bool = False) -> int:
        """Publish; returns the broker's reason code."""
        number = self.client.publish(topic, payload, qos=1, retain=retain).mid
        wait_until(lambda: number in self.answers, 20, "an answer")
        return int(self.answers[number].value)


@contextmanager
def speaking(
    port: int, context: ssl.SSLContext, login: tuple[str, str] | None = None, name: str = "any"
) -> Iterator[Said]:
    client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
    said, connected, gone = Said(client), threading.Event(), threading.Event()

    def answered(_client: Client, _data: Any, number: int, reason: ReasonCode, _more: Any) -> None:
        said.answers[number] = reason

    def hear(_client: Client, _data: Any, message: MQTTMessage) -> None:
        said.heard[message.topic] = bytes(message.payload)

    client.on_connect = lambda *_: connected.set()
    client.on_disconnect = lambda *_: gone.set()
    client.on_publish, client.on_message = answered, hear
    client.tls_set_context(context)
    if login is not None:
        client.username_pw_set(*login)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        wait_until(lambda: connected.is_set() or gone.is_set(), 20, "an answer to CONNECT")
        if not connected.is_set():
            raise ConnectionError("sent away")
        client.subscribe("#", options=SubscribeOptions(qos=1))
        yield said
    finally:
        client.disconnect()
        client.loop_stop()


@pytest.fixture
def valley(tmp_path: Path) -> Iterator[Valley]:
    folder = tmp_path / "broker"
    authority = Authority.create(tmp_path / "server" / "identity", "valley", [])
    authority.certify_broker(folder, ["127.0.0.1"])
    places = {"8883": str(free_port()), "8884": str(free_port())}
    for name in ("acl", "acl-home"):
        text = (SHIPPED / name).read_text()
        shut_out = "\nuser elm\ntopic deny fieldfed/#\n"  # as deploy/README.md says
        text = text.replace("NETWORK", "valley").replace("LENGTH", str(len("valley")))
        (folder / name).write_text(text + shut_out)
    words = ["mosquitto_passwd", "-b", "-c", str(folder / "passwords"), "homeassistant", "secret"]
    subprocess.run(words, check=True, capture_output=True, timeout=20)
    text = (SHIPPED / "mosquitto.conf").read_text()
    for old, new in {
        "/etc/mosquitto/fieldfed": str(folder),
        "/var/lib/mosquitto": str(folder),
        **{f"listener {old}": f"listener {new} 127.0.0.1" for old, new in places.items()},
    }.items():
        assert old in text
        text = text.replace(old, new)
    broker = Mosquitto(folder, settings="user root\n" + text)
    broker.port = int(places["8883"])
    broker.start()
    try:
        yield Valley(tmp_path, broker, int(places["8883"]), int(places["8884"]), authority)
    finally:
        broker.stop()


@pytest.fixture
def bridge(valley: Valley) -> Iterator[Bridge]:
    files = "".join(
        f'{key} = "{valley.folder / "broker" / name}"\n'
        for key, name in (("ca", "ca.crt"), ("certificate", "server.crt"), ("key", "server.key"))
    )
    with Bridge(valley.folder / "server", valley.certificates, files) as bridge:
        yield bridge


def test_a_device_speaks_for_itself_alone(valley: Valley, bridge: Bridge) -> None:
    event = EVENT.model_dump_json().removesuffix("}") + ', "id": 1, "time": 1.0}'
    with ExitStack() as stack:
        oak = stack.enter_context(speaking(valley.certificates, valley.context("oak")))
        vine = stack.enter_context(speaking(valley.certificates, valley.context("vine")))
        base = "fieldfed/valley"
        for topic in (
            *(f"{base}/vine/{part}" for part in ("availability", "state", "event", "result")),
            f"{base}/server/availability",
            f"{base}/vine/command/install",
            f"{base}/oak/command/install",
            f"{base}/rounds",
            f"{base}/models/stable",
            "fieldfed/other/oak/event",
            "homeassistant/device/fieldfed_6_valley_vine/config",
        ):
            assert oak.say(topic, b"online") == NOT_AUTHORISED, topic
        assert oak.say("homeassistant/device/fieldfed_6_valley_oak/config", b"{}") in (0, 0x10)
        assert oak.say(f"{base}/oak/state", STATE, retain=True) in (0, 0x10)
        assert vine.say(f"{base}/vine/event", event.encode()) in (0, 0x10)
        wait_until(lambda: bridge.names == {"oak", "vine"}, 30, "what both said")
        with bridge.told() as told:
            assert [(one.device, one.words) for one in told.events()] == [("vine", "it began")]
        assert not vine.heard, "a device hears nothing of another"


def test_a_device_that_is_shut_out_says_nothing(valley: Valley) -> None:
    with speaking(valley.certificates, valley.context("elm")) as elm:
        assert elm.say("fieldfed/valley/elm/state", STATE) == NOT_AUTHORISED


def test_nobody_comes_in_without_a_certificate_or_a_password(valley: Valley) -> None:
    ca = ssl.create_default_context(cafile=str(valley.folder / "broker" / "ca.crt"))
    with pytest.raises((ssl.SSLError, ConnectionError)):  # noqa: SIM117
        with speaking(valley.certificates, ca):
            pass
    with speaking(valley.passwords, ca, ("homeassistant", "wrong")) as said:
        wait_until(lambda: not said.client.is_connected(), 20, "its being sent away")


def test_home_assistant_sees_all_and_asks_for_installs_alone(valley: Valley) -> None:
    ca = ssl.create_default_context(cafile=str(valley.folder / "broker" / "ca.crt"))
    with ExitStack() as stack:
        oak = stack.enter_context(speaking(valley.certificates, valley.context("oak")))
        login = ("homeassistant", "secret")
        home = stack.enter_context(speaking(valley.passwords, ca, login))
        oak.say("fieldfed/valley/oak/state", STATE, retain=True)
        wait_until(lambda: home.heard.get("fieldfed/valley/oak/state") == STATE, 20, "the state")
        install = "fieldfed/valley/oak/command/install"
        assert home.say(install, b'{"version": 2}') == 0
        wait_until(lambda: install in oak.heard, 20, "the command")
        assert home.say("fieldfed/valley/oak/result", b"{}") == NOT_AUTHORISED
        assert home.say("fieldfed/valley/rounds", b"{}") == NOT_AUTHORISED


def test_nobody_takes_over_the_servers_connection(valley: Valley, bridge: Bridge) -> None:
    """A session of the same name would be given what waits for the bridge."""
    with speaking(valley.certificates, valley.context("oak")) as oak:
        oak.say("fieldfed/valley/oak/state", STATE, retain=True)
        wait_until(lambda: bridge.names == {"oak"}, 30, "the bridge")
        bridge.kill()
        with speaking(valley.certificates, valley.context("vine"), name="fieldfed-valley-server"):
            event = EVENT.model_dump_json().removesuffix("}") + ', "id": 1, "time": 1.0}'
            oak.say("fieldfed/valley/oak/event", event.encode())
        bridge.start()
        wait_until(lambda: events(bridge), 30, "what waited for the bridge")


def events(bridge: Bridge) -> int:
    with bridge.told() as told:
        return len(told.events())


def test_devices_are_told_of_rounds_and_versions(valley: Valley, bridge: Bridge) -> None:
    server = valley.folder / "server"
    with speaking(valley.certificates, valley.context("oak")) as oak:
        wait_until(lambda: "connected to" in bridge.child.last_words(50), 30, "the bridge")
        with Store.open(server / "fieldfed.db") as store:
            run = store.start_run("{}", 1, DIGEST, "{}")
            mask = store.run(run).mask
            store.open_round(run, 1, kind="align", base=DIGEST, mask=mask, quorum=1, deadline=4e9)
        wait_until(lambda: "fieldfed/valley/rounds" in oak.heard, 20, "the round")
        notice = RoundNotice.parse(oak.heard["fieldfed/valley/rounds"])
        assert (notice.run, notice.round, notice.deadline) == (run, 1, 4e9)
        with closing(two_versions(server)) as registry:
            registry.promote(STABLE, 2)
        topic = "fieldfed/valley/models/stable"
        wait_until(lambda: topic in oak.heard, 20, "the version")
    with speaking(valley.certificates, valley.context("vine")) as vine:
        wait_until(lambda: topic in vine.heard, 20, "the version, by who comes later")
    assert ModelNotice.parse(vine.heard[topic]).version == 2
