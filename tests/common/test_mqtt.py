"""The connection to a broker: everything arrives, in order, however often the line is cut."""

import json
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

import common.session
from common.broker import Broker
from common.certificates import Issuer, Validity, issue, new_key, pem, self_signed, write_key
from common.errors import ConfigError, DiskError, StateError
from common.mqtt import LONGEST_PAUSE, Connection, Seen, pause
from common.outbox import Outbox
from tests.lab.broker import FakeBroker, Message
from tests.waiting import wait_until

BASE = "fieldfed/valley/oak"


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as fake:
        yield fake


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox.open(tmp_path / "outbox.db") as found:
        yield found


def device(broker: FakeBroker, outbox: Outbox, **options: Any) -> Connection:
    where = Broker(host="127.0.0.1", port=broker.port, **options.pop("login", {}))
    return Connection(where, "valley", "oak", outbox, seed=1, first_pause=0.01, **options)


def put(connection: Connection, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        connection.put("result", {"number": number})


def numbers(broker: FakeBroker) -> list[int]:
    bodies = map(json.loads, broker.said("result"))
    return [body["number"] for body in bodies if "number" in body]


def is_empty(outbox: Outbox) -> bool:
    return outbox.depth.count == 0


# --- what a device says of itself ------------------------------------------------------------


@pytest.mark.parametrize("version", [5, 4])
def test_birth_state_will_and_farewell(broker: FakeBroker, outbox: Outbox, version: int) -> None:
    broker.answer = lambda asked: 0 if asked == version else 1
    with device(broker, outbox, login={"username": "oak", "password": SecretStr("s")}) as oak:
        oak.set_state({"b": 1, "a": None})
        wait_until(lambda: broker.said("state"), 10, "the state")
        assert oak.connected
    visit = broker.visits[-1]
    wait_until(lambda: visit.left, 10, "the farewell")
    assert (visit.version, visit.client) == (version, "fieldfed-valley-oak")
    assert (visit.login, visit.clean) == (("oak", "s"), True)
    topic, last = f"{BASE}/availability", len(broker.visits) - 1
    assert visit.will == Message(last, topic, b"offline", True, 1)
    assert [one for one in broker.messages if one.topic == topic] == [
        Message(last, topic, b"online", True, 1),
        Message(last, topic, b"offline", True, 1),
    ]
    assert broker.messages[0].payload == b"online"
    assert Message(last, f"{BASE}/state", b'{"a":null,"b":1}', True, 1) in broker.messages
    assert not oak.connected


def test_birth_state_and_subscriptions_come_again_with_each_connect(
    broker: FakeBroker, outbox: Outbox
) -> None:
    with device(broker, outbox) as oak:
        oak.subscribe("fieldfed/valley/+/result")
        oak.set_state({"number": 1})
        wait_until(lambda: broker.said("state"), 10, "the state")
        oak.set_state({"number": 2})
        wait_until(lambda: len(broker.said("state")) == 2, 10, "the newer state")
        broker.cut()
        wait_until(lambda: len(broker.said("state")) == 3, 10, "the state again")
        wait_until(lambda: broker.visits[1].filters, 10, "the subscription")
    assert broker.said("state") == [b'{"number":1}', b'{"number":2}', b'{"number":2}']
    assert broker.said("availability") == [b"online", b"online", b"offline"]
    assert [visit.filters for visit in broker.visits] == [["fieldfed/valley/+/result"]] * 2


def test_what_is_retained_elsewhere_comes_again_with_each_connect_once(
    broker: FakeBroker, outbox: Outbox
) -> None:
    topic = "homeassistant/device/oak/config"
    with device(broker, outbox) as oak:
        oak.retain(topic, b"1")
        wait_until(lambda: broker.said("config") == [b"1"], 10, "the first")
        oak.retain(topic, b"2")
        wait_until(lambda: broker.said("config") == [b"1", b"2"], 10, "the second")
        broker.cut()
        wait_until(lambda: len(broker.said("config")) == 3, 10, "the second again")
        oak.set_state({})
        wait_until(lambda: broker.said("state"), 10, "the state")
    assert broker.said("config") == [b"1", b"2", b"2"]
    assert all(one.retained for one in broker.messages if one.topic == topic)


def test_what_may_not_be_retained_elsewhere_does_not_end_the_line(
    broker: FakeBroker, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    broker.acknowledge = lambda message: 0x87 if message.topic.startswith("homeassistant") else 0
    with device(broker, outbox) as oak:
        oak.retain("homeassistant/device/oak/config", b"1")
        put(oak, 3)
        wait_until(lambda: "refuses 'homeassistant/device" in caplog.text, 10, "a complaint")
        wait_until(lambda: is_empty(outbox), 10, "the outbox being empty")
    assert len(broker.visits) == 1


# --- what waits ------------------------------------------------------------------------------


def test_what_waits_is_sent_in_order_and_then_forgotten(broker: FakeBroker, outbox: Outbox) -> None:
    oak = device(broker, outbox)
    put(oak, 150)
    with oak:
        wait_until(lambda: is_empty(outbox), 20, "the outbox being empty")
        put(oak, 3, 150)
        wait_until(lambda: is_empty(outbox), 0.9, "the wake")  # a turn takes a second
    assert numbers(broker) == list(range(153))
    assert {one.qos for one in broker.messages} == {1}


def test_nothing_is_forgotten_before_it_is_acknowledged(broker: FakeBroker, outbox: Outbox) -> None:
    broker.acknowledge = lambda message: None if "result" in message.topic else 0
    with device(broker, outbox) as oak:
        put(oak, 100)
        wait_until(lambda: len(numbers(broker)) >= common.session.WINDOW, 10, "a full window")
        broker.acknowledge = lambda _message: 0
        before = numbers(broker)
        assert before == list(range(common.session.WINDOW))
        assert outbox.depth.count == 100
        broker.cut()
        wait_until(lambda: is_empty(outbox), 20, "the outbox being empty")
    assert numbers(broker) == before + list(range(100))


def test_lines_that_are_cut_again_and_again_lose_nothing_and_keep_the_order(
    broker: FakeBroker, outbox: Outbox
) -> None:
    draw, lock = random.Random(2), threading.Lock()

    def acknowledge(message: Message) -> int | None:
        with lock:
            chance = draw.random()
        if "result" in message.topic and chance < 0.05:
            broker.cut()
        return 0 if chance > 0.1 else None

    broker.acknowledge = acknowledge
    with device(broker, outbox) as oak:
        put(oak, 300)
        wait_until(lambda: len(broker.visits) > 5, 30, "cuts")
        broker.acknowledge = lambda _message: 0
        broker.cut()
        wait_until(lambda: is_empty(outbox), 30, "the outbox being empty")
    seen = Seen()
    bodies = [json.loads(payload) for payload in broker.said("result")]
    first = [body["number"] for body in bodies if seen.first("oak", body["id"])]
    assert first == list(range(300))
    assert len(bodies) > 300
    for visit in range(len(broker.visits)):
        sent = [one.payload for one in broker.messages if one.visit == visit]
        order = [json.loads(one)["id"] for one in sent if b"number" in one]
        assert order == sorted(order)


def test_a_silent_broker_is_left(
    broker: FakeBroker, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.session, "ACKNOWLEDGE_SECONDS", 0.3)
    monkeypatch.setattr(common.session, "TURN_SECONDS", 0.1)
    broker.acknowledge = lambda message: None if "result" in message.topic else 0
    with device(broker, outbox) as oak:
        put(oak, 1)
        wait_until(lambda: len(broker.visits) > 2, 10, "another connect")
    assert set(numbers(broker)) == {0}
    assert outbox.depth.count == 1


def test_a_broker_that_answers_nothing_is_given_up(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(common.session, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(common.session, "TURN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = Broker(host="127.0.0.1", port=server.getsockname()[1])
        with Connection(where, "valley", "oak", outbox, seed=1, first_pause=0.01) as oak:
            wait_until(lambda: "no answer to CONNECT" in caplog.text, 10, "a time-out")
            assert not oak.connected


def test_the_brokers_own_window_is_kept(broker: FakeBroker, outbox: Outbox) -> None:
    broker.properties = b"\x21\x00\x03"  # Receive Maximum 3
    broker.acknowledge = lambda message: None if "result" in message.topic else 0
    with device(broker, outbox) as oak:
        put(oak, 20)
        wait_until(lambda: len(numbers(broker)) >= 3, 10, "the window")
        oak.set_state({})
        wait_until(lambda: broker.said("state"), 10, "the state")
        assert numbers(broker) == [0, 1, 2]


@pytest.mark.parametrize("how", ["announced", "refused", "refused against the rules", "dismissed"])
def test_a_message_that_no_broker_takes_does_not_stop_the_others(
    broker: FakeBroker, outbox: Outbox, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def acknowledge(message: Message) -> int | None:
        if len(message.payload) < 200:
            return 0
        if how == "dismissed":
            broker.dismiss(0x95)
        return {"refused": 0x99, "refused against the rules": 0x95}.get(how)

    broker.acknowledge = acknowledge
    if how == "announced":
        broker.properties = b"\x27\x00\x00\x01\x00"  # Maximum Packet Size 256
    with device(broker, outbox) as oak:
        put(oak, 1)
        oak.put("result", {"leaf": "x" * 300})
        put(oak, 1, 1)
        wait_until(lambda: is_empty(outbox), 10, "the outbox being empty")
    assert numbers(broker)[-1] == 1
    assert outbox.dropped["result"] == 1
    assert "is given up" in caplog.text


def test_a_message_that_may_not_be_published_waits(
    broker: FakeBroker, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    broker.acknowledge = lambda message: 0x87 if "result" in message.topic else 0
    with device(broker, outbox) as oak:
        put(oak, 2)
        wait_until(lambda: "Not authorized" in caplog.text, 10, "a complaint")
        assert outbox.depth.count == 2
        assert dict(outbox.dropped) == {"telemetry": 0, "event": 0, "result": 0}
    assert "allow this device" in caplog.text


def test_a_full_disk_does_not_stop_the_sending(
    broker: FakeBroker, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, full = outbox.remove, threading.Event()
    full.set()

    def maybe(ids: set[int]) -> None:
        if full.is_set():
            raise DiskError("no space left")
        remove(ids)

    monkeypatch.setattr(outbox, "remove", maybe)
    monkeypatch.setattr(common.session, "TURN_SECONDS", 0.1)
    with device(broker, outbox) as oak:
        put(oak, 50)
        wait_until(lambda: len(numbers(broker)) == 50, 10, "all of them")
        broker.cut()
        wait_until(lambda: len(broker.visits) == 2, 10, "another connect")
        put(oak, 1, 50)
        wait_until(lambda: numbers(broker)[-1] == 50, 10, "the next one")
        assert outbox.depth.count == 51
        full.clear()
        wait_until(lambda: is_empty(outbox), 10, "the outbox being empty")
    assert len(numbers(broker)) <= 51 + common.session.WINDOW


# --- protocols and refusals ------------------------------------------------------------------


@pytest.mark.parametrize("answer", [1, 0x84, None])
def test_an_old_broker_is_spoken_to_in_its_version(
    broker: FakeBroker, outbox: Outbox, answer: int | None
) -> None:
    broker.answer = lambda version: answer if version == 5 else 0
    with device(broker, outbox) as oak:
        put(oak, 30)
        wait_until(lambda: is_empty(outbox), 10, "the outbox being empty")
        broker.cut()
        wait_until(lambda: len(broker.visits) == 3, 10, "another connect")
        wait_until(lambda: oak.connected, 10, "being let in")
    assert [visit.version for visit in broker.visits] == [5, 4, 4]


def test_a_line_that_is_cut_at_connect_does_not_make_a_new_broker_old(
    broker: FakeBroker, outbox: Outbox
) -> None:
    broker.answer = lambda version: None if len(broker.visits) < 3 else 0 if version == 5 else 1
    with device(broker, outbox) as oak:
        wait_until(lambda: oak.connected, 10, "being let in")
    assert broker.visits[-1].version == 5


@pytest.mark.parametrize(("version", "answer"), [(5, 0x86), (4, 4)])
def test_a_wrong_password_is_said_once_and_tried_again_slowly(
    broker: FakeBroker,
    outbox: Outbox,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    answer: int,
) -> None:
    asked: list[int] = []

    def short(_draw: random.Random, failures: int, _first: float) -> float:
        asked.append(failures)
        return 0.01

    monkeypatch.setattr("common.mqtt.pause", short)
    broker.answer = lambda tried: answer if tried == version else 1
    with device(broker, outbox):
        wait_until(lambda: len(asked) > 4, 10, "attempts")
    errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "Bad user name or password" in errors[0]
    assert "correct 'username' and 'password'" in errors[0]
    assert pause(random.Random(1), min(asked)) == random.Random(1).uniform(0, LONGEST_PAUSE)


def test_two_devices_of_one_name_are_told(
    broker: FakeBroker, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    with device(broker, outbox) as oak:
        wait_until(lambda: oak.connected, 10, "being let in")
        broker.dismiss(0x8E)
        wait_until(lambda: "another device has the same name" in caplog.text, 10, "a complaint")


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2000), st.floats(0.01, 10))
def test_pauses_are_drawn_below_a_bound_that_doubles(
    seed: int, failures: int, first: float
) -> None:
    most = min(LONGEST_PAUSE, first * 2 ** min(failures, 100))
    assert 0 <= pause(random.Random(seed), failures, first) <= most <= LONGEST_PAUSE == 120


def test_a_thousand_devices_do_not_come_back_together() -> None:
    drawn = [pause(random.Random(seed), 9) for seed in range(1000)]
    busiest = max(sum(second <= one < second + 1 for one in drawn) for second in range(120))
    assert busiest < 30  # 8 on average
    assert min(drawn) < 5
    assert max(drawn) > 115


# --- TLS -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, a broker and a device that it vouches for, and another one."""
    folder = tmp_path_factory.mktemp("tls")
    now = datetime.now(UTC)
    validity = Validity(now - timedelta(hours=1), now + timedelta(days=1))
    issuers = {}
    for name in ("ca", "other"):
        key = new_key()
        issuers[name] = Issuer(self_signed(name, key, validity), key)
        (folder / f"{name}.pem").write_bytes(pem(issuers[name].certificate))
    usages = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    names = [x509.IPAddress(ip_address("127.0.0.1"))]
    for name, usage in zip(("broker", "oak"), usages, strict=True):
        key = new_key()
        made = issue(name, key.public_key(), issuers["ca"], validity, usage, names)
        (folder / f"{name}.pem").write_bytes(pem(made))
        write_key(folder / f"{name}.key", key)
    return folder


@pytest.fixture
def tls_broker(authority: Path) -> Iterator[FakeBroker]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority / "ca.pem")
    context.load_cert_chain(authority / "broker.pem", authority / "broker.key")
    context.verify_mode = ssl.CERT_REQUIRED
    with FakeBroker(context) as fake:
        yield fake


def test_both_ends_know_each_other(tls_broker: FakeBroker, outbox: Outbox, authority: Path) -> None:
    files = {"certificate": authority / "oak.pem", "key": authority / "oak.key"}
    with device(tls_broker, outbox, login={"ca": authority / "ca.pem", **files}) as oak:
        oak.put("result", {"leaf": "x" * 100_000})
        put(oak, 200)
        wait_until(lambda: is_empty(outbox), 20, "the outbox being empty")
    assert numbers(tls_broker) == list(range(200))
    wait_until(lambda: tls_broker.visits[-1].left, 10, "the farewell")


def test_a_broker_that_nobody_vouches_for_gets_nothing(
    tls_broker: FakeBroker, outbox: Outbox, authority: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with device(tls_broker, outbox, login={"ca": authority / "other.pem"}) as oak:
        put(oak, 1)
        wait_until(lambda: "check 'ca' and 'host'" in caplog.text, 10, "a complaint")
    assert not tls_broker.visits


def test_a_device_without_a_certificate_is_not_let_in(
    tls_broker: FakeBroker, outbox: Outbox, authority: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with device(tls_broker, outbox, login={"ca": authority / "ca.pem"}) as oak:
        wait_until(lambda: caplog.text.count("no connection") > 1, 10, "attempts")
        assert not oak.connected


# --- what comes ------------------------------------------------------------------------------


def test_what_comes_is_taken_whatever_was_wrong_with_the_one_before(
    broker: FakeBroker, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[tuple[str, bytes, bool]] = []

    def take(topic: str, payload: bytes, retained: bool) -> None:
        if payload == b"bad":
            raise KeyError("bad")
        if payload == b"full" and len(broker.visits) == 1:
            raise StateError("no room")
        came.append((topic, payload, retained))

    with device(broker, outbox, take=take, session_seconds=600) as oak:
        oak.subscribe("a/#")
        wait_until(lambda: broker.visits and broker.visits[0].filters, 10, "the subscription")
        for number, payload in enumerate([b"bad", b"good"], start=1):
            broker.push("a/b", payload, number)
        wait_until(lambda: came, 10, "the good one")
        wait_until(lambda: broker.acknowledged == [1, 2], 10, "both being acknowledged")
        broker.push("a/b", b"full", 3)
        wait_until(lambda: len(broker.visits) == 2 and oak.connected, 10, "another connect")
        assert broker.acknowledged == [1, 2]
        broker.push("a/b", b"full", 3)  # as a broker does that keeps the session
        wait_until(lambda: broker.acknowledged == [1, 2, 3], 10, "its being acknowledged")
    assert came == [("a/b", b"good", False), ("a/b", b"full", False)]
    assert "could not be used" in caplog.text
    assert not broker.visits[0].clean


def test_what_is_kept_is_acknowledged_after_it_and_in_order(
    broker: FakeBroker, outbox: Outbox
) -> None:
    came, kept, room = list[bytes](), list[bytes](), threading.Event()

    def take(_topic: str, payload: bytes, _retained: bool) -> None:
        if payload == b"3":
            raise KeyError("bad")
        came.append(payload)

    def keep() -> None:
        assert broker.acknowledged == list(range(1, 1 + len(kept)))
        assert room.wait(10)
        kept[:] = came

    with device(broker, outbox, take=take, keep=keep, session_seconds=600) as oak:
        oak.subscribe("a/#")
        wait_until(lambda: broker.visits and broker.visits[0].filters, 10, "the subscription")
        for number in range(1, 8):
            broker.push("a/b", str(number).encode(), number)
        wait_until(lambda: came, 10, "a message")
        assert broker.acknowledged == []
        room.set()
        wait_until(lambda: broker.acknowledged == list(range(1, 8)), 10, "all of them")
    assert kept == [b"1", b"2", b"4", b"5", b"6", b"7"]


def test_many_are_kept_at_once_and_few_soon(broker: FakeBroker, outbox: Outbox) -> None:
    sizes, came = list[int](), list[bytes]()

    def keep() -> None:
        sizes.append(len(came))
        came.clear()

    take = lambda _topic, payload, _retained: came.append(payload)  # noqa: E731
    with device(broker, outbox, take=take, keep=keep) as oak:
        oak.subscribe("a/#")
        wait_until(lambda: broker.visits and broker.visits[0].filters, 10, "the subscription")
        for number in range(1, 1201):
            broker.push("a/b", b"x", number)
        wait_until(lambda: len(broker.acknowledged) == 1200, 30, "all of them")
        assert max(sizes) <= common.session.KEEP_MESSAGES
        assert len(sizes) < 200
        begin = time.monotonic()
        broker.push("a/b", b"x", 1201)
        wait_until(lambda: len(broker.acknowledged) == 1201, 30, "a single one")
        assert sizes[-1] == 1
        assert time.monotonic() - begin < 10


def test_what_cannot_be_kept_comes_again(broker: FakeBroker, outbox: Outbox) -> None:
    full = threading.Event()
    full.set()

    def keep() -> None:
        if full.is_set():
            raise DiskError("no room")

    with device(broker, outbox, keep=keep, session_seconds=600) as oak:
        oak.subscribe("a/#")
        wait_until(lambda: broker.visits and broker.visits[0].filters, 10, "the subscription")
        broker.push("a/b", b"x", 1)
        wait_until(lambda: len(broker.visits) == 2 and oak.connected, 10, "another connect")
        assert broker.acknowledged == []
        full.clear()
        broker.push("a/b", b"x", 1)  # as a broker does that keeps the session
        wait_until(lambda: broker.acknowledged == [1], 10, "its being acknowledged")


def test_what_was_taken_last_is_kept_before_the_farewell(
    broker: FakeBroker, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.session, "QUIET_SECONDS", 100.0)
    monkeypatch.setattr(common.session, "KEEP_SECONDS", 100.0)
    came = list[bytes]()
    take = lambda _topic, payload, _retained: came.append(payload)  # noqa: E731
    with device(broker, outbox, take=take, keep=lambda: None) as oak:
        oak.subscribe("a/#")
        wait_until(lambda: broker.visits and broker.visits[0].filters, 10, "the subscription")
        broker.push("a/b", b"x", 1)
        wait_until(lambda: came, 10, "its coming")
        assert broker.acknowledged == []
    wait_until(lambda: broker.acknowledged == [1], 10, "its being acknowledged")


def test_what_is_said_for_latecomers_is_said_with_each_connect_and_when_it_changes(
    broker: FakeBroker, outbox: Outbox
) -> None:
    topic = "fieldfed/valley/models/stable"
    with device(broker, outbox) as oak:
        oak.retain(topic, bytes(bytearray(b'{"version":1}')))
        wait_until(lambda: broker.said("models/stable") == [b'{"version":1}'], 10, "the first")
        broker.cut()
        wait_until(lambda: len(broker.said("models/stable")) == 2, 10, "the same again")
        oak.retain(topic, bytes(bytearray(b'{"version":1}')))
        wait_until(lambda: len(broker.said("models/stable")) == 3, 10, "the same, said anew")
        oak.retain(topic, b'{"version":2}')
        wait_until(lambda: broker.said("models/stable")[3:] == [b'{"version":2}'], 10, "the next")
    assert all(one.retained for one in broker.messages if one.topic.endswith("/stable"))


# --- settings and ends -----------------------------------------------------------------------


def test_ports_follow_tls() -> None:
    assert Broker(host="hub").port == 1883
    assert Broker(host="hub", ca=Path("ca.pem")).port == 8883
    assert Broker(host="hub", ca=Path("ca.pem"), port=443).port == 443


@pytest.mark.parametrize(
    "wrong",
    [
        {"certificate": "c", "ca": "a"},
        {"certificate": "c", "key": "k"},
        {"password": "p"},
        {"port": 0},
        {"hots": "x"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Broker(host="hub", **wrong)


def test_names_and_files_that_cannot_be_used_are_refused(tmp_path: Path, outbox: Outbox) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a topic"):
        Connection(Broker(host="hub"), "valley", "oak/+", outbox)
    ca = tmp_path / "ca.pem"
    ca.write_text("no certificate")
    for path in (ca, tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match=r"cannot be used for TLS"):
            Connection(Broker(host="hub", ca=path), "valley", "oak", outbox)


def test_a_password_in_the_clear_is_warned_of(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    where = Broker(host="hub", username="oak", password=SecretStr("very secret"))
    Connection(where, "valley", "oak", outbox).stop()
    assert "unencrypted" in caplog.text
    assert "very secret" not in caplog.text + repr(where)


def test_it_ends_soon_whatever_it_waits_for(outbox: Outbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = Broker(host="127.0.0.1", port=server.getsockname()[1])
        with Connection(where, "valley", "oak", outbox) as oak:
            server.accept()[0].close()
        assert not oak._thread.is_alive()


# --- what came before ------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=200), st.integers(1, 40))
def test_what_comes_again_within_the_window_is_known(gaps: list[int], window: int) -> None:
    seen, sent = Seen(window=window), list[int]()
    for gap in gaps:
        sent.append((sent[-1] if sent else 0) + gap)
        assert seen.first("oak", sent[-1])
        again = sent[-2 * window :]
        assert not any(seen.first("oak", one) for one in again)
        assert seen.first("vine", sent[-1])


def test_what_was_missing_within_the_window_comes_late() -> None:
    seen = Seen(window=4)
    assert [seen.first("oak", one) for one in (1, 2, 5, 7, 3, 2, 7, 9)] == [
        *(True, True, True, True, True),
        *(False, False),
        True,
    ]


def test_devices_beyond_the_bound_are_forgotten() -> None:
    seen = Seen(devices=2)
    assert all(seen.first(name, 1) for name in ("oak", "vine", "oak2"))
    assert not seen.first("vine", 1)
    assert seen.first("oak", 1)
    assert len(seen._latest) == 2
