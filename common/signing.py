"""Signed documents: what a device believes, whoever hands it over.

    {"body": "{...}", "signatures": {"KEY ID": "base64 of 64 bytes"}}

The body is signed as it stands, so nobody has to agree on an order of its fields. A signature
(Ed25519, RFC 8032) covers the kind of document as well: what was signed as a channel can never be
shown as a manifest. Which keys count is said by a document of kind ``keys``, the key set; a newer
one counts when a key of the one before has signed it, so keys can be exchanged without a visit to
the farm. During the overlap the old and the new key both sign everything.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, TypeAlias, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from common.errors import RefusalError, RefuseReason

Kind: TypeAlias = Literal["keys", "manifest", "channel", "round"]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
NetworkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]

MAX_BYTES = 4_000_000
"""Of a signed document; the manifest of a ViT-S has 40 kB."""


class Document(BaseModel):
    """Base of all that is signed: read strictly, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Read = TypeVar("Read", bound=Document)


class _Envelope(Document):
    body: str
    signatures: Annotated[dict[KeyId, str], Field(max_length=8)]


class TrustedKey(Document):
    """A public key; what it signed counts until ``until``."""

    id: KeyId
    public: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    until: AwareDatetime | None = None

    @classmethod
    def of(cls, key: Ed25519PrivateKey, until: datetime | None = None) -> "TrustedKey":
        """The public half of a key."""
        public = key.public_key().public_bytes_raw()
        return cls(id=key_id(key), public=public.hex(), until=until)


class KeySet(Document):
    """The keys of a network; ``counter`` rises with every exchange."""

    format: Literal[1] = 1
    network: NetworkName
    counter: Annotated[int, Field(ge=1, lt=2**53)]
    keys: Annotated[tuple[TrustedKey, ...], Field(min_length=1, max_length=8)]

    def follow(self, text: str, now: datetime) -> "KeySet":
        """The key set that a server shows, if it may stand in the place of this one.

        Raises:
            RefusalError: not signed by a key of this set, of another network, or older.
        """
        newer = read(KeySet, "keys", text, self, now)
        if newer.network != self.network:
            raise RefusalError(
                f"keys of network '{newer.network}', but this device belongs to '{self.network}'",
                RefuseReason.FOREIGN,
            )
        if newer.counter < self.counter:
            raise RefusalError(
                f"keys number {newer.counter} are older than number {self.counter}, which this "
                "device has seen: somebody shows it an old state of the server",
                RefuseReason.OLDER,
            )
        return newer


def first_keys(text: str, now: datetime) -> KeySet:
    """The key set of a document that one of its own keys has signed.

    For who got the document from a hand that it trusts, as a device does when it is enrolled.

    Raises:
        RefusalError: as :func:`read` does.
    """
    keys = parsed(KeySet, parsed(_Envelope, text, "keys").body, "keys")
    return read(KeySet, "keys", text, keys, now)


def key_id(key: Ed25519PrivateKey) -> str:
    """Short name of a key: the first 16 hexadecimal digits of its public half's sha256."""
    return hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()[:16]


def sign(kind: Kind, body: Document, keys: Sequence[Ed25519PrivateKey]) -> str:
    """A document with the signature of every key, as JSON text."""
    text = body.model_dump_json()
    message = _message(kind, text)
    signatures = {key_id(key): base64.b64encode(key.sign(message)).decode() for key in keys}
    return _Envelope(body=text, signatures=signatures).model_dump_json()


def read(form: type[Read], kind: Kind, text: str, keys: KeySet, now: datetime) -> Read:
    """Check who signed a document, then read it.

    Args:
        form: what it has to look like.
        kind: what it was signed as.
        text: as :func:`sign` made it.
        keys: one of them has to have signed it.
        now: for keys that count no longer.

    Raises:
        RefusalError: MALFORMED, UNSIGNED, WRONG_KEY, TAMPERED or, by a key that counts no
            longer, EXPIRED.
    """
    body = verified(kind, text, keys, now)
    return parsed(form, body, kind)


def verified(kind: Kind, text: str, keys: KeySet, now: datetime) -> str:
    """The body of a document that a trusted key has signed; raises as :func:`read` does."""
    if len(text) > MAX_BYTES:
        raise RefusalError(
            f"a {kind} document of {len(text)} bytes; at most {MAX_BYTES} pass",
            RefuseReason.TOO_LARGE,
        )
    envelope = parsed(_Envelope, text, kind)
    if not envelope.signatures:
        raise RefusalError(f"the {kind} document carries no signature", RefuseReason.UNSIGNED)
    known = {key.id: key for key in keys.keys}
    ours = [known[name] for name in envelope.signatures if name in known]
    if not ours:
        signers = ", ".join(sorted(envelope.signatures))
        raise RefusalError(
            f"the {kind} document is signed by {signers}, which is no key of network "
            f"'{keys.network}'; if its keys were exchanged while this device was away, enrol it "
            "again",
            RefuseReason.WRONG_KEY,
        )
    valid = [key for key in ours if key.until is None or now < key.until]
    if not valid:
        raise RefusalError(
            f"the {kind} document is signed by key {ours[0].id}, which counts no longer since "
            f"{ours[0].until:%Y-%m-%d} (this device's date: {now:%Y-%m-%d})",
            RefuseReason.EXPIRED,
        )
    _check(kind, envelope.body, envelope.signatures, valid)
    return envelope.body


def _check(
    kind: Kind, body: str, signatures: Mapping[str, str], keys: Sequence[TrustedKey]
) -> None:
    """Each signature by one of these keys has to hold; a false one beside a true one is no slip."""
    message = _message(kind, body)
    for key in keys:
        try:
            signature = base64.b64decode(signatures[key.id], validate=True)
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public)).verify(signature, message)
        except (InvalidSignature, ValueError, binascii.Error):
            raise RefusalError(
                f"the {kind} document is not what key {key.id} has signed: it was changed on its "
                "way, or signed as something else",
                RefuseReason.TAMPERED,
            ) from None


def parsed(form: type[Read], text: str, kind: str) -> Read:
    """Read JSON strictly; raises RefusalError (MALFORMED) naming the field."""
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise RefusalError(
            f"the {kind} document cannot be read: {where[:120]}: {first['msg'][:200]}",
            RefuseReason.MALFORMED,
        ) from error


def _message(kind: Kind, body: str) -> bytes:
    return f"fieldfed {kind} 1\n".encode() + body.encode()
