"""A farm joins with a code, renews its certificate, leaves; and what is said when it cannot."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import client.door
import client.joining
import server.codes
import server.enrol
from client.door import Way, ask, check, way_of
from client.identity import FarmIdentity
from client.joining import address_in, faults, join_by_code, keep_young, leave, renew
from common.code import JoinRequest, Secret, new_code
from common.config import FarmSection
from common.door import CHECK, JOIN
from common.errors import ConfigError, FieldfedError, LinkError, ProtocolError
from common.membership import Membership
from server.codes import Codes
from server.door import LOOK_SECONDS
from server.enrol import Failures, enrol, members, revoke
from tests.lab.door import LabDoor, Link, stranger


@pytest.fixture
def door(tmp_path: Path) -> Iterator[LabDoor]:
    with Link().running() as link, LabDoor(tmp_path / "server", link).running() as running:
        yield running


def code_for(door: LabDoor, farm: str = "apple", hours: float = 24) -> str:
    return enrol(door.config, door.folder, farm, hours)


class Device:
    """A farm's folder on a device."""

    def __init__(self, folder: Path, farm: str = "apple") -> None:
        self.folder = folder
        self.identity = FarmIdentity.create(folder / "identity", farm)
        self.farm = FarmSection(name=farm, data=Path("none"))

    def keep(self, membership: Membership) -> None:
        self.identity.accept(membership.certificate.encode(), membership.authority.encode())
        (self.folder / "membership.json").write_text(membership.model_dump_json())

    def join(self, door: LabDoor, code: str) -> Membership:
        return join_by_code(self.identity, self.keep, door.url, code)

    @property
    def way(self) -> Way:
        return way_of(self.farm, self.folder)


# --- joining -------------------------------------------------------------------------------------


def test_a_device_joins_with_a_code_and_is_let_in(door: LabDoor, tmp_path: Path) -> None:
    device = Device(tmp_path / "apple")
    member = device.join(door, code_for(door))
    assert (member.farm, member.network, member.door) == ("apple", "orchard", door.address)
    assert device.way.address == door.address
    checked = check(device.way)
    assert checked.farm == "apple"
    assert checked.superlink
    assert faults(device.way, member, tmp_path) == []
    assert "PRIVATE" not in member.model_dump_json()
    (row,) = members(door.folder, datetime.now(UTC))
    assert (row["farm"], row["state"]) == ("apple", "member")


def test_a_code_is_good_for_one_device(door: LabDoor, tmp_path: Path) -> None:
    code = code_for(door)
    device = Device(tmp_path / "first")
    device.join(door, code)
    with pytest.raises(LinkError, match="wrong, expired or used"):
        Device(tmp_path / "second").join(door, code)
    device.join(door, code.lower())  # its answer may have been lost


def test_a_code_is_good_for_one_farm_and_one_network(door: LabDoor, tmp_path: Path) -> None:
    code = code_for(door, "apple")
    code_for(door, "rice")
    for farm in ("rice", "nobody"):
        with pytest.raises(LinkError, match="farm of another name"):
            Device(tmp_path / farm, farm).join(door, code)
    Device(tmp_path / "apple").join(door, code)


def test_an_expired_code_is_refused(door: LabDoor, tmp_path: Path) -> None:
    code = Codes(door.folder / "identity").new("apple", 1, datetime.now(UTC) - timedelta(hours=2))
    with pytest.raises(LinkError, match="expired"):
        Device(tmp_path / "apple").join(door, code)


def test_a_newer_code_takes_the_place_of_the_older(door: LabDoor, tmp_path: Path) -> None:
    old, new = code_for(door), code_for(door)
    with pytest.raises(LinkError):
        Device(tmp_path / "a").join(door, old)
    Device(tmp_path / "b").join(door, new)


def test_codes_cannot_be_tried_out(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, device = code_for(door), Device(tmp_path / "apple")
    for _ in range(server.enrol.ADDRESS_FAILURES):
        with pytest.raises(LinkError, match="wrong"):
            device.join(door, new_code())
    with pytest.raises(LinkError, match="too many wrong codes; wait ten minutes"):
        device.join(door, code)  # even the right one
    assert Codes(door.folder / "identity").all()["apple"].failures == 5


def test_a_code_that_was_tried_too_often_is_void(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.codes, "MOST_FAILURES", 3)
    code, device = code_for(door), Device(tmp_path / "apple")
    for _ in range(3):
        with pytest.raises(LinkError, match="wrong"):
            device.join(door, new_code())
    with pytest.raises(LinkError, match="wrong"):
        device.join(door, code)
    (row,) = members(door.folder, datetime.now(UTC))
    assert row["code"].startswith("void")


def test_failures_are_forgotten_in_time_and_counted_in_all() -> None:
    now = [0.0]
    failures = Failures(lambda: now[0])
    for number in range(server.enrol.ADDRESS_FAILURES):
        assert not failures.too_many("a"), number
        failures.add("a")
    assert failures.too_many("a")
    assert not failures.too_many("b")
    for number in range(server.enrol.ALL_FAILURES):
        failures.add(f"address {number}")
    assert failures.too_many("b")
    now[0] = server.enrol.WINDOW_SECONDS + 1
    assert not failures.too_many("a")


def test_the_code_itself_is_nowhere_on_the_server(door: LabDoor, tmp_path: Path) -> None:
    code = code_for(door)
    Device(tmp_path / "apple").join(door, code)
    plain = code.replace("-", "")
    for path in door.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert code.encode() not in data, path
            assert plain.encode() not in data, path
    codes = door.folder / "identity" / "codes.json"
    assert codes.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"request": "x"}',
        b"\xff",
        json.dumps({"request": "x" * 60_000, "proof": "0" * 128}).encode(),
    ],
)
def test_a_malformed_request_is_refused(door: LabDoor, body: bytes) -> None:
    with pytest.raises(LinkError, match=r"\(400\)"):
        ask(door.address, stranger(), JOIN, body)


def test_a_request_that_is_not_signed_by_its_key_is_refused(door: LabDoor) -> None:
    proof = "00" * 64
    body = JoinRequest(request="no request", proof=proof).model_dump_json().encode()
    with pytest.raises(LinkError, match=r"\(400\).*no certificate request"):
        ask(door.address, stranger(), JOIN, body)


# --- somebody in between -------------------------------------------------------------------------


class Between:
    """Ends TLS with a certificate of their own and passes on what is said, both ways."""

    def __init__(self, door: LabDoor, folder: Path) -> None:
        self._door = door
        own = LabDoor(folder, door.link)
        assert own.authority
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        identity = folder / "identity"
        self._tls.load_cert_chain(identity / "server.crt", identity / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard = b""

    def __enter__(self) -> "Between":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(20)

    def _run(self) -> None:
        raw, _ = self._listener.accept()
        with self._tls.wrap_socket(raw, server_side=True) as near:
            head = near.recv(100_000)
            while b"\r\n\r\n" not in head or not head.endswith(b"}"):
                head += near.recv(100_000)
            self.heard = head.partition(b"\r\n\r\n")[2]
            with (
                socket.create_connection(("127.0.0.1", self._door.port)) as far,
                stranger().wrap_socket(far) as tls,
            ):
                tls.sendall(head)
                while data := tls.recv(100_000):
                    near.sendall(data)


def test_somebody_in_between_can_pass_nothing_on(door: LabDoor, tmp_path: Path) -> None:
    code, device = code_for(door), Device(tmp_path / "apple")
    with (
        Between(door, tmp_path / "theirs") as between,
        pytest.raises(LinkError, match="wrong, expired or used"),
    ):
        join_by_code(device.identity, device.keep, between.url, code)
    assert not (device.folder / "membership.json").exists()
    assert code.replace("-", "").encode() not in between.heard
    device.join(door, code)  # and the code is not used up


def test_a_server_that_does_not_know_the_code_is_not_believed(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They let everybody join, to become the farm's network."""
    code_for(door)
    monkeypatch.setattr("common.code.Verifier.accepts", lambda *_: True)
    device = Device(tmp_path / "apple")
    with pytest.raises(ProtocolError, match="does not know the code: somebody may be in between"):
        device.join(door, new_code())
    assert not (device.folder / "membership.json").exists()


# --- what a farmer mistypes, and what is wrong ---------------------------------------------------


@pytest.mark.parametrize("url", ["http://x:1", "x:8443", "https://", "https://x:y", "https://x/y"])
def test_a_mistyped_address_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match="https://HOST:PORT"):
        address_in(url)


def test_the_port_may_be_left_out() -> None:
    assert address_in("https://farms.example.org/") == "farms.example.org:8443"


def test_a_door_by_a_name_that_its_certificate_lacks_is_said(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "apple")
    member = device.join(door, code_for(door))
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: resolve("127.0.0.1", *rest, **more)
    )
    assert device.way.tls is not None
    with pytest.raises(LinkError, match=r"other names .*\[door\] names"):
        ask(f"elsewhere.example:{door.port}", device.way.tls(), CHECK)
    assert member.farm == "apple"


def test_another_network_at_the_same_address_is_said(door: LabDoor, tmp_path: Path) -> None:
    device = Device(tmp_path / "apple")
    device.join(door, code_for(door))
    with LabDoor(tmp_path / "other", door.link).running() as other:
        assert device.way.tls is not None
        with pytest.raises(LinkError, match="not of the network that this farm joined"):
            ask(other.address, device.way.tls(), CHECK)


def test_a_wrong_clock_is_said(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "apple")
    member = device.join(door, code_for(door))

    class Clock(datetime):
        ahead = timedelta(seconds=60)

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + cls.ahead

    monkeypatch.setattr(client.door, "datetime", Clock)
    (fault,) = faults(device.way, member, tmp_path)
    assert "s ahead of the server's; set it (NTP)" in fault
    Clock.ahead = -timedelta(minutes=10)
    (fault,) = faults(device.way, member, tmp_path)
    assert "s behind the server's" in fault


def test_what_else_is_wrong_is_all_said(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "apple")
    member = device.join(door, code_for(door))
    monkeypatch.setattr(client.joining, "ROOM_BYTES", 1e18)
    member = member.model_copy(update={"hub": "127.0.0.1:1"})
    hub, disk = faults(device.way, member, tmp_path)
    assert "hub at 127.0.0.1:1 cannot be reached" in hub
    assert "MB left" in disk


def test_a_farm_on_another_machine_has_to_join_first(tmp_path: Path) -> None:
    device = Device(tmp_path / "apple")
    assert device.way == Way("127.0.0.1:8000")
    far = FarmSection(name="apple", data=Path("none"), superlink="farms.example.org:8443")
    with pytest.raises(ConfigError, match="no member of its network; join it first"):
        way_of(far, tmp_path / "apple")
    near = FarmSection(name="apple", data=Path("none"), superlink="localhost:9000")
    assert way_of(near, tmp_path / "apple") == Way("localhost:9000")


# --- afterwards ----------------------------------------------------------------------------------


def test_a_certificate_is_renewed_in_time_by_itself(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "apple")
    device.join(door, code_for(door))
    way = device.way
    assert way.tls is not None
    assert not renew(device.identity, way, device.keep)
    before, tls = device.identity.credentials(), way.tls()
    monkeypatch.setattr(client.joining, "RENEW_DAYS", 400)
    monkeypatch.setattr(client.joining, "FIRST_LOOK_SECONDS", 0.01)
    stop = threading.Event()
    kept = list[Membership]()

    def keep(membership: Membership) -> None:
        device.keep(membership)
        kept.append(membership)
        stop.set()

    keep_young(device.identity, way, keep, stop)
    after = device.identity.credentials()
    assert after.certificate != before.certificate
    assert after.key == before.key
    assert kept[0].door == door.address
    assert way.tls() is not tls, "connections show the new one"
    check(way)


def test_a_farm_renews_for_itself_alone(door: LabDoor, tmp_path: Path) -> None:
    device, other = Device(tmp_path / "apple"), Device(tmp_path / "rice", "rice")
    device.join(door, code_for(door))
    assert device.way.tls is not None
    second = FarmIdentity.create(tmp_path / "apple" / "second", "apple")
    for request in (other.identity.request(), second.request(), b"nonsense"):
        with pytest.raises(LinkError, match=r"\(400\)"):
            ask(door.address, device.way.tls(), "/v1/renew", request)


def test_who_is_revoked_stays_out_and_needs_a_new_key(door: LabDoor, tmp_path: Path) -> None:
    device = Device(tmp_path / "apple")
    device.join(door, code_for(door))
    assert revoke(door.config, door.folder, "apple") == 1
    assert revoke(door.config, door.folder, "apple") == 0
    with pytest.raises(LinkError, match="revoked"):
        check(device.way)
    with pytest.raises(LinkError, match="key of this device was revoked"):
        device.join(door, code_for(door))
    again = Device(tmp_path / "anew")
    again.join(door, code_for(door))
    check(again.way)
    with pytest.raises(ConfigError, match="never given a certificate"):
        revoke(door.config, door.folder, "nobody")
    code_for(door, "rice")
    assert revoke(door.config, door.folder, "rice") == 0, "an open code is taken back as well"


def test_a_farm_leaves(door: LabDoor, tmp_path: Path) -> None:
    device = Device(tmp_path / "apple")
    device.join(door, code_for(door))
    tls = device.identity.tls()
    assert leave(device.identity, device.way, device.folder) is None
    with pytest.raises(LinkError, match="revoked"):
        ask(door.address, tls, CHECK)
    assert not list(device.folder.rglob("*.pem"))
    assert not (device.folder / "membership.json").exists()
    (row,) = members(door.folder, datetime.now(UTC))
    assert row["state"] == "revoked"
    back = Device(device.folder)
    back.join(door, code_for(door))
    check(back.way)


def test_a_farm_hears_that_it_has_left_however_long_that_takes(
    door: LabDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "apple")
    device.join(door, code_for(door))

    def slow(*which: Any) -> int:
        left = revoke(*which)
        time.sleep(3 * LOOK_SECONDS)  # the door looks for revoked farms meanwhile, and cuts them
        return left

    monkeypatch.setattr(server.enrol, "revoke", slow)
    assert leave(device.identity, device.way, device.folder) is None


def test_a_farm_leaves_also_when_nobody_hears(tmp_path: Path) -> None:
    with Link().running() as link:
        with LabDoor(tmp_path / "server", link).running() as door:
            device = Device(tmp_path / "apple")
            device.join(door, code_for(door))
        fault = leave(device.identity, device.way, device.folder)
    assert fault is not None
    assert "cannot be reached" in fault
    assert not list(device.folder.rglob("*.pem"))


# --- the operator --------------------------------------------------------------------------------


@pytest.mark.parametrize(("farm", "hours"), [("a b", 1), ("", 1), ("apple", 0), ("apple", 200)])
def test_codes_for_nobody_or_for_ever_are_not_made(door: LabDoor, farm: str, hours: float) -> None:
    with pytest.raises(ConfigError):
        code_for(door, farm, hours)


def test_a_damaged_list_of_codes_is_said(door: LabDoor, tmp_path: Path) -> None:
    code = code_for(door)
    (door.folder / "identity" / "codes.json").write_text("{")
    with pytest.raises(LinkError, match=r"\(503\).*trouble of its own"):
        Device(tmp_path / "apple").join(door, code)
    with pytest.raises(FieldfedError, match="remove it"):
        code_for(door)


def test_guesses_cost_a_tenth_of_a_second_of_memory() -> None:
    """What the docstring of common/code.py counts with."""
    assert Secret.of(new_code(), "apple").verifier != Secret.of(new_code(), "apple").verifier
    from common import code

    assert 128 * code._SCRYPT_N * code._SCRYPT_R == 32 << 20
