"""The certificate authority: what it signs, what it refuses, what a crash leaves."""

import base64
import errno
import hashlib
import importlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

from client.identity import ClientFiles, FarmIdentity
from common.broker import Broker
from common.errors import ConfigError, DiskError, ProtocolError, StateError
from common.files import lock, write_atomically
from server.cli import app
from server.identity import Authority, ServerFiles, expiries
from server.issued import Revocations

grpc: Any = importlib.import_module("grpc")  # it has no types

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
FILES = ("issued.jsonl", "ca.key", "ca.crt", "server.key", "server.crt")
SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "identity"


@pytest.fixture
def authority(folder: Path) -> Authority:
    return Authority.create(folder, "valley", ["farms.example.org"], NOW)


def certificate(data: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(data)


def read(path: Path) -> x509.Certificate:
    return certificate(path.read_bytes())


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def request(
    farm: str | list[str] = "rice",
    key: SigningKey | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    names = [farm] if isinstance(farm, str) else farm
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    key = key or new_key()
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(Encoding.PEM)


def kinds(made: x509.Certificate) -> set[str]:
    return {type(extension.value).__name__ for extension in made.extensions}


def constraints(made: x509.Certificate) -> x509.BasicConstraints:
    return made.extensions.get_extension_for_class(x509.BasicConstraints).value


def usages(made: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def hosts(made: x509.Certificate) -> set[str]:
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


# --- create and open -----------------------------------------------------------------------


def test_a_new_authority_signs_itself_and_the_server(authority: Authority, folder: Path) -> None:
    ca, made = read(folder / "ca.crt"), read(folder / "server.crt")
    assert ca.subject.rfc4514_string() == "CN=valley certificate authority"
    ca.verify_directly_issued_by(ca)
    assert {type(found.value).__name__ for found in ca.extensions if found.critical} == {
        "BasicConstraints",
        "KeyUsage",
    }
    assert constraints(ca) == x509.BasicConstraints(ca=True, path_length=0)
    assert ca.not_valid_before_utc == NOW - DAY
    assert ca.not_valid_after_utc == NOW + timedelta(days=3652)
    made.verify_directly_issued_by(ca)
    assert not constraints(made).ca
    assert usages(made) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert hosts(made) == {"localhost", "127.0.0.1", "farms.example.org"}
    assert made.not_valid_before_utc == NOW - DAY
    assert made.not_valid_after_utc == NOW + timedelta(days=731)
    assert authority.network == Authority.open(folder).network == "valley"


def test_private_keys_are_for_their_owner_alone(authority: Authority, folder: Path) -> None:
    modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in FILES}
    assert modes["ca.key"] == modes["server.key"] == 0o600
    assert "PRIVATE" not in repr(authority.server_credentials(NOW))
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_keys_are_p256(authority: Authority, folder: Path) -> None:
    for name in ("ca.key", "server.key"):
        key = load_pem_private_key((folder / name).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP256R1)


def test_hosts_are_names_or_addresses_each_once(folder: Path) -> None:
    asked = ["10.0.0.7", "fd00::7", "Farms.Example.ORG", "farms.example.org", "localhost", "pi4"]
    Authority.create(folder, "valley", asked, NOW)
    found = read(folder / "server.crt").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    names, addresses = (
        found.value.get_values_for_type(x509.DNSName),
        found.value.get_values_for_type(x509.IPAddress),
    )
    assert names == ["localhost", "farms.example.org", "pi4"]
    assert [str(address) for address in addresses] == ["127.0.0.1", "10.0.0.7", "fd00::7"]


@pytest.mark.parametrize(
    "host",
    [
        *("", " ", "a b", "https://a.org", "a.org:8000", "a.org/x", "-a.org", "a-.org", "a..org"),
        *("10.0.0.300", "1.2.3", "[::1]", "*.a.org", "bücher.de", "a.org\n", "a" * 64, "a." * 127),
    ],
)
def test_what_is_no_host_is_named_and_nothing_is_made(folder: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="is neither a DNS name nor an IP address") as raised:
        Authority.create(folder, "valley", [host], NOW)
    assert repr(host) in str(raised.value)
    assert "without scheme, port or path" in str(raised.value)
    assert not folder.exists()


@pytest.mark.parametrize("network", ["", "a/b", "a b", "x" * 41, "valley\n", "täl"])
def test_a_network_needs_a_plain_name(folder: Path, network: str) -> None:
    with pytest.raises(ConfigError, match="a name has 1-40 letters, digits, '_' or '-'"):
        Authority.create(folder, network, [], NOW)


def test_an_authority_is_never_overwritten(authority: Authority, folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in FILES}
    with pytest.raises(StateError) as raised:
        Authority.create(folder, "other", [], NOW)
    assert str(raised.value) == (
        f"'{folder}' already holds the certificate authority of network 'valley'; use that one, or "
        "move the folder away and create a new authority: every farm then has to join again"
    )
    assert {name: (folder / name).read_bytes() for name in FILES} == before


class PowerCut(BaseException):
    pass


def cut_off(patch: pytest.MonkeyPatch, folder: Path, writes: int) -> None:
    """Create an authority on a machine that loses its power after so many writes."""
    left = writes

    def crashing(path: Path, data: bytes, durable: bool = True) -> None:
        nonlocal left
        if left == 0:
            raise PowerCut
        left -= 1
        write_atomically(path, data, durable)

    patch.setattr("server.identity.write_atomically", crashing)
    patch.setattr("common.certificates.write_atomically", crashing)
    with pytest.raises(PowerCut):
        Authority.create(folder, "valley", [], NOW)
    patch.undo()


@pytest.mark.parametrize("writes", range(4))
def test_a_second_create_completes_what_a_crash_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    cut_off(monkeypatch, folder, writes)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(kept) == 1 + writes
    missing = FILES[1 + writes]
    with pytest.raises(StateError, match=f"'{folder}': {missing} is missing; create it, which"):
        Authority.open(folder)
    Authority.create(folder, "valley", [], NOW)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(made) == set(FILES)
    # without its certificate the server's key was never used
    kept.pop("server.key", None)
    assert {name: made[name] for name in kept} == kept
    Authority.open(folder).server_credentials(NOW)


def test_what_is_half_made_keeps_the_name_of_its_network(
    authority: Authority, folder: Path
) -> None:
    (folder / "server.crt").unlink()
    with pytest.raises(StateError, match="belongs to network 'valley', not 'hill'; create it with"):
        Authority.create(folder, "hill", [], NOW)


@pytest.mark.parametrize("name", ["server.key", "server.crt"])
def test_a_lost_file_of_the_server_is_made_anew(
    authority: Authority, folder: Path, name: str
) -> None:
    ca = (folder / "ca.crt").read_bytes()
    (folder / name).unlink()
    with pytest.raises(StateError, match=f"{name} is missing; create it, which keeps what is"):
        Authority.open(folder)
    Authority.create(folder, "valley", [], NOW).server_credentials(NOW)
    assert (folder / "ca.crt").read_bytes() == ca


def test_a_crash_leaves_no_certificate_of_another_key(
    authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "server.key").unlink()
    cut_off(monkeypatch, folder, writes=1)
    with pytest.raises(StateError, match=r"server\.crt is missing; create it, which keeps what"):
        Authority.open(folder)
    Authority.create(folder, "valley", [], NOW).server_credentials(NOW)


@pytest.mark.parametrize("name", ["issued.jsonl", "ca.key", "ca.crt"])
@pytest.mark.parametrize("others", [FILES, FILES[:3]], ids=["whole", "without a server"])
def test_a_lost_file_of_the_authority_is_never_made_anew(
    authority: Authority, folder: Path, name: str, others: tuple[str, ...]
) -> None:
    authority.sign(request(), now=NOW)
    for other in FILES:
        if other == name or other not in others:
            (folder / other).unlink()
    there = sorted(folder.iterdir())
    message = (
        f"'{folder / name}' is lost; restore the folder from a backup, or move the folder away and "
        "create a new authority: every farm then has to join again"
    )
    with pytest.raises(StateError, match=re.escape(message)):
        Authority.create(folder, "valley", [], NOW)
    with pytest.raises(StateError, match=re.escape(message)):
        Authority.open(folder)
    assert sorted(folder.iterdir()) == there


@pytest.mark.parametrize("name", ["ca.key", "server.key"])
def test_a_private_key_that_others_may_read_is_refused(
    authority: Authority, folder: Path, name: str
) -> None:
    path = folder / name
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(StateError) as raised:
            Authority.open(folder)
        assert str(raised.value) == (
            f"private key '{path}' is open to other users (mode {mode:o}); run: chmod 600 '{path}'"
        )
    path.chmod(0o400)
    Authority.open(folder)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("damage", [b"", b"\0" * 300, b"half"])
def test_a_damaged_file_is_named_with_what_to_do(
    authority: Authority, folder: Path, name: str, damage: bytes
) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:150] if damage == b"half" else damage)
    remedy = "restore the folder from a backup" if "ca" in name else "remove server.key and"
    for attempt in (Authority.open, lambda f: Authority.create(f, "valley", [], NOW)):
        with pytest.raises(StateError, match=f"'{path}' is .*; {remedy}"):
            attempt(folder)


def test_another_kind_of_key_is_named(authority: Authority, folder: Path) -> None:
    other = rsa.generate_private_key(65537, 2048)
    data = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "ca.key").write_bytes(data)
    with pytest.raises(StateError, match=r"ca\.key' holds no ECDSA key on P-256; restore"):
        Authority.open(folder)


def test_files_of_two_authorities_do_not_mix(
    authority: Authority, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    Authority.create(other, "valley", [], NOW)
    mine = (folder / "ca.key").read_bytes()
    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(StateError, match=r"ca\.crt' is not for the key in '.*ca\.key'; restore"):
        Authority.open(folder)
    (folder / "ca.key").write_bytes(mine)
    for name in ("server.key", "server.crt"):
        (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(StateError, match=r"of 'valley server' was not issued by 'valley certif"):
        Authority.open(folder).server_credentials(NOW)


def test_a_folder_without_an_authority_says_so(folder: Path) -> None:
    with pytest.raises(StateError, match=f"no complete certificate authority in '{folder}'"):
        Authority.open(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=r"cannot write '.*': .*; make room, or let this user wr"):
        Authority.create(tmp_path / "file" / "identity", "valley", [], NOW)


# --- sign ----------------------------------------------------------------------------------


def test_a_farm_gets_a_certificate_for_its_key_and_name(authority: Authority, folder: Path) -> None:
    key = new_key()
    made = certificate(authority.sign(request("rice_2-b", key), now=NOW))
    assert made.subject.rfc4514_string() == "CN=rice_2-b"
    assert made.public_key() == key.public_key()
    made.verify_directly_issued_by(read(folder / "ca.crt"))
    assert usages(made) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert constraints(made) == x509.BasicConstraints(ca=False, path_length=None)
    assert made.not_valid_before_utc == NOW - DAY
    assert made.not_valid_after_utc == NOW + 397 * DAY
    shorter = certificate(authority.sign(request(), days=7, now=NOW))
    assert shorter.not_valid_after_utc == NOW + 7 * DAY


def test_what_a_certificate_is_good_for_is_not_for_the_farm_to_say(authority: Authority) -> None:
    wishes = (
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName("farms.example.org")]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"),
    )
    plain = certificate(authority.sign(request(), now=NOW))
    made = certificate(authority.sign(request(extensions=wishes), now=NOW))
    assert not constraints(made).ca
    assert usages(made) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert kinds(made) == kinds(plain)
    assert "SubjectAlternativeName" not in kinds(made)


def test_serial_numbers_are_long_and_never_repeat(authority: Authority) -> None:
    asked, count = request(), 20
    serials = {certificate(authority.sign(asked, now=NOW)).serial_number for _ in range(count)}
    assert len(serials) == count
    assert min(serials) > 2**96


@pytest.mark.parametrize("name", ["a/b", "../etc", "a b", "x" * 41, "ri\0ce", "reis\n", "süd", "*"])
def test_a_name_that_is_none_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        authority.sign(request(name), now=NOW)
    assert str(raised.value) == (
        f"a request for farm {name!r}: a name has 1-40 letters, digits, '_' or '-'"
    )
    assert authority.issued() == ()


@pytest.mark.parametrize("names", [[], ["rice", "maize"]])
def test_a_request_has_one_name(authority: Authority, names: list[str]) -> None:
    message = f"a subject needs one common name, and this one has {len(names)}"
    with pytest.raises(ProtocolError, match=message):
        authority.sign(request(names), now=NOW)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["rsa", "p384", "secp256k1", "ed25519"],
)
def test_another_kind_of_key_is_refused(authority: Authority, key: SigningKey) -> None:
    with pytest.raises(ProtocolError, match="the key of the request is not an ECDSA key on P-256"):
        authority.sign(request(key=key), now=NOW)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0\xff", request()[:200]),
        request().replace(b"CERTIFICATE REQUEST", b"CERTIFICATE"),
    ],
    ids=["empty", "noise", "half", "another label"],
)
def test_what_is_no_request_is_refused(authority: Authority, data: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"no certificate request \(PKCS #10\) in PEM form"):
        authority.sign(data, now=NOW)


def test_a_long_request_is_not_even_read(authority: Authority) -> None:
    with pytest.raises(ProtocolError, match="the request has 100326 bytes; 16384 are allowed"):
        authority.sign(b"\n" * 100_000 + b"x" * 326, now=NOW)


def test_a_tampered_request_is_refused(authority: Authority) -> None:
    asked = x509.load_pem_x509_csr(request("rice")).public_bytes(Encoding.DER)
    changed = x509.load_der_x509_csr(asked.replace(b"rice", b"mice")).public_bytes(Encoding.PEM)
    with pytest.raises(ProtocolError) as raised:
        authority.sign(changed, now=NOW)
    assert str(raised.value) == "the request is not signed by its own key; make a new request"


def test_no_byte_of_a_request_can_be_changed(authority: Authority) -> None:
    asked = x509.load_pem_x509_csr(request("rice")).public_bytes(Encoding.DER)
    for place in range(len(asked)):
        changed = bytearray(asked)
        changed[place] ^= 1 + place % 255
        text = base64.encodebytes(changed)
        text = b"-----BEGIN CERTIFICATE REQUEST-----\n" + text
        with pytest.raises(ProtocolError):
            authority.sign(text + b"-----END CERTIFICATE REQUEST-----\n", now=NOW)
    assert authority.issued() == ()


@pytest.mark.parametrize("days", [0, -1, 3653, 10**12])
def test_days_out_of_range_are_refused(authority: Authority, days: int) -> None:
    with pytest.raises(ConfigError, match=f"a certificate for {days} days: choose 1 to 3652"):
        authority.sign(request(), days, NOW)


def test_no_certificate_outlives_the_authority(authority: Authority) -> None:
    late = NOW + 3600 * DAY
    made = certificate(authority.sign(request(), now=late))
    assert made.not_valid_after_utc == NOW + 3652 * DAY


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (NOW + 3653 * DAY, "expired on 2036-04-30 12:00 UTC, and this machine's clock says"),
        (NOW - 2 * DAY, "is valid from 2026-04-30 12:00 UTC, and this machine's clock says"),
    ],
)
def test_an_authority_signs_only_in_its_time(
    authority: Authority, folder: Path, when: datetime, message: str
) -> None:
    for attempt in (
        lambda: authority.sign(request(), now=when),
        lambda: authority.renew_server(["other.example.org"], when),
    ):
        with pytest.raises(StateError, match=message) as raised:
            attempt()
        assert f"'{folder / 'ca.crt'}' cannot sign: " in str(raised.value)
    assert authority.issued() == ()


# --- the list of certificates --------------------------------------------------------------


def test_every_certificate_is_on_record(authority: Authority, folder: Path) -> None:
    key = new_key()
    made = certificate(authority.sign(request("rice", key), now=NOW))
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    (line,) = (folder / "issued.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "farm": "rice",
        "serial": f"{made.serial_number:x}",
        "key": hashlib.sha256(spki).hexdigest(),
        "issued": "2026-05-01T12:00:00Z",
        "expires": "2027-06-02T12:00:00Z",
    }
    authority.sign(request("maize"), now=NOW)
    again = Authority.open(folder).issued()
    assert [issued.farm for issued in again] == ["rice", "maize"]


def test_a_farm_that_left_does_not_hide_the_next_certificate_to_end(
    authority: Authority, folder: Path
) -> None:
    assert "farms" not in expiries(folder, NOW)
    authority.sign(request("left"), days=10, now=NOW)
    authority.sign(request("rice", key := new_key()), days=20, now=NOW)
    authority.sign(request("rice", key), days=60, now=NOW)
    authority.sign(request("maize"), days=30, now=NOW)
    days = {0: 10, 11: 30, 31: 60, 61: 60}
    for later, end in days.items():
        found = expiries(folder, NOW + timedelta(days=later))
        assert found["farms"] == NOW + timedelta(days=end), later


def test_it_is_on_disk_before_the_certificate_is_given(
    authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match=r"cannot use '.*issued\.jsonl': Input/output error"):
        authority.sign(request(), now=NOW)
    assert synced == [(folder / "issued.jsonl").stat().st_size]
    assert synced[0] > 0


def test_two_farms_with_one_key_are_refused(authority: Authority) -> None:
    key = new_key()
    authority.sign(request("rice", key), now=NOW)
    authority.sign(request("rice", key), now=NOW + DAY)
    with pytest.raises(ProtocolError) as raised:
        authority.sign(request("maize", key), now=NOW)
    assert str(raised.value) == (
        "the key of farm 'maize' was already given to farm 'rice' (2026-05-01 12:00 UTC), and two "
        "devices must not have one key; move the identity folder of 'maize' away, so that it makes "
        "a key of its own, and join again"
    )
    assert len(authority.issued()) == 2


def test_a_line_that_a_crash_cut_off_is_dropped(authority: Authority, folder: Path) -> None:
    key, path = new_key(), folder / "issued.jsonl"
    authority.sign(request("rice", key), now=NOW)
    whole = path.read_bytes()
    for length in (1, 40, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        assert len(authority.issued()) == 1
        authority.sign(request("maize"), now=NOW)
        assert [issued.farm for issued in authority.issued()] == ["rice", "maize"]
        with pytest.raises(ProtocolError, match="was already given to farm 'rice'"):
            authority.sign(request("soy", key), now=NOW)


def test_a_damaged_line_stops_signing(authority: Authority, folder: Path) -> None:
    path = folder / "issued.jsonl"
    authority.sign(request("rice"), now=NOW)
    path.write_bytes(path.read_bytes() + b"noise\n" + path.read_bytes())
    before = path.read_bytes()
    for attempt in (lambda: authority.sign(request(), now=NOW), authority.issued):
        with pytest.raises(StateError) as raised:
            attempt()
        assert str(raised.value) == (
            f"line 2 of '{path}' is damaged; restore the file from a backup, or remove that line"
        )
    assert path.read_bytes() == before


def test_a_lost_list_stops_signing(authority: Authority, folder: Path) -> None:
    (folder / "issued.jsonl").unlink()
    with pytest.raises(StateError, match=r"issued\.jsonl' is lost; restore the folder from a bac"):
        authority.sign(request(), now=NOW)


def test_of_many_at_once_with_one_key_one_farm_wins(authority: Authority, folder: Path) -> None:
    key = new_key()
    requests = [request(f"farm{number}", key) for number in range(8)]

    def sign(asked: bytes) -> bool:
        try:
            Authority.open(folder).sign(asked, now=NOW)
        except ProtocolError:
            return False
        return True

    with futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(sign, requests)) == 1
        assert all(pool.map(sign, [request(f"other{number}") for number in range(8)]))
    assert len(authority.issued()) == 9


def test_who_signs_waits_for_who_writes_the_list(authority: Authority, folder: Path) -> None:
    with futures.ThreadPoolExecutor(1) as pool, (folder / "issued.jsonl").open("ab") as other:
        assert lock(other)
        signing = pool.submit(authority.sign, request(), now=NOW)
        with pytest.raises(futures.TimeoutError):
            signing.result(timeout=0.3)
        other.close()
        assert certificate(signing.result(timeout=20))


# --- the server's certificate --------------------------------------------------------------


def test_nothing_is_renewed_that_need_not_be(authority: Authority, folder: Path) -> None:
    before = (folder / "server.crt").read_bytes()
    assert not authority.renew_server(["farms.example.org"], NOW + 700 * DAY)
    assert not authority.renew_server(["127.0.0.1", "FARMS.example.org"], NOW)
    assert (folder / "server.crt").read_bytes() == before


@pytest.mark.parametrize("asked", [[], ["10.0.0.7"], ["farms.example.org", "10.0.0.7"]])
def test_other_hosts_are_certified_once(
    authority: Authority, folder: Path, asked: list[str]
) -> None:
    assert authority.renew_server(asked, NOW)
    assert not authority.renew_server(asked, NOW)
    made = certificate(authority.server_credentials(NOW).certificate)
    assert hosts(made) == {"localhost", "127.0.0.1", *asked}


def test_the_server_is_renewed_when_less_than_30_days_are_left(
    authority: Authority, folder: Path
) -> None:
    asked, key = ["farms.example.org"], (folder / "server.key").read_bytes()
    assert not authority.renew_server(asked, NOW + 701 * DAY)
    late = NOW + 701 * DAY + timedelta(seconds=1)
    assert authority.renew_server(asked, late)
    assert not authority.renew_server(asked, late)
    assert read(folder / "server.crt").not_valid_after_utc == late + 731 * DAY
    assert (folder / "server.key").read_bytes() == key


def test_a_certificate_that_ends_with_its_authority_is_not_made_again_and_again(
    authority: Authority,
) -> None:
    late = NOW + 3640 * DAY
    assert authority.renew_server(["farms.example.org"], late)
    assert not authority.renew_server(["farms.example.org"], late + DAY)


def test_an_expired_certificate_of_the_server_says_what_to_do(
    authority: Authority, folder: Path
) -> None:
    with pytest.raises(StateError) as raised:
        authority.server_credentials(NOW + 800 * DAY)
    assert str(raised.value) == (
        f"'{folder / 'server.crt'}' is of no use: the certificate of 'valley server' expired on "
        "2028-05-01 12:00 UTC, and this machine's clock says 2028-07-09 12:00 UTC; if that is "
        "right, a new one is needed; renew it, or remove server.key and server.crt and create "
        "again: both are made anew"
    )


# --- the broker ----------------------------------------------------------------------------


def test_what_a_broker_is_given(authority: Authority, folder: Path, tmp_path: Path) -> None:
    authority.certify_broker(tmp_path / "broker", ["mqtt.example.org", "10.0.0.7"], NOW)
    assert (tmp_path / "broker" / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()
    for name, subject, usage in (
        ("broker", "valley broker", ExtendedKeyUsageOID.SERVER_AUTH),
        ("server", "server", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        found, key = read(tmp_path / "broker" / f"{name}.crt"), tmp_path / "broker" / f"{name}.key"
        private = load_pem_private_key(key.read_bytes(), None)
        assert found.public_key() == private.public_key()
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert found.subject.rfc4514_string() == f"CN={subject}"
        usages = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usages) == [usage]
        found.verify_directly_issued_by(read(folder / "ca.crt"))
    names = read(tmp_path / "broker" / "broker.crt").extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost", "mqtt.example.org"]
    assert expiries(folder, NOW)["broker"] == NOW + 731 * DAY
    authority.certify_broker(tmp_path / "broker", ["mqtt.example.org"], NOW + 100 * DAY)
    assert expiries(folder, NOW)["broker"] == NOW + 831 * DAY
    (tmp_path / "broker" / "server.crt").unlink()
    with pytest.raises(StateError, match="certify-broker"):
        expiries(folder, NOW)


def test_the_command_says_what_belongs_into_the_settings(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[server]\nname = "valley"\n')
    done = CliRunner().invoke(app, ["certify-broker", str(tmp_path), "mqtt.example.org"])
    assert done.exit_code == 0, done.output
    settings = tomllib.loads("[broker]" + done.output.partition("[broker]")[2])["broker"]
    broker = Broker.model_validate(settings)
    assert (broker.host, broker.port) == ("mqtt.example.org", 8883)
    assert broker.tls() is not None


@pytest.mark.parametrize("name", ["server", "models", "rounds"])
def test_no_farm_is_called_as_the_server_is_at_the_broker(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    request = FarmIdentity.create(tmp_path / "farm", name).request()
    with pytest.raises(ProtocolError, match="let it choose another name"):
        authority.sign(request)
    assert authority.issued() == ()


# --- TLS -----------------------------------------------------------------------------------


@contextmanager
def listening(files: ServerFiles) -> Iterator[int]:
    """A server that answers every call with the caller's name; yields its port."""

    def name(_: bytes, context: Any) -> bytes:
        (found,) = context.auth_context()["x509_common_name"]
        return bytes(found)

    methods = {"Who": grpc.unary_unary_rpc_method_handler(name)}
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
        credentials = grpc.ssl_server_credentials(
            [(files.key, files.certificate)], files.ca, require_client_auth=True
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()


def who(target: str, ca: bytes, key: bytes | None, shown: bytes | None) -> bytes:
    credentials = grpc.ssl_channel_credentials(ca, key, shown)
    with grpc.secure_channel(target, credentials) as channel:
        return bytes(channel.unary_unary("/test/Who")(b"", timeout=20))


def joined(folder: Path, farm: str, authority: Authority) -> ClientFiles:
    identity = FarmIdentity.create(folder, farm)
    ca = authority.server_credentials().ca
    identity.accept(authority.sign(identity.request()), ca)
    return identity.credentials()


def refused(target: str, ca: bytes, key: bytes | None, shown: bytes | None) -> bool:
    with pytest.raises(grpc.RpcError) as raised:
        who(target, ca, key, shown)
    return bool(raised.value.code() == grpc.StatusCode.UNAVAILABLE)


def test_a_grpc_server_knows_farms_by_name_and_no_one_else(tmp_path: Path) -> None:
    valley, hill = (
        Authority.create(tmp_path / name, name, ["farms.example.org"])
        for name in ("valley", "hill")
    )
    rice = joined(tmp_path / "rice", "rice", valley)
    stranger = joined(tmp_path / "stranger", "rice", hill)
    files = valley.server_credentials()
    with listening(files) as port:
        for host in ("127.0.0.1", "localhost"):
            target = f"{host}:{port}"
            assert who(target, rice.ca, rice.key, rice.certificate) == b"rice"
        assert refused(target, rice.ca, stranger.key, stranger.certificate)
        assert refused(target, rice.ca, None, None)
        assert refused(target, stranger.ca, rice.key, rice.certificate)
        # the server's own certificate does not make a farm
        assert refused(target, rice.ca, files.key, files.certificate)
        assert who(target, rice.ca, rice.key, rice.certificate) == b"rice"


def test_a_farm_cannot_pose_as_the_server(tmp_path: Path) -> None:
    valley = Authority.create(tmp_path / "valley", "valley", [])
    localhost = joined(tmp_path / "false", "localhost", valley)
    rice = joined(tmp_path / "rice", "rice", valley)
    false = ServerFiles(localhost.key, localhost.certificate, localhost.ca)
    with listening(false) as port:
        assert refused(f"localhost:{port}", rice.ca, rice.key, rice.certificate)


# --- certificates that are taken back --------------------------------------------------------


def test_a_farms_certificates_are_taken_back_and_the_others_stay(
    authority: Authority, folder: Path
) -> None:
    apple = [serial_of(authority, "apple") for _ in range(2)]
    rice = serial_of(authority, "rice")
    revoked = Revocations(folder / "issued.jsonl")
    assert not any(revoked.holds(serial) for serial in (*apple, rice))
    assert authority.revoke("apple") == 2
    assert all(revoked.holds(serial) for serial in apple)
    assert not revoked.holds(rice)
    assert authority.revoke("apple") == 0
    later = serial_of(authority, "apple")
    assert not revoked.holds(later), "a farm may come back with a new key"
    assert {one.farm for one in authority.issued()} == {"apple", "rice"}
    with pytest.raises(ConfigError, match="never given a certificate"):
        authority.revoke("nobody")


def test_the_list_for_other_programs_is_signed_and_names_them(
    authority: Authority, folder: Path
) -> None:
    apple, rice = serial_of(authority, "apple"), serial_of(authority, "rice")
    authority.write_revoked()
    assert len(read_crl(folder)) == 0
    authority.revoke("apple")
    crl, ca = read_crl(folder), x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    key = ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(key)
    assert crl.get_revoked_certificate_by_serial_number(apple) is not None
    assert crl.get_revoked_certificate_by_serial_number(rice) is None
    assert crl.next_update_utc == ca.not_valid_after_utc


@pytest.mark.parametrize("damage", ["damaged", "lost"])
def test_a_list_that_cannot_be_read_lets_nobody_in(
    authority: Authority, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    serial, path = serial_of(authority, "apple"), folder / "issued.jsonl"
    revoked = Revocations(path)
    assert not revoked.holds(serial)
    kept = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(kept + b"?\n")
    assert revoked.holds(serial)
    assert revoked.holds(serial)
    assert caplog.text.count("nobody is let in") == 1
    path.write_bytes(kept)
    assert not revoked.holds(serial)


def serial_of(authority: Authority, farm: str) -> int:
    folder = authority.folder.parent / farm
    identity = FarmIdentity.create(folder, farm)
    return x509.load_pem_x509_certificate(authority.sign(identity.request())).serial_number


def read_crl(folder: Path) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl((folder / "revoked.crl").read_bytes())
