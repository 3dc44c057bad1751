"""Joining a network with a code that is typed once: it proves each side to the other.

    K7QF-3M9T-X2HB-R8WC     15 random symbols of Crockford's base 32 and a check symbol

The device does not know its network's authority yet, so TLS alone tells it nothing: somebody in
between could show a certificate of their own. Both sides therefore prove that they know the code,
about the server's certificate *as each of them sees it*. Whoever is in between shows another
certificate, so what they hear from one side is of no use on the other.

    secret   = scrypt(code, farm): an Ed25519 key for the device, a MAC key for the server
    device   -> request for a certificate, signed(certificate seen, request)
    server   -> membership, MAC(certificate shown, request, membership)

The server keeps the public half of the device's key and the MAC key, never the code: whoever reads
its list can join with none of them.

**Why no PAKE.** Whoever sits in between gets one signature of the device, and may try codes against
it at leisure. 15 symbols are 75 bits. One try costs an scrypt of 32 MiB; a graphics card does some
thousand of them a second, so a million cards need 2^74 / 10^9 s, half a million years, for half of
the codes, and the code ends within days. Were scrypt free and a million cards did 10^10 tries a
second each, it would still take three weeks, which is why codes last a week at most. A
password-authenticated exchange would allow shorter codes, at the price of a library and a further
message.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from common.errors import ConfigError
from common.signing import Document

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
SYMBOLS, GROUP = 15, 4
LONGEST_HOURS = 168.0
_READ_AS = str.maketrans({"O": "0", "I": "1", "L": "1"})
_SCRYPT_N, _SCRYPT_R, _SCRYPT_BYTES = 2**15, 8, 64 << 20


class JoinRequest(Document):
    """A device asks: its request for a certificate, and what only one who knows the code signs."""

    format: Literal[1] = 1
    request: Annotated[str, Field(max_length=16_384)]
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class JoinAnswer(Document):
    """The server answers: the text of a membership, and the proof that it knows the code."""

    membership: str
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def new_code() -> str:
    """A code nobody has had before."""
    body = "".join(secrets.choice(ALPHABET) for _ in range(SYMBOLS))
    whole = body + _check_symbol(body)
    return "-".join(whole[at : at + GROUP] for at in range(0, len(whole), GROUP))


def read_code(text: str) -> str:
    """A code as a person typed it, without what people add or confuse.

    Raises:
        ConfigError: it has another length or a symbol is wrong.
    """
    plain = "".join(text.upper().split()).replace("-", "").translate(_READ_AS)
    if len(plain) != SYMBOLS + 1 or not set(plain) <= set(ALPHABET):
        raise ConfigError("a code has 16 letters and digits in groups of four; look at it again")
    if _check_symbol(plain[:-1]) != plain[-1]:
        raise ConfigError("the code is mistyped: its last symbol does not fit the others")
    return plain


def _check_symbol(body: str) -> str:
    """Luhn's check for 32 symbols: a wrong one, and nearly every two swapped, do not fit."""
    total = 0
    for place, symbol in enumerate(reversed(body)):
        value = ALPHABET.index(symbol) * (2 - place % 2)
        total += value // len(ALPHABET) + value % len(ALPHABET)
    return ALPHABET[-total % len(ALPHABET)]


@dataclass(frozen=True)
class Verifier:
    """What the server keeps of a code: good for checking, of no use for joining."""

    public: bytes
    mac_key: bytes = field(repr=False)

    def accepts(self, proof: str, certificate: bytes, request: str) -> bool:
        """Whether a device that knows the code has sent this request."""
        try:
            key = Ed25519PublicKey.from_public_bytes(self.public)
            key.verify(bytes.fromhex(proof), _asked(certificate, request))
        except (InvalidSignature, ValueError):
            return False
        return True

    def answer(self, certificate: bytes, request: str, membership: str) -> str:
        """The server's proof.

        Args:
            certificate: that the server has shown, in DER form.
            request: of the device.
            membership: that the device is given for it.
        """
        text = _asked(certificate, request) + hashlib.sha256(membership.encode()).digest()
        return hmac.digest(self.mac_key, b"fieldfed answer 1" + text, "sha256").hex()


@dataclass(frozen=True)
class Secret:
    """What the device makes of a code."""

    key: Ed25519PrivateKey = field(repr=False)
    verifier: Verifier

    @classmethod
    def of(cls, code: str, farm: str) -> "Secret":
        """Takes a tenth of a second and 32 MiB, so that guesses do as well; raises ConfigError."""
        whole = hashlib.scrypt(
            read_code(code).encode(),
            salt=b"fieldfed join 1 " + farm.encode(),
            n=_SCRYPT_N,
            r=_SCRYPT_R,
            p=1,
            maxmem=_SCRYPT_BYTES,
            dklen=64,
        )
        key = Ed25519PrivateKey.from_private_bytes(whole[:32])
        return cls(key, Verifier(key.public_key().public_bytes_raw(), whole[32:]))

    def ask(self, certificate: bytes, request: str) -> JoinRequest:
        """What a device sends to a server that shows this certificate (DER)."""
        proof = self.key.sign(_asked(certificate, request)).hex()
        return JoinRequest(request=request, proof=proof)

    def believes(self, answer: JoinAnswer, certificate: bytes, request: str) -> bool:
        """Whether the answer comes from the server that made the code."""
        own = self.verifier.answer(certificate, request, answer.membership)
        return hmac.compare_digest(own, answer.proof)


def _asked(certificate: bytes, request: str) -> bytes:
    seen, asked = hashlib.sha256(certificate), hashlib.sha256(request.encode())
    return b"fieldfed request 1" + seen.digest() + asked.digest()
