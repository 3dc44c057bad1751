"""The certificate authority of a network, and the certificate of its server.

    STATE/identity/
        issued.jsonl    every certificate that a farm was given (server/issued.py)
        ca.key          the authority's private key: whoever has it can be every farm and the server
        ca.crt          its certificate; farms keep a copy and trust nothing else
        server.key      the server's private key
        server.crt      its certificate: the hosts that it may be reached as
        revoked.crl     which certificates count no longer, for programs that are not ours (a
                        broker); ours ask server/issued.py

The files are made in this order, each whole or not at all, so a crash leaves the first few of
them; ``create`` then makes the others. Any other gap means that files were lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from common import certificates
from common.certificates import Issuer, PrivateKey, PublicKey, Validity
from common.errors import ConfigError, ProtocolError, StateError
from common.files import append, only_one, write_atomically
from common.topics import RESERVED, SERVER
from server import issued as lists
from server.hosts import names_in, names_of
from server.issued import Issued, issued_in, record, revoked_in, seen_in

CA_LIFE, SERVER_LIFE, FARM_DAYS = timedelta(days=3652), timedelta(days=731), 397
RENEW_BEFORE = timedelta(days=30)
BROKER = "broker"
"""Folder, beside that of the authority, of what an MQTT broker is given."""
EARLIER = timedelta(days=1)
"""Certificates begin so long before they are made: the clock of a Pi without power runs late."""

_ISSUED, _CA_KEY, _CA = "issued.jsonl", "ca.key", "ca.crt"
_SERVER_KEY, _SERVER = "server.key", "server.crt"
_CRL = "revoked.crl"
_AUTHORITY_FILES = (_ISSUED, _CA_KEY, _CA)
_FILES = (*_AUTHORITY_FILES, _SERVER_KEY, _SERVER)
_TITLE = " certificate authority"
_ANEW = "move the folder away and create a new authority: every farm then has to join again"
_RESTORE = f"restore the folder from a backup, or {_ANEW}"
_REMAKE = f"remove {_SERVER_KEY} and {_SERVER} and create again: both are made anew"

_RECERTIFY = "make both anew with: fieldfed-server certify-broker"


@dataclass(frozen=True)
class ServerFiles:
    """What a TLS server needs, in PEM form; ``ca`` is what it checks farms against."""

    key: bytes = field(repr=False)
    certificate: bytes
    ca: bytes


class Authority:
    """Signs what farms ask for; made by :meth:`create` or :meth:`open`."""

    def __init__(self, folder: Path, issuer: Issuer) -> None:
        self.folder = folder
        self._issuer = issuer

    @property
    def network(self) -> str:
        """The name of the network."""
        return certificates.common_name(self._issuer.certificate.subject).removesuffix(_TITLE)

    @classmethod
    def create(
        cls, folder: Path, network: str, hosts: Sequence[str], now: datetime | None = None
    ) -> "Authority":
        """Make a new authority, or what a crash left out; the server is reached as ``hosts``.

        Raises:
            ConfigError: the network's name or a host is not one.
            StateError: there is an authority already, or files of one were lost.
            DiskError: the disk is full or the folder cannot be written.
        """
        if not certificates.is_name(network):
            raise ConfigError(f"network {network!r}: a name has 1-40 letters, digits, '_' or '-'")
        names, now = names_of(hosts), now or datetime.now(UTC)
        _require_nothing_lost(folder)
        append(folder / _ISSUED, b"")  # makes the folder, or says why it cannot
        with only_one(folder / _ISSUED):
            if not _missing(folder, _FILES):
                raise StateError(
                    f"'{folder}' already holds the certificate authority of network "
                    f"'{cls.open(folder).network}'; use that one, or {_ANEW}"
                )
            authority = cls._create_authority(folder, network, now)
            if _missing(folder, (_SERVER_KEY, _SERVER)):
                # a certificate without its key is of no use, and a crash must not leave two at odds
                (folder / _SERVER).unlink(missing_ok=True)
                certificates.write_key(folder / _SERVER_KEY, certificates.new_key())
                authority._certify_server(names, now)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Authority":
        """The authority in a folder.

        Raises:
            StateError: a file is missing or damaged, or other users may read a private key.
        """
        _require_nothing_lost(folder)
        missing = _missing(folder, _FILES)
        if missing:
            raise StateError(
                f"no complete certificate authority in '{folder}': {missing[0]} is missing; create "
                "it, which keeps what is there"
            )
        authority = cls._open_authority(folder)
        authority._server()
        return authority

    def sign(self, request_pem: bytes, days: int = FARM_DAYS, now: datetime | None = None) -> bytes:
        """A farm's certificate, in PEM form, for its request (PKCS #10).

        Only the name and the key are taken from the request: what a certificate is good for is not
        for the farm to say. It is on record, on disk, before it is returned.

        Raises:
            ProtocolError: the request is malformed, or its key belongs to another farm.
            ConfigError: ``days`` is out of range.
            StateError: the authority has expired, or its list of certificates is damaged or lost.
            DiskError: the certificate cannot be recorded; none was given out.
        """
        if not 1 <= days <= CA_LIFE.days:
            raise ConfigError(f"a certificate for {days} days: choose 1 to {CA_LIFE.days}")
        farm, key = asked_by(request_pem)
        _require_nothing_lost(self.folder)
        now = (now or datetime.now(UTC)).replace(microsecond=0)
        validity = self._validity(now, timedelta(days=days))
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = certificates.issue(farm, key, self._issuer, validity, usage)
        issued = Issued(
            farm=farm,
            serial=f"{certificate.serial_number:x}",
            key=certificates.fingerprint(key),
            issued=now,
            expires=validity.end,
        )
        record(self.folder / _ISSUED, issued)
        return certificates.pem(certificate)

    def issued(self) -> tuple[Issued, ...]:
        """The certificates that farms were given, oldest first; StateError for a damaged list."""
        return issued_in(self.folder / _ISSUED)

    def revoke(self, farm: str, now: datetime | None = None) -> int:
        """Take back every certificate of a farm, and say so in the list for other programs.

        Returns how many counted until now; errors as :func:`server.issued.revoke`.
        """
        now = now or datetime.now(UTC)
        count = lists.revoke(self.folder / _ISSUED, farm, now)
        self.write_revoked(now)
        return count

    def write_revoked(self, now: datetime | None = None) -> None:
        """Write the signed list of what counts no longer (a CRL); it lasts as the authority does.

        Raises:
            StateError: the list of certificates is damaged.
            DiskError: the disk is full or the folder cannot be written.
        """
        now, ca = (now or datetime.now(UTC)).replace(microsecond=0), self._issuer.certificate
        builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject)
        builder = builder.last_update(now - EARLIER).next_update(ca.not_valid_after_utc)
        for one in revoked_in(self.folder / _ISSUED):
            entry = x509.RevokedCertificateBuilder().serial_number(int(one.serial, 16))
            builder = builder.add_revoked_certificate(entry.revocation_date(one.revoked).build())
        crl = builder.sign(self._issuer.key, hashes.SHA256())
        write_atomically(self.folder / _CRL, crl.public_bytes(Encoding.PEM))

    def server_credentials(self, now: datetime | None = None) -> ServerFiles:
        """What the server shows to farms.

        Raises:
            StateError: it is missing, damaged, of another authority, or has expired.
        """
        key, certificate = self._server()
        ca = self._issuer.certificate
        try:
            certificates.check_issued(certificate, ca, now or datetime.now(UTC))
        except ProtocolError as error:
            raise StateError(
                f"'{self.folder / _SERVER}' is of no use: {error}; renew it, or {_REMAKE}"
            ) from error
        return ServerFiles(
            key=certificates.key_pem(key),
            certificate=certificates.pem(certificate),
            ca=certificates.pem(ca),
        )

    def renew_server(self, hosts: Sequence[str], now: datetime | None = None) -> bool:
        """Certify the server anew if its hosts changed or it has less than 30 days left.

        Its key stays: a single file changes, so a crash cannot leave key and certificate at odds.
        Returns whether there was anything to do.

        Raises:
            ConfigError: a host is not one.
            StateError: a file is missing or damaged, or the authority has expired.
            DiskError: the disk is full or the folder cannot be written.
        """
        names, now = names_of(hosts), now or datetime.now(UTC)
        certificate = self._server()[1]
        end = certificate.not_valid_after_utc
        # a certificate that ends with its authority cannot be made to last longer
        due = end - now < RENEW_BEFORE and end < self._issuer.certificate.not_valid_after_utc
        if set(names_in(certificate)) == set(names) and not due:
            return False
        self._certify_server(names, now)
        return True

    def certify_broker(
        self, folder: Path, hosts: Sequence[str], now: datetime | None = None
    ) -> None:
        """Write what an MQTT broker and our own connection to it need, with new keys.

        ``broker.crt`` and ``.key`` are the broker's, reached as ``hosts``; ``server.crt`` and
        ``.key`` show it who the server is; ``ca.crt`` is what both check the other against.

        Raises:
            ConfigError: a host is not one.
            StateError: the authority has expired.
            DiskError: the disk is full or the folder cannot be written.
        """
        names, now = names_of(hosts), now or datetime.now(UTC)
        validity = self._validity(now, SERVER_LIFE)
        for name, subject, usage, reached in (
            ("broker", f"{self.network} broker", ExtendedKeyUsageOID.SERVER_AUTH, names),
            (SERVER, SERVER, ExtendedKeyUsageOID.CLIENT_AUTH, ()),
        ):
            key = certificates.new_key()
            issuer = self._issuer
            certificate = certificates.issue(
                subject, key.public_key(), issuer, validity, usage, reached
            )
            # a crash must not leave two at odds
            (folder / f"{name}.crt").unlink(missing_ok=True)
            certificates.write_key(folder / f"{name}.key", key)
            write_atomically(folder / f"{name}.crt", certificates.pem(certificate))
        write_atomically(folder / _CA, certificates.pem(self._issuer.certificate))

    @classmethod
    def _create_authority(cls, folder: Path, network: str, now: datetime) -> "Authority":
        if _missing(folder, (_CA_KEY,)):
            certificates.write_key(folder / _CA_KEY, certificates.new_key())
        if _missing(folder, (_CA,)):
            key = certificates.read_key(folder / _CA_KEY, _RESTORE)
            validity = Validity(now - EARLIER, now + CA_LIFE)
            certificate = certificates.self_signed(network + _TITLE, key, validity)
            write_atomically(folder / _CA, certificates.pem(certificate))
        authority = cls._open_authority(folder)
        if authority.network != network:
            raise StateError(
                f"'{folder}' belongs to network '{authority.network}', not '{network}'; create "
                "it with that name, or move the folder away"
            )
        return authority

    @classmethod
    def _open_authority(cls, folder: Path) -> "Authority":
        return cls(folder, Issuer(*_read_pair(folder / _CA, folder / _CA_KEY, _RESTORE)))

    def _server(self) -> tuple[PrivateKey, x509.Certificate]:
        paths = (self.folder / _SERVER, self.folder / _SERVER_KEY)
        certificate, key = _read_pair(*paths, _REMAKE)
        return key, certificate

    def _certify_server(self, names: Sequence[x509.GeneralName], now: datetime) -> None:
        key = certificates.read_key(self.folder / _SERVER_KEY, _REMAKE).public_key()
        validity, usage = self._validity(now, SERVER_LIFE), ExtendedKeyUsageOID.SERVER_AUTH
        subject = f"{self.network} server"
        certificate = certificates.issue(subject, key, self._issuer, validity, usage, names)
        write_atomically(self.folder / _SERVER, certificates.pem(certificate))

    def _validity(self, now: datetime, life: timedelta) -> Validity:
        """What we issue now: it ends no later than the authority does."""
        ca = self._issuer.certificate
        try:
            certificates.check_authority(ca, now)
        except ProtocolError as error:
            raise StateError(f"'{self.folder / _CA}' cannot sign: {error}; {_ANEW}") from error
        return Validity(now - EARLIER, min(now + life, ca.not_valid_after_utc))


def expiries(folder: Path, now: datetime | None = None) -> dict[str, datetime]:
    """When certificates end, by whose they are: authority, server, broker, farms.

    The broker's, where there is one, is also the one that we show it, if that ends first. Of each
    farm its newest counts, and of all farms the next to end; those that are over only where no
    other is left: farms leave. No private key is read: who watches needs none.

    Raises:
        StateError: a certificate or the list of them is missing or damaged.
    """
    ends = {
        holder: certificates.read_certificate(folder / name, remedy).not_valid_after_utc
        for holder, name, remedy in (
            ("authority", _CA, _RESTORE),
            ("server", _SERVER, _REMAKE),
        )
    }
    broker = [folder.parent / BROKER / name for name in ("broker.crt", "server.crt")]
    if any(path.exists() for path in broker):
        read = [certificates.read_certificate(path, _RECERTIFY) for path in broker]
        ends["broker"] = min(one.not_valid_after_utc for one in read)
    try:
        newest = {one.farm: one.expires for one in seen_in(folder / _ISSUED)}
    except OSError as error:
        raise StateError(f"'{folder / _ISSUED}': {error.strerror}; {_RESTORE}") from error
    if not newest:
        return ends
    left = [end for end in newest.values() if end > (now or datetime.now(UTC))]
    return ends | {"farms": min(left) if left else max(newest.values())}


def _read_pair(
    certificate_path: Path, key_path: Path, remedy: str
) -> tuple[x509.Certificate, PrivateKey]:
    key = certificates.read_key(key_path, remedy)
    certificate = certificates.read_certificate(certificate_path, remedy)
    if not certificates.is_for(certificate, key):
        raise StateError(f"'{certificate_path}' is not for the key in '{key_path}'; {remedy}")
    return certificate, key


def _missing(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (folder / name).exists()]


def _require_nothing_lost(folder: Path) -> None:
    """A crash while creating leaves the first files of an authority; any other gap is a loss."""
    there = [name for name in _FILES if (folder / name).exists()]
    used = _ISSUED in there and (folder / _ISSUED).stat().st_size > 0
    last = _SERVER if used else there[-1] if there else _ISSUED
    lost = _missing(folder, _FILES[: _FILES.index(last)])
    # the server's files are made anew whenever they are missing
    for name in _AUTHORITY_FILES:
        if name in lost:
            raise StateError(f"'{folder / name}' is lost; {_RESTORE}")


# --- what is asked for ---------------------------------------------------------------------


def asked_by(request_pem: bytes) -> tuple[str, PublicKey]:
    """The farm and the key of a request, which whoever has the key has signed.

    Raises:
        ProtocolError: it is malformed, or not signed by its own key.
    """
    limit = certificates.MAX_PEM_BYTES
    if len(request_pem) > limit:
        raise ProtocolError(f"the request has {len(request_pem)} bytes; {limit} are allowed")
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key, subject = request.public_key(), request.subject
        # looked at first: checking the signature of another kind of key may take long
        if not certificates.is_p256(key):
            raise ProtocolError("the key of the request is not an ECDSA key on P-256; make one")
        if not request.is_signature_valid:
            raise ProtocolError("the request is not signed by its own key; make a new request")
    except certificates.UNREADABLE as error:
        raise ProtocolError("this is no certificate request (PKCS #10) in PEM form") from error
    farm = certificates.common_name(subject)
    if not certificates.is_name(farm):
        raise ProtocolError(
            f"a request for farm {farm[:60]!r}: a name has 1-40 letters, digits, '_' or '-'"
        )
    if farm in RESERVED:  # the broker goes by this name, and would take the farm for the server
        raise ProtocolError(f"no farm can be called '{farm}'; let it choose another name")
    return farm, key
