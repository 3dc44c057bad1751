"""``fieldfed-server doctor``: a network in good health, and one fault after the other in it."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from typer.testing import CliRunner

import common.checkup
import server.doctor
from client.identity import FarmIdentity
from common import certificates
from common.config import ServerConfig
from common.diagnosis import Level
from common.errors import DiagnosisError
from common.processes import Child, free_port, stop_all, wait_for_port
from common.release import FLOWER
from common.settings import load_settings
from server.cli import app
from server.doctor import examine
from server.identity import Authority
from server.proxy import UNTOLD
from server.registry import STABLE
from server.store import Store
from tests.lab.broker import FakeBroker
from tests.lab.devices import tell
from tests.lab.door import LabDoor, Link
from tests.lab.hub import LabHub
from tests.lab.network import draw_folder
from tests.lab.patient import Examined, Memory, contents, spoil
from tests.lab.proxy import Saying
from tests.lab.versions import NETWORK, two_versions

ROOT = Path(__file__).parent.parent.parent
HEALTHY = (
    *("settings", "weights", "source", "backbone", *["port"] * 5, "authority"),
    *("server certificate", "broker certificate", "broker certificate", "members"),
    *("signing keys", "broker", "programs", "files", "database fieldfed.db"),
    *("database registry.db", "database telemetry.db", "channel stable", "date", "disk", "memory"),
)


@dataclass(kw_only=True)
class Patient(Examined):
    """A server in good health, until a test does something to it."""

    settings: ClassVar = "server.toml"
    examine: ClassVar = examine

    broker: FakeBroker

    @property
    def identity(self) -> Path:
        return self.folder / "identity"

    def sign(self, farm: str, days: int) -> None:
        """A farm is given a certificate."""
        asks = FarmIdentity.create(self.folder.parent / farm, farm)
        Authority.open(self.identity).sign(asks.request(), days)

    def port(self, section: str) -> int:
        return int(self.sections[section]["port"])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each test gets a copy of."""
    root = tmp_path_factory.mktemp("pristine")
    folder = root / "server"
    with two_versions(folder) as registry:
        registry.promote(STABLE, 1)
    authority = Authority.create(folder / "identity", NETWORK, ["farms.example.org"])
    authority.certify_broker(folder / "broker", ["mqtt.example.org"])
    authority.sign(FarmIdentity.create(root / "apple", "apple").request())
    Store.open(folder / "fieldfed.db").close()
    tell(folder)
    draw_folder(root / "tomato", 2, 6, 1)
    for path in (root / "vit.safetensors", folder / "base.safetensors"):
        path.write_bytes(b"weights")
    (folder / "nodes.json").write_text("{}")
    return root


@pytest.fixture
def patient(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(8_000_000_000, 6_000_000_000))
    monkeypatch.setattr(server.doctor, "SPOOL_BYTES", 2_000_000)
    weights, source = tmp_path / "vit.safetensors", tmp_path / "tomato"
    with FakeBroker() as broker:
        sections: dict[str, dict[str, Any]] = {
            "server": {"name": NETWORK, "port": free_port()},
            "backbone": {"weights": str(weights), "source": str(source)},
            "door": {"port": free_port(), "names": ["farms.example.org"]},
            "hub": {"port": free_port()},
            "metrics": {"port": free_port()},
            "page": {"port": free_port()},
            "broker": {"host": "127.0.0.1", "port": broker.port},
        }
        found = Patient(
            folder=tmp_path / "server", root=tmp_path / "root", broker=broker, sections=sections
        )
        found.write()
        yield found


# --- all is well ---------------------------------------------------------------------------------


def test_a_server_in_good_health_has_no_fault_and_is_left_as_it_is(patient: Patient) -> None:
    before = contents(patient.folder)
    found = patient.look()
    assert [one.words for one in found if one.level is not Level.OK] == []
    assert tuple("port" if one.what.startswith("port") else one.what for one in found) == HEALTHY
    assert contents(patient.folder) == before


def test_a_server_that_was_only_just_set_up_lacks_nothing_but_its_backbone(tmp_path: Path) -> None:
    folder = tmp_path / "network"
    folder.mkdir()
    (folder / "server.toml").write_text(f"[server]\nport = {free_port()}\n")
    found = {one.what: one for one in examine(folder, tmp_path)}
    assert "the first 'up' makes them" in found["authority"].found
    assert found["backbone"].level is Level.WARN
    assert f"fieldfed-server pretrain {folder}" in found["backbone"].do
    assert [path.name for path in folder.iterdir()] == ["server.toml"]


def test_a_server_that_runs_holds_its_own_ports_and_is_not_disturbed(patient: Patient) -> None:
    """Door and hub in this process; figures and page in processes of their own."""
    config = load_settings(ServerConfig, patient.folder / "server.toml")
    assert config.hub is not None
    with ExitStack() as stack:
        door = LabDoor(patient.folder, Link())
        door.config = config
        stack.enter_context(door.running())
        hub = LabHub.__new__(LabHub)
        hub.folder, hub.config, hub.authority = patient.folder, config.hub, door.authority
        stack.enter_context(hub.running())
        for name in ("metrics", "page"):
            child = _service(name, patient)
            child.start()
            stack.callback(stop_all, [child])
            wait_for_port("127.0.0.1", patient.port(name), 60, child)
        store = stack.enter_context(Store.open(patient.folder / "fieldfed.db"))
        store.start_run("{}", 0, "a" * 64, "{}")
        before = contents(patient.folder)
        found = {one.what: one for one in patient.look()}
        assert [one.words for one in found.values() if one.level is not Level.OK] == []
        for name in ("door", "hub", "metrics", "page"):
            assert "our own program" in found[f"port {patient.port(name)}"].found
        after = contents(patient.folder)
    assert before.keys() == after.keys()
    for name in before:
        # what is in memory is one with this process's own, whose store is open to be written
        assert before[name] == after[name] or name.endswith("-shm"), name


def test_a_proxy_has_to_lead_to_the_door_that_it_stands_before(patient: Patient) -> None:
    number = free_port()
    patient.write(door={"host": "127.0.0.1", "proxy_port": number})
    what = f"port {number}"
    assert what not in {one.what for one in patient.look()}, "the door does not run"
    door = LabDoor(patient.folder, Link())
    door.config = load_settings(ServerConfig, patient.folder / "server.toml")
    with door.running():
        lacks = patient.faults()[what]
        assert "no farm comes in" in lacks.found
        assert lacks.do == "start the proxy before the door, or take proxy_port away"
        assert door.config.door is not None
        with Saying(UNTOLD).before(door.config.door, patient.folder):
            found = {one.what: one for one in patient.look()}
            assert "leads to the door" in found[what].found
            assert "our own program" in found[f"port {patient.port('door')}"].found


def _service(name: str, patient: Patient) -> Child:
    command = [sys.executable, "-P", "-m", f"server.{name}", str(patient.folder)]
    return Child(name, lambda: command, patient.root / f"{name}.log")


def test_the_command_says_a_line_for_each_and_ends_with_its_own_code(patient: Patient) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["doctor", str(patient.folder)])
    assert done.exit_code == 0, done.output
    assert all(line.startswith("ok ") for line in done.output.splitlines())
    (patient.folder / "fieldfed.db").write_bytes(b"?" * 9000)
    done = runner.invoke(app, ["doctor", str(patient.folder), "--json"])
    assert done.exit_code == DiagnosisError.exit_code
    lines = [json.loads(line) for line in done.output.splitlines()]
    (bad,) = [line for line in lines if line["level"] != "ok"]
    assert (bad["level"], bad["what"]) == ("FAULT", "database fieldfed.db")
    assert str(patient.folder / "fieldfed.db") in bad["found"]
    assert "restore this file from a backup" in bad["do"]


def test_it_needs_neither_torch_nor_flower(patient: Patient) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['flwr'] = None; "
        "from pathlib import Path; from server.doctor import examine; "
        "print(*[one.line for one in examine(Path(sys.argv[1]))], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(patient.folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "FAULT" not in done.stdout
    assert "ok     channel stable: it names version 1" in done.stdout


def test_flowers_release_is_the_pinned_one() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"flwr=={FLOWER}" in pins


# --- one fault after the other -------------------------------------------------------------------


def unknown_key(patient: Patient) -> None:
    patient.write(server={"prot": 1})


def no_weights(patient: Patient) -> None:
    (patient.folder / "base.safetensors").unlink()
    patient.sections["backbone"]["weights"] = "/nowhere/vit.safetensors"
    patient.write()


def no_source(patient: Patient) -> None:
    patient.write(backbone={"source": "/nowhere/tomato"})


def no_name(patient: Patient) -> None:
    patient.write(door={"host": "0.0.0.0", "names": []})


def other_address(patient: Patient) -> None:
    patient.write(hub={"host": "192.0.2.7", "names": ["farms.example.org"]})


def open_metrics(patient: Patient) -> None:
    patient.write(metrics={"host": "0.0.0.0"})


def new_name(patient: Patient) -> None:
    patient.write(door={"names": ["farms.example.org", "new.example.org"]})


def lost_authority(patient: Patient) -> None:
    (patient.identity / "ca.key").unlink()


def open_authority(patient: Patient) -> None:
    (patient.identity / "ca.key").chmod(0o640)


def damaged_server_certificate(patient: Patient) -> None:
    (patient.identity / "server.crt").write_text("none")


def old_authority(patient: Patient) -> None:
    old = datetime.now(UTC) - timedelta(days=4000)
    for name in ("identity", "broker"):
        shutil.rmtree(patient.folder / name)
    Authority.create(patient.identity, NETWORK, ["farms.example.org"], old)


def no_identity(patient: Patient) -> None:
    for name in ("identity", "broker"):
        shutil.rmtree(patient.folder / name)


def old_broker_certificate(patient: Patient) -> None:
    place = patient.folder / "broker" / "broker.crt"
    key, now = certificates.new_key(), datetime.now(UTC)
    when = certificates.Validity(now - timedelta(days=9), now - timedelta(days=2))
    place.write_bytes(certificates.pem(certificates.self_signed("broker", key, when)))


def ends_soon(patient: Patient) -> None:
    patient.sign("rice", days=20)
    patient.sign("pear", days=300)


def damaged_list(patient: Patient) -> None:
    with (patient.identity / "issued.jsonl").open("a") as file:
        file.write('{"farm": "rice"\n')


def lost_signing_key(patient: Patient) -> None:
    (key,) = (patient.folder / "signing").glob("*.pem")
    key.unlink()


def open_signing_key(patient: Patient) -> None:
    (key,) = (patient.folder / "signing").glob("*.pem")
    key.chmod(0o644)


def changed_keys(patient: Patient) -> None:
    path = patient.folder / "signing" / "keys.json"
    path.write_text(path.read_text().replace("valley", "valeys"))


def broker_elsewhere(patient: Patient) -> None:
    patient.write(broker={"port": free_port()})


def broker_bans(patient: Patient) -> None:
    patient.broker.answer = lambda _version: 0x87


def damaged_nodes(patient: Patient) -> None:
    (patient.folder / "nodes.json").write_text("{")


def damaged_store(patient: Patient) -> None:
    path = patient.folder / "fieldfed.db"
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\x05" * (len(data) - 4096))


def damaged_registry(patient: Patient) -> None:
    (patient.folder / "registry" / "registry.db").write_bytes(b"no database at all" * 500)


def damaged_telemetry(patient: Patient) -> None:
    path = patient.folder / "telemetry.db"
    path.write_bytes(path.read_bytes()[:5000])


def newer_store(patient: Patient) -> None:
    with closing(sqlite3.connect(patient.folder / "fieldfed.db")) as db:
        db.execute("PRAGMA user_version = 999")


def channel(patient: Patient, days: float) -> None:
    with closing(sqlite3.connect(patient.folder / "registry" / "registry.db")) as db, db:
        end = datetime.now(UTC).timestamp() + days * 86_400
        db.execute("UPDATE channels SET expires = ?", (end,))


def old_channel(patient: Patient) -> None:
    channel(patient, -1)


def channel_nobody_renews(patient: Patient) -> None:
    channel(patient, 5)


def open_token(patient: Patient) -> None:
    (patient.folder / "page.token").write_text("secret")
    (patient.folder / "page.token").chmod(0o644)


def revoked_but_there(patient: Patient) -> None:
    patient.sign("farm0", days=300)  # whose device is online, by what devices told
    Authority.open(patient.identity).revoke("farm0")


def from_tomorrow(patient: Patient) -> None:
    later = datetime.now(UTC).timestamp() + 86_400
    os.utime(patient.folder / "fieldfed.db", (later, later))


def left_over(patient: Patient) -> None:
    path = patient.folder / "spool" / "1" / "3.replies"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(3_000_000)


@pytest.mark.parametrize(
    ("plant", "level", "what", "cause", "remedy"),
    [
        (unknown_key, "FAULT", "settings", "server.prot: Extra inputs", "correct '"),
        (no_source, "FAULT", "source", "no image folder at '/nowhere/tomato'", "[backbone] source"),
        (no_name, "FAULT", "settings", "[door] listens everywhere", "set its names"),
        (other_address, "FAULT", "port", "'192.0.2.7' cannot be listened on", "set [hub] host"),
        (open_metrics, "FAULT", "settings", "are not encrypted", "127.0.0.1"),
        (new_name, "warn", "server certificate", "new.example.org", "restart fieldfed-server up"),
        (lost_authority, "FAULT", "authority", "ca.key' is lost", "restore the folder"),
        (open_authority, "FAULT", "authority", "ca.key' is open to other users", "chmod 600"),
        (damaged_server_certificate, "FAULT", "authority", "server.crt' is no X.509", "remove"),
        (old_authority, "FAULT", "authority", "it has expired", "every farm has to join again"),
        (no_identity, "FAULT", "authority", "there is no '", "restore it from a backup"),
        (old_broker_certificate, "FAULT", "broker certificate", "has expired", "certify-broker"),
        (ends_soon, "warn", "members", "of 3, 1 have certificates that end", "enrol or revoke"),
        (damaged_list, "FAULT", "members", "line 2 of '", "restore the file from a backup"),
        (lost_signing_key, "FAULT", "signing keys", "no signing key at", "from a backup"),
        (open_signing_key, "FAULT", "signing keys", "others may read", "chmod 600"),
        (changed_keys, "FAULT", "signing keys", "keys.json'", "restore it from a backup"),
        (broker_elsewhere, "FAULT", "broker", "Connection refused", "see that the broker runs"),
        (broker_bans, "FAULT", "broker", "Not authorized", "allow this device to connect"),
        (damaged_nodes, "FAULT", "files", "nodes.json' is damaged", "register again"),
        (damaged_store, "FAULT", "database fieldfed.db", "is damaged", "from a backup"),
        (damaged_registry, "FAULT", "database registry.db", "is damaged", "from a backup"),
        (damaged_telemetry, "FAULT", "database telemetry.db", "is damaged", "begins anew"),
        (newer_store, "FAULT", "database fieldfed.db", "schema version 999", "newer fieldfed"),
        (old_channel, "FAULT", "channel stable", "devices take nothing", "up with a [hub]"),
        (channel_nobody_renews, "warn", "channel stable", "is signed until", "signs it again"),
        (open_token, "warn", "secrets", "page.token' holds a secret", "chmod 600"),
        (revoked_but_there, "warn", "devices", "of revoked farms", "revoked.crl"),
        (from_tomorrow, "FAULT", "date", "the clock has gone back", "timedatectl"),
        (left_over, "warn", "spool", "3 MB of replies wait", "it sweeps what is left"),
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
    assert [name.partition(" ")[0] if what == "port" else name for name in found] == [what]
    (only,) = found.values()
    assert only.level == level
    assert cause in only.found
    assert remedy in only.do
    assert contents(patient.folder) == before


@pytest.mark.parametrize("how", ["garbage", "empty", "folder"])
def test_whatever_is_damaged_is_named_and_nothing_is_raised(patient: Patient, how: str) -> None:
    silent = ("objects", "broker", "revoked.crl", "base.safetensors", "codes.lock", "objects.lock")
    for path in [one for one in patient.folder.rglob("*") if one.is_file()]:
        if set(path.parts) & set(silent):
            continue
        before, mode = path.read_bytes(), path.stat().st_mode
        spoil(path, how)
        bad = [one for one in patient.look() if one.level is Level.FAULT]
        new = how == "empty" and path.suffix in (".db", ".jsonl", ".toml")  # that is how they begin
        if not new:
            assert any(path.name in one.words for one in bad), (path, [one.line for one in bad])
        if path.is_dir():
            path.rmdir()
        path.write_bytes(before)
        path.chmod(mode)


def test_weights_are_missed_until_there_is_a_backbone(patient: Patient) -> None:
    patient.write(backbone={"weights": "/nowhere/vit.safetensors"})
    found = patient.faults()
    assert list(found) == ["weights"]
    assert found["weights"].level is Level.WARN
    no_weights(patient)
    found = patient.faults()
    assert list(found) == ["weights", "backbone"]
    assert found["weights"].level is Level.FAULT
    assert "no '/nowhere/vit.safetensors'" in found["weights"].found
    assert "correct [backbone] weights" in found["weights"].do


@pytest.mark.parametrize("section", ["server", "door", "hub", "metrics", "page"])
def test_a_port_that_another_program_holds(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    monkeypatch.setattr(common.checkup, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(server.doctor_ports, "ANSWER_SECONDS", 0.2)
    number = patient.port(section)
    with socket.create_server(("127.0.0.1", number)):
        found = patient.faults()
    assert list(found) == [f"port {number}"]
    assert f"held by process {os.getpid()}" in found[f"port {number}"].found
    assert f"choose another [{section}] port" in found[f"port {number}"].do


def test_the_door_of_another_network_is_not_ours(patient: Patient) -> None:
    other = LabDoor(patient.root / "other", Link())
    patient.write(door={"port": other.port})
    with other.running():
        found = patient.faults()
    assert list(found) == [f"port {other.port}"]
    assert "none of ours" in found[f"port {other.port}"].found


def test_another_server_of_the_same_kind_is_not_ours(patient: Patient) -> None:
    """It answers as ours would, and works in another folder."""
    with Link().running() as link:
        patient.write(server={"port": link.port})
        found = patient.faults()
    assert list(found) == [f"port {link.port}"]


def test_a_full_disk_little_memory_and_another_flower(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**10, 10**10 - 10**7, 10**7))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(8_000_000_000, 100_000_000))
    versions = {"flwr": "1.20.0", "torch": "2", "timm": "1"}
    monkeypatch.setattr(common.checkup, "installed", versions.get)
    found = patient.faults()
    assert list(found) == ["programs", "disk", "memory"]
    assert "Flower 1.20.0; this release was made for Flower" in found["programs"].found
    assert "pip install -c constraints.txt 'fieldfed[server]'" in found["programs"].do
    assert "10 MB left; a run needs 2,000" in found["disk"].found
    assert "0.1 GB of it free" in found["memory"].found
