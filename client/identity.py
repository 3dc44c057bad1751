"""Who a farm is to its network: a key made here, and the certificate that the server gave for it.

    STATE/identity/
        key.pem            the farm's private key; it never leaves this device
        ca.pem             the authority that this farm trusted when it joined, and only that one
        certificate.pem    says that the key belongs to this farm
        key.lock           held while the key is made: two processes must not make two

A device makes its key, sends a request to the server and takes the certificate that comes back.
The authority is trusted on first use, then pinned: nobody can later put another in its place.
"""

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from common import certificates
from common.certificates import PrivateKey
from common.errors import ConfigError, ProtocolError, StateError
from common.files import append, only_one, write_atomically

_KEY, _CA, _CERTIFICATE = "key.pem", "ca.pem", "certificate.pem"
_LOCK = "key.lock"
_JOIN_ANEW = f"remove {_CA} and {_CERTIFICATE} and join the network again"


@dataclass(frozen=True)
class ClientFiles:
    """What a TLS client needs, in PEM form; ``ca`` is what it checks the server against."""

    key: bytes = field(repr=False)
    certificate: bytes
    ca: bytes


class FarmIdentity:
    """The identity of one farm on one device; made by :meth:`create`, or :meth:`open`."""

    def __init__(self, folder: Path, farm: str, key: PrivateKey) -> None:
        self.folder, self.farm = folder, farm
        self._key = key

    @classmethod
    def create(cls, folder: Path, farm: str) -> "FarmIdentity":
        """The farm's identity; makes its key unless there is one.

        Raises:
            ConfigError: the farm's name is not one.
            StateError: the key is damaged, or other users may read it.
            DiskError: the disk is full or the folder cannot be written.
        """
        if not certificates.is_name(farm):
            raise ConfigError(f"farm {farm!r}: a name has 1-40 letters, digits, '_' or '-'")
        path = folder / _KEY
        if not path.exists():
            append(folder / _LOCK, b"")  # makes the folder, or says why it cannot
            with only_one(folder / _LOCK):
                if not path.exists():
                    certificates.write_key(path, certificates.new_key())
        return cls.open(folder, farm)

    @classmethod
    def open(cls, folder: Path, farm: str) -> "FarmIdentity":
        """The identity that is there; nothing is made.

        Raises:
            StateError: the key is missing or damaged, or other users may read it.
        """
        path = folder / _KEY
        remedy = f"restore it from a backup, or move '{folder}' away and join the network again"
        return cls(folder, farm, certificates.read_key(path, remedy))

    @property
    def fingerprint(self) -> str:
        """sha256 of the public key, as the server's list of certificates shows it."""
        return certificates.fingerprint(self._key.public_key())

    def request(self) -> bytes:
        """A request for a certificate (PKCS #10), in PEM form, signed by the farm's key."""
        builder = x509.CertificateSigningRequestBuilder()
        named = builder.subject_name(certificates.name_of(self.farm))
        return certificates.pem(named.sign(self._key, hashes.SHA256()))

    def accept(self, certificate_pem: bytes, ca_pem: bytes, now: datetime | None = None) -> None:
        """Keep what the server answered, if it is for this farm and from the authority we know.

        Raises:
            ProtocolError: it is not; what was there before is kept.
            StateError: the authority that we know is damaged on disk.
            DiskError: the disk is full or the folder cannot be written.
        """
        certificate = certificates.parse_certificate(certificate_pem, "the server's answer")
        ca = certificates.parse_certificate(ca_pem, "the server's certificate authority")
        self._require_known(ca)
        self._check(certificate, ca, now or datetime.now(UTC))
        # a crash between the two leaves an authority without a certificate: ask again
        write_atomically(self.folder / _CA, certificates.pem(ca))
        write_atomically(self.folder / _CERTIFICATE, certificates.pem(certificate))

    def credentials(self, now: datetime | None = None) -> ClientFiles:
        """What this farm shows to its server.

        Raises:
            StateError: there is no certificate yet, it has expired, or it is not this farm's.
        """
        certificate = self._certificate()
        ca = certificates.read_certificate(self.folder / _CA, f"in '{self.folder}' {_JOIN_ANEW}")
        try:
            self._check(certificate, ca, now or datetime.now(UTC))
        except ProtocolError as error:
            path = self.folder / _CERTIFICATE
            raise StateError(f"'{path}' cannot be used: {error}; join the network again") from error
        return ClientFiles(
            key=certificates.key_pem(self._key),
            certificate=certificates.pem(certificate),
            ca=certificates.pem(ca),
        )

    def tls(self, now: datetime | None = None) -> ssl.SSLContext:
        """What a connection to the network's door is made with: both sides are checked.

        Raises:
            StateError: as :meth:`credentials`.
        """
        files = self.credentials(now)
        context = ssl.create_default_context(cadata=files.ca.decode())
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.folder / _CERTIFICATE, self.folder / _KEY)
        return context

    def forget(self) -> None:
        """Remove the certificate, the authority and the key: this device is nobody's any more."""
        for name in (_CERTIFICATE, _CA, _KEY):
            (self.folder / name).unlink(missing_ok=True)

    def days_left(self, now: datetime | None = None) -> int:
        """Whole days until the certificate expires; negative when it has.

        Raises:
            StateError: there is no certificate yet, or it is damaged.
        """
        return (self._certificate().not_valid_after_utc - (now or datetime.now(UTC))).days

    def _certificate(self) -> x509.Certificate:
        path = self.folder / _CERTIFICATE
        if not path.exists():
            raise StateError(
                f"farm '{self.farm}' has no certificate yet ('{path}' is missing); join the "
                "network first"
            )
        return certificates.read_certificate(path, "join the network again")

    def _require_known(self, ca: x509.Certificate) -> None:
        path = self.folder / _CA
        if not path.exists():
            return
        known = certificates.read_certificate(path, f"in '{self.folder}' {_JOIN_ANEW}")
        if known != ca:
            raise ProtocolError(
                f"the server's certificate authority (sha256 {_short(ca)}) is not the one that "
                f"this farm trusted when it joined (sha256 {_short(known)}): it may be another "
                "server, or somebody in between; check the address. If the network was set up "
                f"anew, start over: in '{self.folder}' {_JOIN_ANEW}"
            )

    def _check(self, certificate: x509.Certificate, ca: x509.Certificate, now: datetime) -> None:
        name = certificates.common_name(certificate.subject)
        if name != self.farm:
            raise ProtocolError(f"the certificate is for farm '{name}', not '{self.farm}'")
        if not certificates.is_for(certificate, self._key):
            raise ProtocolError(
                f"the certificate of '{name}' is for another key than the one of this device"
            )
        certificates.check_issued(certificate, ca, now)


def _short(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()[:16]
