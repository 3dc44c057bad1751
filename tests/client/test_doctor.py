"""``fieldfed-client doctor``: a farm in good health, and one fault after the other in it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

import client.door
import client.reach
import common.checkup
import common.greeting
import server.passage
import server.publish
from client import traffic
from client.cli import app
from client.doctor import examine
from client.ledger import FILE, Kind, Ledger
from client.member import Member
from client.serving import Serving
from common import certificates
from common.broker import Broker
from common.diagnosis import Level
from common.door import Checking
from common.errors import DiagnosisError
from common.greeting import greet
from common.membership import Membership
from common.processes import free_port
from common.protocols import PROTOCOL
from server.identity import Authority
from server.members import member_of
from server.registry import STABLE, Registry
from tests.client.test_health import PI4, lay
from tests.lab.broker import FakeBroker
from tests.lab.bundles import favouring, serve
from tests.lab.door import LabDoor, Link
from tests.lab.hub import LabHub
from tests.lab.network import draw_folder
from tests.lab.patient import Examined, Memory, contents, spoil
from tests.lab.versions import NETWORK, add_version, learnt, model_of, two_versions
from tests.waiting import wait_until

HEALTHY = (
    *("settings", "images", "camera", "version", "membership", "key", "certificate", "door"),
    *("SuperLink", "clock", "protocol", "hub", "broker", "port", "programs", "files"),
    *("database ledger.db", "date", "disk", "memory", "power", "temperature"),
)


@dataclass
class Network:
    """A server whose door, hub and broker really listen."""

    folder: Path
    door: LabDoor
    hub: LabHub
    registry: Registry
    broker: FakeBroker
    pristine: Path


@dataclass(kw_only=True)
class Patient(Examined):
    """A farm in good health, until a test does something to it."""

    settings: ClassVar = "farm.toml"
    examine: ClassVar = examine

    network: Network
    data: Path

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def identity(self) -> Path:
        return self.state / "identity"

    def member(self, **changes: object) -> None:
        """The membership, with these changes."""
        path = self.state / "membership.json"
        told = Membership.load(path).model_copy(update=changes)
        path.write_text(told.model_dump_json())

    def certify(self, authority: Authority, days: int) -> None:
        """Another certificate for its key."""
        request = Member.of(self.folder).identity.request()
        (self.identity / "certificate.pem").write_bytes(authority.sign(request, days))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network") / "server"
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.passage, "OWN_BURST", 1000.0)  # more patients than a farm is
        registry = stack.enter_context(two_versions(folder))
        registry.promote(STABLE, 1)
        hub = stack.enter_context(LabHub(folder).running())
        link = stack.enter_context(Link().running())
        door = stack.enter_context(LabDoor(folder, link).running())
        broker = stack.enter_context(FakeBroker())
        pristine = folder.parent / "pristine"
        found = Network(folder, door, hub, registry, broker, pristine)
        _found_farm(found)
        yield found


def _found_farm(network: Network) -> None:
    """The farm that each test gets a copy of."""
    folder = network.pristine / "apple"
    draw_folder(network.pristine / "photos", 2, 12, 3)
    (network.pristine / "camera").mkdir()
    (folder / "state").mkdir(parents=True)
    (folder / "farm.toml").write_text('[farm]\nname = "apple"\ndata = "photos"\n')
    member = Member.of(folder)
    request = member.identity.request()
    member.join(
        member_of(network.door.config, network.folder, request, network.hub.address).model_copy(
            update={"door": network.door.address}
        )
    )
    serving = Serving(folder / "state" / "serving")
    serve(serving, network.registry, 1, favouring(network.registry.manifest(1).spec.width, 0))
    with Ledger.open(folder / "state" / FILE) as ledger:
        ledger.add(Kind.REQUEST, 10, "hub")
    traffic.keep(folder / "state", traffic.Counters())
    lay(network.pristine / "root", PI4)


@pytest.fixture
def patient(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    shutil.copytree(network.pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(4_000_000_000, 3_000_000_000))
    sections: dict[str, dict[str, Any]] = {
        "farm": {"name": "apple", "data": str(tmp_path / "photos")},
        "broker": {"host": "127.0.0.1", "port": network.broker.port},
        "watch": {"folder": str(tmp_path / "camera")},
        "metrics": {"port": free_port()},
    }
    found = Patient(
        network=network,
        folder=tmp_path / "apple",
        data=tmp_path / "photos",
        root=tmp_path / "root",
        sections=sections,
    )
    found.write()
    yield found
    network.broker.answer = lambda _version: 0


# --- all is well ---------------------------------------------------------------------------------


def test_a_farm_in_good_health_has_no_fault_and_is_left_as_it_is(patient: Patient) -> None:
    before = contents(patient.folder)
    found = patient.look()
    assert [one.words for one in found if one.level is not Level.OK] == []
    assert tuple("port" if one.what.startswith("port") else one.what for one in found) == HEALTHY
    assert contents(patient.folder) == before
    assert not any(one.do for one in found)


def test_a_farm_without_a_network_broker_or_camera_is_well_beside_its_server(
    patient: Patient,
) -> None:
    shutil.rmtree(patient.identity)
    (patient.state / "membership.json").unlink()
    link = patient.network.door.link.port
    patient.sections = {"farm": patient.sections["farm"] | {"superlink": f"127.0.0.1:{link}"}}
    patient.write()
    before = contents(patient.folder)
    assert patient.faults() == {}
    assert contents(patient.folder) == before, "looking makes no key"


def test_the_command_says_a_line_for_each_and_ends_with_its_own_code(patient: Patient) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["doctor", str(patient.folder)])
    assert done.exit_code == 0, done.output
    assert all(line.startswith("ok ") for line in done.output.splitlines())
    shutil.rmtree(patient.data)
    done = runner.invoke(app, ["doctor", str(patient.folder), "--json"])
    assert done.exit_code == DiagnosisError.exit_code == 11
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert {tuple(line) for line in lines} == {("level", "what", "found", "do")}
    (bad,) = [line for line in lines if line["level"] != "ok"]
    assert (bad["level"], bad["what"]) == ("FAULT", "images")
    assert str(patient.data) in bad["found"]


def test_nothing_there_at_all_is_said_without_being_made(tmp_path: Path) -> None:
    found = {one.what: one for one in examine(tmp_path / "nowhere")}
    assert found["settings"].level is Level.FAULT
    assert "fieldfed-client init" in found["settings"].do
    assert list(tmp_path.iterdir()) == []


def test_it_needs_neither_torch_nor_flower() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['flwr'] = None; "
        "from pathlib import Path; from client.doctor import examine; "
        "print(*[one.line for one in examine(Path(sys.argv[1]))], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "/nowhere/at/all"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "FAULT  settings: no settings at" in done.stdout


# --- one fault after the other -------------------------------------------------------------------


def unknown_key(patient: Patient) -> None:
    patient.write(farm={"nmae": "x"})


def no_settings(patient: Patient) -> None:
    (patient.folder / "farm.toml").unlink()


def no_data(patient: Patient) -> None:
    shutil.rmtree(patient.data)


def one_class(patient: Patient) -> None:
    for part in ("train", "test"):
        shutil.rmtree(patient.data / part / "class1")


def few_images(patient: Patient) -> None:
    for path in sorted((patient.data / "train" / "class1").iterdir())[2:]:
        path.unlink()


def some_images(patient: Patient) -> None:
    for path in sorted((patient.data / "train" / "class1").iterdir())[5:]:
        path.unlink()


def no_camera(patient: Patient) -> None:
    patient.write(watch={"folder": "/var/nowhere"})


def damaged_bundle(patient: Patient) -> None:
    (path,) = (patient.state / "serving" / "bundles").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])


def cut_off_tensor(patient: Patient) -> None:
    first = next(one for one in (patient.state / "serving" / "objects").rglob("*") if one.is_file())
    first.write_bytes(first.read_bytes()[:-1])


def damaged_serving(patient: Patient) -> None:
    (patient.state / "serving" / "serving.json").write_text('{"current": "x')


def damaged_membership(patient: Patient) -> None:
    (patient.state / "membership.json").write_bytes(b"\xff{")


def other_name(patient: Patient) -> None:
    patient.write(farm={"name": "pear"})


def readable_key(patient: Patient) -> None:
    (patient.identity / "key.pem").chmod(0o640)


def damaged_key(patient: Patient) -> None:
    (patient.identity / "key.pem").write_text("no key")


def lost_key(patient: Patient) -> None:
    (patient.identity / "key.pem").unlink()


def expired(patient: Patient) -> None:
    place, now = patient.network.folder / "identity", datetime.now(UTC)
    issuer = certificates.Issuer(
        certificates.read_certificate(place / "ca.crt", ""),
        certificates.read_key(place / "ca.key", ""),
    )
    key = certificates.read_key(patient.identity / "key.pem", "").public_key()
    when = certificates.Validity(now - timedelta(hours=20), now - timedelta(hours=2))
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    old = certificates.issue("apple", key, issuer, when, usage)
    (patient.identity / "certificate.pem").write_bytes(certificates.pem(old))


def ends_soon(patient: Patient) -> None:
    patient.certify(patient.network.hub.authority, days=10)


def wrong_authority(patient: Patient) -> None:
    patient.certify(Authority.create(patient.folder.parent / "other", NETWORK, []), days=90)


def door_elsewhere(patient: Patient) -> None:
    patient.member(door=f"127.0.0.1:{free_port()}")


def hub_elsewhere(patient: Patient) -> None:
    patient.member(hub=f"127.0.0.1:{free_port()}")


def wrong_channel(patient: Patient) -> None:
    patient.write(farm={"channel": "canary"})


def broker_elsewhere(patient: Patient) -> None:
    patient.write(broker={"port": free_port()})


def broker_refuses(patient: Patient) -> None:
    patient.network.broker.answer = lambda _version: 0x86


def damaged_ledger(patient: Patient) -> None:
    path = patient.state / "ledger.db"
    path.write_bytes(b"\0" * path.stat().st_size)


def damaged_traffic(patient: Patient) -> None:
    (patient.state / "traffic.json").write_text('{"sent": ')


def open_secret(patient: Patient) -> None:
    path = patient.state / "privacy.key"
    path.write_bytes(b"x" * 32)
    path.chmod(0o644)


def from_tomorrow(patient: Patient) -> None:
    later = datetime.now(UTC).timestamp() + 86_400
    os.utime(patient.state / "membership.json", (later, later))


def not_in_step(patient: Patient) -> None:
    (patient.root / "run/systemd/timesync").mkdir(parents=True)


def under_voltage(patient: Patient) -> None:
    lay(patient.root, {"sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"})


def under_voltage_before(patient: Patient) -> None:
    lay(patient.root, {"sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n"})


def hot(patient: Patient) -> None:
    lay(patient.root, {"sys/class/thermal/thermal_zone0/temp": "84000\n"})


def small_container(patient: Patient) -> None:
    lay(patient.root, {"sys/fs/cgroup/memory.max": "1000000000\n"})


@pytest.mark.parametrize(
    ("plant", "level", "what", "cause", "remedy"),
    [
        (unknown_key, "FAULT", "settings", "farm.nmae: Extra inputs", "correct '"),
        (no_settings, "FAULT", "settings", "no settings at", "fieldfed-client init"),
        (no_data, "FAULT", "images", "no image folder at", "give a folder of CLASS/*.jpg"),
        (one_class, "FAULT", "images", "only one class ('class0')", "a classifier needs two"),
        (few_images, "FAULT", "images", "class 'class1' has 2: it needs 3", "add photographs"),
        (some_images, "warn", "images", "class 'class1' has only 5", "10 or more of each"),
        (no_camera, "FAULT", "camera", "no folder '/var/nowhere'", "[watch] folder"),
        (damaged_bundle, "FAULT", "version", ".safetensors' is missing or damaged", "update"),
        (cut_off_tensor, "FAULT", "version", "is missing or cut off, as are 1 of", "client update"),
        (damaged_serving, "FAULT", "version", "serving.json' is damaged", "client update"),
        (damaged_membership, "FAULT", "membership", "membership.json' is no membership", "certify"),
        (other_name, "FAULT", "membership", "in the settings it is pear", 'name = "apple"'),
        (readable_key, "FAULT", "key", "open to other users (mode 640)", "chmod 600 '"),
        (damaged_key, "FAULT", "key", "key.pem' is damaged", "restore it from a backup"),
        (lost_key, "FAULT", "key", "key.pem' is missing", "join the network again"),
        (expired, "FAULT", "certificate", "'apple' expired on", "join the network again"),
        (ends_soon, "warn", "certificate", "it is good for 9 days", "renews it at the door"),
        (wrong_authority, "FAULT", "certificate", "was not issued by", "join the network again"),
        (door_elsewhere, "FAULT", "door", "cannot be reached", "see that the server is up"),
        (hub_elsewhere, "FAULT", "hub", "cannot be reached", "fieldfed-server doctor"),
        (wrong_channel, "warn", "hub", "there are: stable", "correct [farm] channel"),
        (broker_elsewhere, "FAULT", "broker", "Connection refused", "the broker runs"),
        (broker_refuses, "FAULT", "broker", "Bad user name", "correct 'username'"),
        (damaged_ledger, "FAULT", "database ledger.db", "ledger.db' is damaged", "set aside"),
        (damaged_traffic, "FAULT", "files", "traffic.json' is damaged", "remove it"),
        (open_secret, "warn", "secrets", "other users may read it (mode 644)", "chmod 600"),
        (from_tomorrow, "FAULT", "date", "the clock has gone back", "timedatectl"),
        (not_in_step, "warn", "date", "nothing keeps it in step", "timedatectl set-ntp true"),
        (under_voltage, "FAULT", "power", "the voltage is too low now", "use the supply"),
        (under_voltage_before, "warn", "power", "too low since the last boot", "use the supply"),
        (hot, "warn", "temperature", "84 degrees", "give it air"),
        (small_container, "warn", "memory", "1.0 GB,", "compressed swap"),
    ],
)
def test_a_fault_is_found_where_it_is_and_nowhere_else(
    patient: Patient,
    plant: Callable[[Patient], None],
    level: str,
    what: str,
    cause: str,
    remedy: str,
) -> None:
    plant(patient)
    before = contents(patient.folder)
    found = patient.faults()
    assert list(found) == [what], [one.words for one in found.values()]
    assert found[what].level == level
    assert cause in found[what].found
    assert remedy in found[what].do
    assert contents(patient.folder) == before


@pytest.mark.parametrize("how", ["garbage", "empty", "folder"])
def test_whatever_is_damaged_is_named_and_nothing_is_raised(patient: Patient, how: str) -> None:
    (patient.state / "trust.json").write_text("{}")
    files = [path for path in patient.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    first_tensor = next(path for path in files if "objects" in path.parts)
    for path in files:
        if path.suffix == ".lock" or ("objects" in path.parts and path != first_tensor):
            continue
        before = path.read_bytes()
        spoil(path, how)
        bad = [one for one in patient.look() if one.level is Level.FAULT]
        empty_database = how == "empty" and path.suffix == ".db"  # which SQLite takes for a new one
        if not empty_database:
            assert any(path.name in one.words for one in bad), (path, [one.line for one in bad])
        if path.is_dir():
            path.rmdir()
        path.write_bytes(before)
        path.chmod(0o600)


def test_a_full_disk(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    for free, level in ((300_000_000, Level.WARN), (2_000_000, Level.FAULT)):
        usage = Usage(10**10, 10**10 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, usage=usage: usage)
        found = patient.faults()
        assert list(found) == ["disk"]
        assert found["disk"].level is level
        assert f"{free // 1_000_000} MB left; a farm needs 500" in found["disk"].found
        assert "make room" in found["disk"].do


def test_other_releases_of_flower(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str | None] = {"torch": "2", "timm": "1"}
    monkeypatch.setattr(common.checkup, "installed", lambda name: versions.get(name))
    for flower, level in (("1.41.7", Level.WARN), ("1.38.0", Level.FAULT), (None, Level.FAULT)):
        versions["flwr"] = flower
        found = patient.faults()
        assert list(found) == ["programs"]
        assert found["programs"].level is level
        assert (f"Flower {flower}" if flower else "not installed") in found["programs"].found
        assert "pip install -c constraints.txt 'fieldfed[client]'" in found["programs"].do


def _late(seconds: float, now: float, *, usegmt: bool) -> str:
    return formatdate(now - seconds, usegmt=usegmt)


def test_a_clock_that_is_ten_seconds_ahead_of_the_servers(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The door's own clock is late, so its Date header is."""
    with monkeypatch.context() as patch:
        patch.setattr("uvicorn.server.formatdate", partial(_late, 10))
        with LabDoor(patient.network.folder, patient.network.door.link).running() as late:
            patient.member(door=late.address)
            found = patient.faults()
    assert list(found) == ["clock"]
    assert "s ahead of the server's" in found["clock"].found
    assert "set it (NTP)" in found["clock"].do
    patient.member(door=patient.network.door.address)  # which looks at its clock each second
    wait_until(lambda: "clock" not in patient.faults(), 30, "a door with the right date")


def test_a_door_before_nothing(patient: Patient) -> None:
    with LabDoor(patient.network.folder, Link(port=free_port())).running() as door:
        patient.member(door=door.address)
        found = patient.faults()
    assert list(found) == ["SuperLink"]
    assert "SuperLink behind it does not answer" in found["SuperLink"].found
    assert "fieldfed-server doctor" in found["SuperLink"].do


@pytest.mark.parametrize(
    ("number", "where"), [(PROTOCOL + 1, "on this farm"), (PROTOCOL - 1, "on the server")]
)
def test_a_server_of_another_protocol(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    monkeypatch.setattr(server.passage, "PROTOCOL", number)
    found = patient.faults()
    assert list(found) == ["protocol"]
    assert f"speaks protocol {number}, this farm {PROTOCOL}" in found["protocol"].found
    assert f"install the newer fieldfed {where}" in found["protocol"].do


def test_a_server_that_tells_no_release_is_an_older_one(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.reach, "Checking", lambda versions: Checking(versions=False))
    found = patient.look()
    assert all(one.level is Level.OK for one in found)
    assert "protocol" not in [one.what for one in found]


def test_a_network_that_takes_every_line_and_says_nothing(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.door, "ASK_SECONDS", 0.3)
    monkeypatch.setattr(client.reach, "REACH_SECONDS", 0.3)
    monkeypatch.setattr(common.greeting, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        number = silent.getsockname()[1]
        patient.member(door=f"127.0.0.1:{number}", hub=f"127.0.0.1:{number}")
        for broker in ({"port": number}, {"port": number, "ca": str(patient.identity / "ca.pem")}):
            patient.write(broker=broker)
            found = patient.faults()
            assert list(found) == ["door", "hub", "broker"]
            assert "timed out" in found["door"].found
            assert "deadline" in found["hub"].found
        (patient.state / "membership.json").unlink()
        patient.write(farm={"superlink": f"127.0.0.1:{number}"})
        found = patient.faults()
        assert list(found) == ["SuperLink"]
        assert "timed out" in found["SuperLink"].found


def test_another_network_at_the_same_addresses(patient: Patient, network: Network) -> None:
    theirs = Authority.create(patient.folder.parent / "other", NETWORK, [])
    patient.certify(theirs, days=90)
    (patient.identity / "ca.pem").write_bytes(theirs.server_credentials().ca)
    found = patient.faults()
    assert set(found) == {"door", "hub"}
    assert "not of the network that this farm joined" in found["door"].found
    assert "join again" in found["door"].do
    assert "leave it and join again" in found["hub"].do


def test_a_farm_that_was_revoked(patient: Patient, network: Network) -> None:
    shutil.rmtree(patient.identity)
    patient.write(farm={"name": "pear"})
    member = Member.of(patient.folder)
    member.join(
        member_of(
            network.door.config, network.folder, member.identity.request(), network.hub.address
        ).model_copy(update={"door": network.door.address})
    )
    assert patient.faults() == {}
    network.hub.authority.revoke("pear")
    found = patient.faults()
    assert set(found) == {"door", "hub"}
    assert "is revoked" in found["door"].found
    assert "ask the operator" in found["door"].do
    assert "is revoked" in found["hub"].found
    assert "new code" in found["hub"].do


def test_a_version_that_is_about_to_end(
    patient: Patient, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.publish, "VERSION_DAYS", 5.0)
    model, spec = model_of()
    row = add_version(network.registry, learnt(model, 9), spec)
    classifier = favouring(network.registry.manifest(row.counter).spec.width, 0)
    serve(Serving(patient.state / "serving"), network.registry, row.counter, classifier)
    found = patient.faults()
    assert list(found) == ["version"]
    assert f"version {row.counter} is in use, good until" in found["version"].found
    assert f"fieldfed-client update {patient.folder}" in found["version"].do


def test_a_port_that_another_program_holds(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.checkup, "ANSWER_SECONDS", 0.2)
    number = patient.sections["metrics"]["port"]
    with socket.create_server(("127.0.0.1", number)):
        found = patient.faults()
    assert list(found) == [f"port {number}"]
    assert f"held by process {os.getpid()}" in found[f"port {number}"].found
    assert "choose another [metrics] port" in found[f"port {number}"].do


# --- while the farm runs -------------------------------------------------------------------------


HOLDS = """
import sys, time
from pathlib import Path
from common.outbox import Outbox
with Outbox.open(Path(sys.argv[1])) as outbox:
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def running(patient: Patient) -> Iterator[Patient]:
    """A process has the outbox for itself, as the agent does."""
    command = [sys.executable, "-P", "-c", HOLDS, str(patient.state / "outbox.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield patient
        finally:
            process.kill()


def test_a_farm_that_runs_is_looked_at_and_not_disturbed(running: Patient) -> None:
    visits = len(running.network.broker.visits)
    before = contents(running.folder)
    found = {one.what: one for one in running.look()}
    assert all(one.level is Level.OK for one in found.values())
    assert "this farm's program has the connection" in found["broker"].found
    assert "in use by its program" in found["database outbox.db"].found
    assert len(running.network.broker.visits) == visits, "its name was not used a second time"
    assert contents(running.folder) == before


def test_after_a_power_cut_the_outbox_is_no_fault(patient: Patient) -> None:
    command = [sys.executable, "-P", "-c", HOLDS, str(patient.state / "outbox.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
    assert (patient.state / "outbox.db-wal").exists()
    before = contents(patient.folder)
    found = {one.what: one for one in patient.look()}
    assert all(one.level is Level.OK for one in found.values())
    assert "checks it at its start" in found["database outbox.db"].found
    assert contents(patient.folder) == before


def test_hello_to_a_broker_publishes_nothing_and_keeps_the_session(network: Network) -> None:
    broker = Broker(host="127.0.0.1", port=network.broker.port)
    before = len(network.broker.messages)

    def with_what_waited(_version: int) -> int:
        network.broker.push("fieldfed/valley/rounds", b"{}", 7)
        return 0

    network.broker.answer = with_what_waited
    greet(broker, "valley", "oak", 3600)
    visit = network.broker.visits[-1]
    wait_until(lambda: visit.left, 20, "a farewell")
    assert 7 not in network.broker.acknowledged, "it is the device's to hear"
    assert visit.client == "fieldfed-valley-oak"
    assert visit.will is None
    assert not visit.clean, "what waits for the device goes on waiting"
    assert len(network.broker.messages) == before
    network.broker.answer = lambda version: 0x84 if version == 5 else 0
    try:
        greet(broker, "valley", "oak", 3600)  # an older broker
        assert network.broker.visits[-1].version == 4
    finally:
        network.broker.answer = lambda _version: 0
