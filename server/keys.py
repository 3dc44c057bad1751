"""The keys that sign a network's versions, on the server's disk.

    signing/keys.json      the signed key set that devices are shown (common/signing.py)
    signing/ID.pem         a private key, readable by this user alone

An exchange makes a new key and lets the old one count for some weeks more. In that time both sign,
so a device that asks once within it moves to the new key by itself.
"""

import logging
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import RefusalError, StateError
from common.files import write_atomically
from common.signing import Document, KeySet, Kind, TrustedKey, first_keys, key_id, sign

log = logging.getLogger(__name__)

OVERLAP_DAYS = 60.0


class SigningKeys:
    """The private keys of a network and the key set that goes with them."""

    def __init__(
        self, folder: Path, keys: KeySet, text: str, private: Sequence[Ed25519PrivateKey]
    ) -> None:
        self._folder, self._private = folder, private
        self.keys, self.text = keys, text

    @classmethod
    def create(cls, folder: Path, network: str) -> "SigningKeys":
        """The first key of a network.

        Raises:
            StateError: there are keys already, which devices trust.
        """
        if (folder / "keys.json").exists():
            raise StateError(f"'{folder}' holds keys that devices trust; nothing was changed")
        key = Ed25519PrivateKey.generate()
        first = KeySet(network=network, counter=1, keys=(TrustedKey.of(key),))
        return cls._save(folder, first, [key])

    @classmethod
    def open(cls, folder: Path) -> "SigningKeys":
        """The keys of a network.

        Raises:
            StateError: a file is missing or damaged, or others may read a private key; names it.
        """
        path = folder / "keys.json"
        try:
            text = path.read_text(errors="replace")  # damage is said below
        except OSError:
            raise StateError(
                f"no signing keys at '{path}'; restore them from a backup, or create the network "
                "with: fieldfed-server init"
            ) from None
        try:
            keys = first_keys(text, datetime.now(UTC))
        except RefusalError as error:
            raise StateError(f"'{path}': {error}; restore it from a backup") from error
        private = [_read_private(folder / f"{key.id}.pem") for key in keys.keys]
        return cls(folder, keys, text, private)

    def sign(self, kind: Kind, body: Document, now: datetime | None = None) -> str:
        """A document with a signature of every key that counts."""
        now = now or datetime.now(UTC)
        pairs = zip(self.keys.keys, self._private, strict=True)
        counting = [key for known, key in pairs if known.until is None or now < known.until]
        return sign(kind, body, counting)

    def exchange(
        self, now: datetime | None = None, overlap_days: float = OVERLAP_DAYS
    ) -> "SigningKeys":
        """Make a new key; those there now count for ``overlap_days`` more."""
        now = now or datetime.now(UTC)
        until = now + timedelta(days=overlap_days)
        new = Ed25519PrivateKey.generate()
        old = [
            (known.model_copy(update={"until": min(known.until or until, until)}), key)
            for known, key in zip(self.keys.keys, self._private, strict=True)
            if known.until is None or now < known.until
        ]
        keys = KeySet(
            network=self.keys.network,
            counter=self.keys.counter + 1,
            keys=(*(known for known, _ in old), TrustedKey.of(new)),
        )
        return self._save(self._folder, keys, [*(key for _, key in old), new])

    @classmethod
    def _save(
        cls, folder: Path, keys: KeySet, private: Sequence[Ed25519PrivateKey]
    ) -> "SigningKeys":
        """Private keys first: a crash in between leaves the key set that was there, whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for key in private:
            path = folder / f"{key_id(key)}.pem"
            if not path.exists():
                write_atomically(path, _pem(key))
        text = sign("keys", keys, private)
        write_atomically(folder / "keys.json", text.encode())
        return cls(folder, keys, text, private)


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise StateError(f"others may read the signing key '{path}'; run: chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise StateError(
            f"no signing key at '{path}' ({error}); restore it from a backup"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"'{path}' is not an Ed25519 key; restore it from a backup")
    return key
