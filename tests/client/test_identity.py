"""A farm's identity: its key, what it asks for, what it takes, and whom it trusts."""

import base64
import stat
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from client.identity import FarmIdentity
from common.certificates import fingerprint, new_key, write_key
from common.errors import ConfigError, DiskError, ProtocolError, StateError
from server.identity import Authority

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "identity"


@pytest.fixture
def farm(folder: Path) -> FarmIdentity:
    return FarmIdentity.create(folder, "rice")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "server", "valley", [], NOW)


@pytest.fixture
def ca(authority: Authority) -> bytes:
    return authority.server_credentials(NOW).ca


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pem")}


def sha256(ca: bytes) -> str:
    return x509.load_pem_x509_certificate(ca).fingerprint(hashes.SHA256()).hex()[:16]


# --- the key and the request ---------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_alone(farm: FarmIdentity, folder: Path) -> None:
    path = folder / "key.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    again = FarmIdentity.create(folder, "rice")
    assert contents(folder) == {"key.pem": path.read_bytes()}
    assert again.fingerprint == farm.fingerprint


def test_of_many_at_once_one_makes_the_key(folder: Path) -> None:
    def create(_: int) -> str | None:
        try:
            return FarmIdentity.create(folder, "rice").fingerprint
        except StateError as error:
            assert "another process works in" in str(error)
            return None

    with futures.ThreadPoolExecutor(8) as pool:
        found = set(pool.map(create, range(32))) - {None}
    assert found == {FarmIdentity.create(folder, "rice").fingerprint}


def test_a_key_that_another_process_just_made_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = new_key()

    @contextmanager
    def after_another(path: Path) -> Iterator[None]:
        write_key(path.parent / "key.pem", theirs)
        yield

    monkeypatch.setattr("client.identity.only_one", after_another)
    assert FarmIdentity.create(folder, "rice").fingerprint == fingerprint(theirs.public_key())


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 41, "rice\n"])
def test_a_farm_needs_a_plain_name(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        FarmIdentity.create(folder, name)
    assert str(raised.value) == f"farm {name!r}: a name has 1-40 letters, digits, '_' or '-'"
    assert not folder.exists()


def test_a_key_that_others_may_read_is_refused(farm: FarmIdentity, folder: Path) -> None:
    path = folder / "key.pem"
    path.chmod(0o644)
    with pytest.raises(StateError) as raised:
        FarmIdentity.create(folder, "rice")
    assert str(raised.value) == (
        f"private key '{path}' is open to other users (mode 644); run: chmod 600 '{path}'"
    )


def test_a_damaged_key_is_named_and_left(farm: FarmIdentity, folder: Path) -> None:
    path = folder / "key.pem"
    other = rsa.generate_private_key(65537, 2048)
    foreign = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for damage, problem in (
        (b"", "is damaged: no private key in PEM form"),
        (path.read_bytes()[:100], "is damaged: no private key in PEM form"),
        (foreign, "holds no ECDSA key on P-256"),
    ):
        path.write_bytes(damage)
        with pytest.raises(StateError) as raised:
            FarmIdentity.create(folder, "rice")
        assert str(raised.value) == (
            f"'{path}' {problem}; restore it from a backup, or move '{folder}' away and join the "
            "network again"
        )
        assert path.read_bytes() == damage


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=r"cannot write '.*': .*; make room, or let this user wr"):
        FarmIdentity.create(tmp_path / "file" / "identity", "rice")


def test_a_request_has_the_name_and_the_key_and_no_more(farm: FarmIdentity, folder: Path) -> None:
    asked = x509.load_pem_x509_csr(farm.request())
    assert asked.is_signature_valid
    assert asked.subject.rfc4514_string() == "CN=rice"
    key = load_pem_private_key((folder / "key.pem").read_bytes(), None)
    assert asked.public_key() == key.public_key()
    assert len(asked.extensions) == len(asked.attributes) == 0
    assert b"PRIVATE" not in farm.request()


# --- the server's answer -------------------------------------------------------------------


def test_a_certificate_is_kept_and_shown(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    answer = authority.sign(farm.request(), now=NOW)
    farm.accept(answer, ca, NOW)
    for identity in (farm, FarmIdentity.create(folder, "rice")):
        files = identity.credentials(NOW)
        assert (files.certificate, files.ca) == (answer, ca)
        assert files.key == (folder / "key.pem").read_bytes()
        assert "PRIVATE" not in repr(files)
    assert farm.fingerprint == authority.issued()[0].key


def test_a_newer_certificate_takes_the_place_of_the_older(
    farm: FarmIdentity, authority: Authority, ca: bytes
) -> None:
    farm.accept(authority.sign(farm.request(), now=NOW), ca, NOW)
    later = NOW + 390 * DAY
    assert farm.days_left(later) == 7
    newer = authority.sign(farm.request(), now=later)
    farm.accept(newer, ca, later)
    assert farm.credentials(later).certificate == newer
    assert farm.days_left(later) == 397


def test_a_clock_that_is_a_few_hours_late_does_not_matter(
    farm: FarmIdentity, authority: Authority, ca: bytes
) -> None:
    farm.accept(authority.sign(farm.request(), now=NOW), ca, NOW - timedelta(hours=23))


def test_a_certificate_for_another_key_is_refused(
    farm: FarmIdentity, folder: Path, tmp_path: Path, authority: Authority, ca: bytes
) -> None:
    other = FarmIdentity.create(tmp_path / "other", "rice")
    with pytest.raises(ProtocolError) as raised:
        farm.accept(authority.sign(other.request(), now=NOW), ca, NOW)
    assert str(raised.value) == (
        "the certificate of 'rice' is for another key than the one of this device"
    )
    assert set(contents(folder)) == {"key.pem"}


def test_a_certificate_for_another_farm_is_refused(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    renamed = FarmIdentity.create(folder, "maize")
    with pytest.raises(ProtocolError, match="the certificate is for farm 'maize', not 'rice'"):
        farm.accept(authority.sign(renamed.request(), now=NOW), ca, NOW)
    assert set(contents(folder)) == {"key.pem"}


def test_a_certificate_of_another_authority_is_refused(
    farm: FarmIdentity, folder: Path, tmp_path: Path, authority: Authority, ca: bytes
) -> None:
    for name in ("valley", "hill"):  # the same name does not make it the same authority
        foreign = Authority.create(tmp_path / name, name, [], NOW)
        with pytest.raises(ProtocolError) as raised:
            farm.accept(foreign.sign(farm.request(), now=NOW), ca, NOW)
        assert str(raised.value) == (
            "the certificate of 'rice' was not issued by 'valley certificate authority'"
        )
    assert set(contents(folder)) == {"key.pem"}


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            NOW + 398 * DAY,
            "the certificate of 'rice' expired on 2027-06-02 12:00 UTC, and this machine's clock "
            "says 2027-06-03 12:00 UTC; if that is right, a new one is needed",
        ),
        (
            datetime(1970, 1, 1, tzinfo=UTC),
            "the certificate of 'valley certificate authority' is valid from 2026-04-30 12:00 UTC, "
            "and this machine's clock says 1970-01-01 00:00 UTC; set the clock",
        ),
    ],
)
def test_a_certificate_counts_only_in_its_time(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes, when: datetime, message: str
) -> None:
    answer = authority.sign(farm.request(), now=NOW)
    with pytest.raises(ProtocolError) as raised:
        farm.accept(answer, ca, when)
    assert str(raised.value) == message
    farm.accept(answer, ca, NOW)
    with pytest.raises(StateError) as found:
        farm.credentials(when)
    path = folder / "certificate.pem"
    assert str(found.value) == f"'{path}' cannot be used: {message}; join the network again"


def test_what_cannot_sign_is_no_authority(
    farm: FarmIdentity, tmp_path: Path, authority: Authority
) -> None:
    other = FarmIdentity.create(tmp_path / "other", "maize")
    issued = authority.sign(other.request(), now=NOW)
    with pytest.raises(ProtocolError, match="of 'maize' is not one of a certificate authority"):
        farm.accept(authority.sign(farm.request(), now=NOW), issued, NOW)


def made(issuer: str, signer: ec.EllipticCurvePrivateKey, constraints: bool) -> bytes:
    """An authority's certificate as nobody should make one."""
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("valley", issuer)
    ]
    builder = (
        x509.CertificateBuilder(names[1], names[0])
        .public_key(ec.generate_private_key(ec.SECP256R1()).public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("issuer", "constraints", "message"),
    [
        ("valley", True, "the certificate of 'valley' is not signed by its own key"),
        ("hill", True, "the certificate of 'valley' is not signed by its own key"),
        ("valley", False, "the certificate of 'valley' is not one of a certificate authority"),
    ],
)
def test_an_authority_has_to_sign_itself(
    farm: FarmIdentity, authority: Authority, issuer: str, constraints: bool, message: str
) -> None:
    false = made(issuer, ec.generate_private_key(ec.SECP256R1()), constraints)
    with pytest.raises(ProtocolError, match=message):
        farm.accept(authority.sign(farm.request(), now=NOW), false, NOW)


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"half", b"x" * 20_000])
def test_what_is_no_certificate_is_refused(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes, data: bytes
) -> None:
    answer = authority.sign(farm.request(), now=NOW)
    problem = (
        "has 20000 bytes; 16384 are allowed"
        if len(data) > 16_384
        else "is no X.509 certificate in PEM form"
    )
    with pytest.raises(ProtocolError) as raised:
        farm.accept(answer[:200] if data == b"half" else data, ca, NOW)
    assert str(raised.value) == f"the server's answer {problem}"
    with pytest.raises(ProtocolError) as raised:
        farm.accept(answer, ca[:200] if data == b"half" else data, NOW)
    assert str(raised.value) == f"the server's certificate authority {problem}"
    assert set(contents(folder)) == {"key.pem"}


def test_no_byte_of_a_certificate_can_be_changed(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    answer = authority.sign(farm.request(), now=NOW)
    der = x509.load_pem_x509_certificate(answer).public_bytes(Encoding.DER)
    for place in range(len(der)):
        changed = bytearray(der)
        changed[place] ^= 1 + place % 255
        text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(changed)
        with pytest.raises(ProtocolError):
            farm.accept(text + b"-----END CERTIFICATE-----\n", ca, NOW)
    assert set(contents(folder)) == {"key.pem"}


# --- the pinned authority ------------------------------------------------------------------


def test_the_first_authority_is_pinned(
    farm: FarmIdentity, folder: Path, tmp_path: Path, authority: Authority, ca: bytes
) -> None:
    farm.accept(authority.sign(farm.request(), now=NOW), ca, NOW)
    before = contents(folder)
    foreign = Authority.create(tmp_path / "foreign", "valley", [], NOW)
    theirs = foreign.server_credentials(NOW).ca
    answer = foreign.sign(farm.request(), now=NOW)
    with pytest.raises(ProtocolError) as raised:
        farm.accept(answer, theirs, NOW)
    assert str(raised.value) == (
        f"the server's certificate authority (sha256 {sha256(theirs)}) is not the one that this "
        f"farm trusted when it joined (sha256 {sha256(ca)}): it may be another server, or somebody "
        "in between; check the address. If the network was set up anew, start over: in "
        f"'{folder}' remove ca.pem and certificate.pem and join the network again"
    )
    assert contents(folder) == before
    for name in ("ca.pem", "certificate.pem"):
        (folder / name).unlink()
    farm.accept(answer, theirs, NOW)
    assert farm.credentials(NOW).ca == theirs


def test_an_authority_is_pinned_before_its_certificate_is_kept(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    answer = authority.sign(farm.request(), now=NOW)
    (folder / "certificate.pem").mkdir()  # it cannot be written
    with pytest.raises(DiskError):
        farm.accept(answer, ca, NOW)
    assert (folder / "ca.pem").read_bytes() == ca
    (folder / "certificate.pem").rmdir()
    farm.accept(answer, ca, NOW)
    assert farm.credentials(NOW).certificate == answer


def test_a_damaged_authority_is_not_taken_for_none(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    answer = authority.sign(farm.request(), now=NOW)
    farm.accept(answer, ca, NOW)
    path = folder / "ca.pem"
    path.write_bytes(b"")
    for attempt in (lambda: farm.accept(answer, ca, NOW), lambda: farm.credentials(NOW)):
        with pytest.raises(StateError) as raised:
            attempt()
        assert str(raised.value) == (
            f"'{path}' is no X.509 certificate in PEM form: it is damaged; in '{folder}' remove "
            "ca.pem and certificate.pem and join the network again"
        )
    path.unlink()
    with pytest.raises(StateError, match=r"ca\.pem' is missing; in '.*' remove ca\.pem and"):
        farm.credentials(NOW)


# --- what is on disk -----------------------------------------------------------------------


def test_without_a_certificate_a_farm_has_to_join(farm: FarmIdentity, folder: Path) -> None:
    for attempt in (lambda: farm.credentials(NOW), lambda: farm.days_left(NOW)):
        with pytest.raises(StateError) as raised:
            attempt()
        assert str(raised.value) == (
            f"farm 'rice' has no certificate yet ('{folder / 'certificate.pem'}' is missing); join "
            "the network first"
        )


def test_a_damaged_certificate_is_named(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    farm.accept(authority.sign(farm.request(), now=NOW), ca, NOW)
    path = folder / "certificate.pem"
    path.write_bytes(path.read_bytes()[:200])
    for attempt in (lambda: farm.credentials(NOW), lambda: farm.days_left(NOW)):
        with pytest.raises(StateError) as raised:
            attempt()
        assert str(raised.value) == (
            f"'{path}' is no X.509 certificate in PEM form: it is damaged; join the network again"
        )


def test_a_farm_that_lost_its_key_or_changed_its_name_has_to_join_again(
    farm: FarmIdentity, folder: Path, authority: Authority, ca: bytes
) -> None:
    farm.accept(authority.sign(farm.request(), now=NOW), ca, NOW)
    with pytest.raises(StateError, match="is for farm 'rice', not 'maize'; join the network again"):
        FarmIdentity.create(folder, "maize").credentials(NOW)
    (folder / "key.pem").unlink()
    with pytest.raises(StateError, match="for another key than the one of this device; join the"):
        FarmIdentity.create(folder, "rice").credentials(NOW)


def test_days_left_counts_whole_days(farm: FarmIdentity, authority: Authority, ca: bytes) -> None:
    farm.accept(authority.sign(farm.request(), days=30, now=NOW), ca, NOW)
    assert farm.days_left(NOW) == 30
    assert farm.days_left(NOW + timedelta(hours=1)) == 29
    assert farm.days_left(NOW + 30 * DAY) == 0
    assert farm.days_left(NOW + 30 * DAY + timedelta(hours=1)) == -1
