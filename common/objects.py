"""Objects by content: a file per object, its name the sha256 of its bytes.

    ab/abcd...        whole
    ab/abcd....part   as far as it has come

Both the server's registry and a device keep what versions are made of in such a folder, so that a
version costs only what no other version has. A part grows piece by piece, each synced before the
next: after a power cut all but the last piece is as it was written. What a part holds is believed
only when it is whole and its sha256 is right.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from common.errors import RefusalError, RefuseReason
from common.files import append, make_folder, sync, write_atomically

_PART = ".part"
PIECE_BYTES = 256 * 1024
"""Most that is written between two syncs, and so most that a power cut can spoil."""
SPARE_BYTES = 50_000_000
"""That a disk keeps for everything else."""


class Objects:
    """A folder of objects."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Below it objects lie as :func:`place_of` says."""
        return self._folder

    def path(self, digest: str) -> Path:
        """Where an object lies when it is whole."""
        return self._folder / place_of(digest)

    def has(self, digest: str) -> bool:
        """Whether an object is there, whole."""
        return self.path(digest).is_file()

    def add(self, data: bytes) -> str:
        """Keep an object; returns its digest."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        if not path.is_file() or path.stat().st_size != len(data):
            write_atomically(path, data)
        return digest

    def lacking(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Of these objects (length by digest) those that are not whole: bytes there already."""
        found = {}
        for digest, size in wanted.items():
            if self.has(digest):
                continue
            part = self._part(digest)
            held = part.stat().st_size if part.is_file() else 0
            if held > size:
                part.unlink()
                held = 0
            found[digest] = held
        return found

    def resume(self, wanted: Mapping[str, int]) -> None:
        """Make the parts that an earlier process left fit to go on.

        One that is whole is finished. Of any other the last piece is given up: a power cut may have
        spoilt it.
        """
        for digest, size in wanted.items():
            part = self._part(digest)
            held = part.stat().st_size if part.is_file() else 0
            if held == size and sha256_of(part) == digest:
                self._finish(digest)
            elif held:
                with part.open("r+b") as file:
                    file.truncate(trusted(held))
                sync(part)

    def require_room(self, needed: int) -> None:
        """Refuse what this disk has no room for, before any of it is fetched.

        Raises:
            RefusalError: TOO_LARGE; says how much is needed and how much is free.
        """
        make_folder(self._folder)
        free = shutil.disk_usage(self._folder).free
        if needed + SPARE_BYTES > free:
            raise RefusalError(
                f"{needed / 1e6:.1f} MB are to be fetched and {SPARE_BYTES / 1e6:.0f} MB to stay "
                f"free, but the disk of '{self._folder}' has {free / 1e6:.1f} MB; make room",
                RefuseReason.TOO_LARGE,
            )

    def receive(self, digest: str, offset: int, data: bytes, size: int) -> int:
        """Append what came of an object, and finish it once it is whole; returns bytes held.

        Args:
            digest: of the object.
            offset: of ``data`` in the object.
            data: the next bytes of it.
            size: length of the object.

        Raises:
            RefusalError: DAMAGED: a gap, more bytes than announced, or a wrong sha256; a part
                with a wrong sha256 is thrown away.
            DiskError: the disk is full; what was there before is kept.
        """
        part = self._part(digest)
        held = part.stat().st_size if part.is_file() else 0
        if offset != held or held + len(data) > size:
            raise RefusalError(
                f"object {digest[:12]}: bytes {offset} to {offset + len(data)} of {size} came, but "
                f"{held} are here",
                RefuseReason.DAMAGED,
            )
        for start in range(0, len(data), PIECE_BYTES):
            append(part, data[start : start + PIECE_BYTES])
            sync(part)
        if held == 0:
            sync(part.parent)
        held += len(data)
        if held == size:
            self._finish(digest)
        return held

    def _finish(self, digest: str) -> None:
        part = self._part(digest)
        if sha256_of(part) != digest:
            part.unlink()
            raise RefusalError(
                f"object {digest[:12]} is not what its name says; it is thrown away and will be "
                "fetched again",
                RefuseReason.DAMAGED,
            )
        part.replace(self.path(digest))
        sync(part.parent)

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Some bytes of an object; fewer at its end. Raises FileNotFoundError."""
        with self.path(digest).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def load(self, digest: str, size: int) -> bytes:
        """All bytes of an object, checked.

        Raises:
            RefusalError: DAMAGED: it is absent, or not what its name says; then it is thrown
                away, so that it can be fetched again.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise RefusalError(f"object {digest[:12]} is not here", RefuseReason.DAMAGED) from None
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            path.unlink(missing_ok=True)
            raise RefusalError(
                f"object {digest[:12]} was damaged on disk; it is thrown away and will be fetched "
                "again",
                RefuseReason.DAMAGED,
            )
        return data

    def keep_only(self, wanted: Collection[str]) -> list[int]:
        """Remove every other object, whole or not, and what a killed process left half written.

        Not for while anything is being received, or added for a version that has no manifest yet.

        Returns:
            The bytes of each file that was removed.
        """
        removed = []
        for path in self._folder.glob("??/*"):
            if path.name.removesuffix(_PART) not in wanted:
                removed.append(path.stat().st_size)
                path.unlink()
        return removed

    def _part(self, digest: str) -> Path:
        path = self.path(digest)
        return path.with_name(path.name + _PART)


def place_of(digest: str) -> str:
    """Where an object lies in its folder."""
    return f"{digest[:2]}/{digest}"


def trusted(held: int) -> int:
    """Of so many bytes of a part those behind which another piece was written, so synced."""
    return (held - 1) // PIECE_BYTES * PIECE_BYTES


def is_digest(text: str) -> bool:
    """Whether this is a sha256 in hexadecimal, and so no way out of the folder."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
