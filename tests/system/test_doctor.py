"""A doctor's hello to a real broker that knows devices by their certificates: nothing is lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.identity import FarmIdentity
from common.broker import Broker
from common.errors import LinkError
from common.greeting import greet, knock
from common.mqtt import Connection
from common.outbox import Outbox
from server.identity import Authority
from tests.system.mosquitto import MOSQUITTO, Mosquitto
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(MOSQUITTO is None, reason="the broker 'mosquitto' is not installed"),
]

# as deploy/mosquitto has it
SETTINGS = """
user root
listener {port} 127.0.0.1
cafile {folder}/ca.crt
certfile {folder}/broker.crt
keyfile {folder}/broker.key
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
"""
TOPIC = "fieldfed/valley/server/event"


def device(authority: Authority, folder: Path, port: int) -> Broker:
    """The broker as a device with a certificate of this authority reaches it."""
    identity = FarmIdentity.create(folder, "oak")
    files = authority.server_credentials()
    identity.accept(authority.sign(identity.request()), files.ca)
    return Broker(
        host="127.0.0.1",
        port=port,
        ca=folder / "ca.pem",
        certificate=folder / "certificate.pem",
        key=folder / "key.pem",
    )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "identity", "valley", [])
    made.certify_broker(tmp_path / "broker", ["127.0.0.1"])
    return made


@pytest.fixture
def mosquitto(tmp_path: Path, authority: Authority) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path / "broker", settings=SETTINGS)
    broker.start()
    yield broker
    broker.stop()


def test_what_waits_for_a_device_goes_on_waiting(
    mosquitto: Mosquitto, authority: Authority, tmp_path: Path
) -> None:
    where, heard = device(authority, tmp_path / "oak", mosquitto.port), list[str]()
    server = Broker(
        host="127.0.0.1",
        port=mosquitto.port,
        ca=tmp_path / "broker" / "ca.crt",
        certificate=tmp_path / "broker" / "server.crt",
        key=tmp_path / "broker" / "server.key",
    )

    def connected(outbox: Outbox) -> Connection:
        made = Connection(
            *(where, "valley", "oak", outbox),
            take=lambda _topic, payload, _retained: heard.append(json.loads(payload)["words"]),
            session_seconds=3600,
            first_pause=0.1,
        )
        made.subscribe(TOPIC)
        return made

    with (
        Outbox.open(tmp_path / "oak.db") as outbox,
        Outbox.open(tmp_path / "server.db") as other,
        Connection(server, "valley", "server", other, first_pause=0.1) as speaker,
    ):
        with connected(outbox):
            wait_until(lambda: speaker.connected and _hears(speaker, heard), 20, "a message")
        speaker.put("event", {"words": "waited"})
        wait_until(lambda: other.depth.count == 0, 20, "the broker has it")
        for _ in range(3):
            greet(where, "valley", "oak", 3600)
        with connected(outbox) as connection:
            wait_until(lambda: _said(heard) == ["waited"], 20, "the message that waited")
            knock(where)
            assert connection.connected
            speaker.put("event", {"words": "more"})
            wait_until(lambda: _said(heard) == ["waited", "more"], 20, "a message after a knock")


def _hears(speaker: Connection, heard: list[str]) -> bool:
    """Whether the device has subscribed: what nobody subscribes to is not kept."""
    speaker.put("event", {"words": "there?"})
    return bool(heard)


def _said(heard: list[str]) -> list[str]:
    return [words for words in heard if words != "there?"]


def test_a_device_of_another_network_is_told_so(
    mosquitto: Mosquitto, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "valley", [])
    where = device(other, tmp_path / "oak", mosquitto.port)
    theirs = where.model_copy(update={"ca": tmp_path / "identity" / "ca.crt"})
    for check in (knock, lambda broker: greet(broker, "valley", "oak", 3600)):
        with pytest.raises(LinkError, match=r"certificate verify failed"):
            check(where)
        with pytest.raises(LinkError, match=r"(?i)unknown.ca|no answer to CONNECT|reset"):
            check(theirs)
