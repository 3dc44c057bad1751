"""What both sides of a network agree on: keys, names and certificates (X.509, RFC 5280).

Every key is ECDSA on P-256, which TLS takes everywhere. The server's authority signs what a farm
asks for; the common name of a farm's certificate is the farm's name. A private key is made on the
machine that uses it, never leaves it, and only its owner may read it.
"""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeGuard

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from common.errors import ProtocolError, StateError
from common.files import write_atomically

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey

MAX_PEM_BYTES = 16_384
"""Of a request or a certificate; ours have below 1 kB."""

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What reading a malformed request or certificate raises, whichever part is looked at first."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


def is_name(name: str) -> bool:
    """Whether a farm or a network may be called so."""
    return _NAME.fullmatch(name) is not None


def name_of(common_name: str) -> x509.Name:
    """A subject that has nothing but a common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def common_name(name: x509.Name) -> str:
    """The common name of a subject.

    Raises:
        ProtocolError: there is none, or more than one.
    """
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(found) != 1:
        raise ProtocolError(f"a subject needs one common name, and this one has {len(found)}")
    return str(found[0].value)


# --- keys ----------------------------------------------------------------------------------


def new_key() -> PrivateKey:
    """A new P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def write_key(path: Path, key: PrivateKey) -> None:
    """Write a private key that only this user may read, from its first byte on.

    Raises:
        DiskError: the disk is full or the folder cannot be written.
    """
    # its temporary file is made by mkstemp: with mode 0600, which the rename keeps
    write_atomically(path, key_pem(key))


def key_pem(key: PrivateKey) -> bytes:
    """A private key as TLS takes it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(path: Path, remedy: str) -> PrivateKey:
    """A P-256 key that nobody else could have read; ``remedy`` says what to do about a bad one.

    Raises:
        StateError: it is missing or damaged, or other users may read or write it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateError(
            f"private key '{path}' is open to other users (mode {mode:o}); run: chmod 600 '{path}'"
        )
    try:
        key = load_pem_private_key(data, None)
    except UNREADABLE as error:
        raise StateError(f"'{path}' is damaged: no private key in PEM form; {remedy}") from error
    if not isinstance(key, PrivateKey) or not is_p256(key.public_key()):
        raise StateError(f"'{path}' holds no ECDSA key on P-256; {remedy}")
    return key


def is_p256(key: object) -> TypeGuard[PublicKey]:
    """Whether this is a public key on P-256."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def fingerprint(key: PublicKey) -> str:
    """sha256 of a public key (its SubjectPublicKeyInfo), the same in all of its certificates."""
    data = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(data).hexdigest()


# --- certificates are made -----------------------------------------------------------------


class Issuer(NamedTuple):
    """Who signs a certificate."""

    certificate: x509.Certificate
    key: PrivateKey


class Validity(NamedTuple):
    """When a certificate counts."""

    begin: datetime
    end: datetime


def self_signed(subject: str, key: PrivateKey, validity: Validity) -> x509.Certificate:
    """The certificate of an authority that signs for servers and farms, for no other authority."""
    return (
        _builder(subject, key.public_key(), validity)
        .issuer_name(name_of(subject))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )


def issue(
    subject: str,
    key: PublicKey,
    issuer: Issuer,
    validity: Validity,
    usage: x509.ObjectIdentifier,
    names: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    """The certificate of one end of a connection; ``usage`` says of which."""
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    builder = (
        _builder(subject, key, validity)
        .issuer_name(issuer.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(issuer_id, critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer.key, hashes.SHA256())


def pem(document: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """A certificate as TLS takes it, or a request as the server does."""
    return document.public_bytes(Encoding.PEM)


def _builder(subject: str, key: PublicKey, validity: Validity) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.begin)
        .not_valid_after(validity.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*allowed: str) -> x509.KeyUsage:
    usages = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{usage: usage in allowed for usage in usages})


# --- certificates are read -----------------------------------------------------------------


def parse_certificate(data: bytes, what: str) -> x509.Certificate:
    """A certificate that came from elsewhere; ``what`` says which in the error.

    Raises:
        ProtocolError: it is none, or is malformed.
    """
    if len(data) > MAX_PEM_BYTES:
        raise ProtocolError(f"{what} has {len(data)} bytes; {MAX_PEM_BYTES} are allowed")
    try:
        certificate = x509.load_pem_x509_certificate(data)
        # these are parsed when they are first looked at
        _ = certificate.subject, certificate.public_key(), certificate.extensions
    except UNREADABLE as error:
        raise ProtocolError(f"{what} is no X.509 certificate in PEM form") from error
    return certificate


def read_certificate(path: Path, remedy: str) -> x509.Certificate:
    """A certificate on disk; ``remedy`` says what to do about a bad one.

    Raises:
        StateError: it is missing or damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    try:
        return parse_certificate(data, f"'{path}'")
    except ProtocolError as error:
        raise StateError(f"{error}: it is damaged; {remedy}") from error


def is_for(certificate: x509.Certificate, key: PrivateKey) -> bool:
    """Whether the certificate speaks for this key."""
    return certificate.public_key() == key.public_key()


def check_authority(ca: x509.Certificate, now: datetime) -> None:
    """Check that a certificate is one of an authority, signed by itself and valid now.

    Raises:
        ProtocolError: says which of it is not so.
    """
    subject = f"the certificate of '{common_name(ca.subject)}'"
    try:
        may_sign = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        may_sign = False
    if not may_sign:
        raise ProtocolError(f"{subject} is not one of a certificate authority")
    if not _signed_by(ca, ca):
        raise ProtocolError(f"{subject} is not signed by its own key")
    _check_time(subject, ca, now)


def check_issued(certificate: x509.Certificate, ca: x509.Certificate, now: datetime) -> None:
    """Check that a certificate was issued by an authority, and that both are valid now.

    Raises:
        ProtocolError: says which of it is not so.
    """
    check_authority(ca, now)
    subject = f"the certificate of '{common_name(certificate.subject)}'"
    if not _signed_by(certificate, ca):
        raise ProtocolError(f"{subject} was not issued by '{common_name(ca.subject)}'")
    _check_time(subject, certificate, now)


def shown(time: datetime) -> str:
    """A time as an error shows it."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def _check_time(subject: str, certificate: x509.Certificate, now: datetime) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"and this machine's clock says {shown(now)}"
    if now < begin:
        raise ProtocolError(f"{subject} is valid from {shown(begin)}, {clock}; set the clock")
    if now > end:
        raise ProtocolError(
            f"{subject} expired on {shown(end)}, {clock}; if that is right, a new one is needed"
        )


def _unreadable(path: Path, error: OSError, remedy: str) -> StateError:
    if isinstance(error, FileNotFoundError):
        return StateError(f"'{path}' is missing; {remedy}")
    return StateError(f"'{path}' cannot be read: {error.strerror}; let this user read it")
