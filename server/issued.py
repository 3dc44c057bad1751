"""Which certificates farms were given, and which of them count no longer: lines that only grow.

issued.jsonl   one JSON object a line, on disk before the certificate is given out; a line with
               ``revoked`` takes one back

Whoever lets farms in asks :class:`Revocations` at every request: a farm that is revoked is out at
once, without a restart. A list that cannot be read lets nobody in.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError

from common import certificates
from common.errors import ConfigError, DiskError, ProtocolError, StateError
from common.files import append

log = logging.getLogger(__name__)


class Issued(BaseModel):
    """A certificate that a farm was given; ``key`` is the sha256 of its public key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    farm: str
    serial: str
    key: str
    issued: AwareDatetime
    expires: AwareDatetime


class Revoked(BaseModel):
    """A certificate that counts no longer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    farm: str
    serial: str
    revoked: AwareDatetime


Line: TypeAlias = Issued | Revoked
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


def issued_in(path: Path) -> tuple[Issued, ...]:
    """The certificates that were given, oldest first.

    Raises:
        StateError: a line is damaged; names it.
        DiskError: the file cannot be used.
    """
    with _locked(path) as file:
        return _given(_parse(path, file.read())[0])


def seen_in(path: Path) -> tuple[Issued, ...]:
    """Those that still count, without waiting for whoever writes: for one who may not write.

    Raises:
        StateError: a line is damaged; names it.
        OSError: the file cannot be read.
    """
    lines = _parse(path, path.read_bytes())[0]
    gone = {one.serial for one in _taken_back(lines)}
    return tuple(one for one in _given(lines) if one.serial not in gone)


def revoked_in(path: Path) -> tuple[Revoked, ...]:
    """The certificates that count no longer; StateError and OSError as :func:`seen_in`."""
    return _taken_back(_parse(path, path.read_bytes())[0])


def revoke(path: Path, farm: str, now: datetime) -> int:
    """Take back every certificate of a farm; returns how many counted until now.

    Raises:
        ConfigError: the farm was never given one.
        StateError: the list is damaged.
        DiskError: the file cannot be used, or the disk is full.
    """
    with _locked(path) as file:
        lines, end = _parse(path, file.read())
        given = [one for one in _given(lines) if one.farm == farm]
        if not given:
            raise ConfigError(f"farm '{farm}' was never given a certificate; check its name")
        gone = {one.serial for one in _taken_back(lines)}
        now = now.replace(microsecond=0)
        new = [Revoked(farm=farm, serial=one.serial, revoked=now) for one in given]
        new = [one for one in new if one.serial not in gone]
        file.truncate(end)
        append(path, b"".join(one.model_dump_json().encode() + b"\n" for one in new))
        os.fsync(file.fileno())
        return len(new)


class Revocations:
    """Which certificates count no longer; the list is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: tuple[int, int, int] | None = None
        self._serials: frozenset[str] | None = None
        self._given: frozenset[str] = frozenset()

    def holds(self, serial: int) -> bool:
        """Whether a certificate counts no longer; True of all when the list cannot be read."""
        self._look()
        return self._serials is None or f"{serial:x}" in self._serials

    def lacks(self, serial: int) -> bool:
        """Whether a certificate is not in the list, as after an older backup was restored."""
        self._look()
        return self._serials is not None and f"{serial:x}" not in self._given

    def _look(self) -> None:
        try:
            found = self._path.stat()
            state = (found.st_ino, found.st_size, found.st_mtime_ns)
            if state != self._state:
                lines = _parse(self._path, self._path.read_bytes())[0]
                self._serials = frozenset(one.serial for one in _taken_back(lines))
                self._given = frozenset(one.serial for one in _given(lines))
                self._state = state
        except (OSError, StateError) as error:
            if self._serials is not None or self._state is None:
                log.error("nobody is let in: the list of certificates cannot be read: %s", error)
            self._serials, self._state = None, (0, 0, 0)


def record(path: Path, issued: Issued) -> None:
    """Append to the list; it is on disk when this returns.

    Raises:
        ProtocolError: the key was given to another farm.
        StateError: the list is damaged.
        DiskError: the file cannot be used, or the disk is full.
    """
    with _locked(path) as file:
        known, end = _parse(path, file.read())
        for other in _given(known):
            if other.key == issued.key and other.farm != issued.farm:
                raise ProtocolError(
                    f"the key of farm '{issued.farm}' was already given to farm '{other.farm}' "
                    f"({certificates.shown(other.issued)}), and two devices must not have one "
                    f"key; move the identity folder of '{issued.farm}' away, so that it makes a "
                    "key of its own, and join again"
                )
        file.truncate(end)
        append(path, issued.model_dump_json().encode() + b"\n")
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The open list; whoever else wants it waits."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
    except OSError as error:
        why = error.strerror or error
        raise DiskError(f"cannot use '{path}': {why}; let this user read and write it") from error


def _given(lines: Sequence[Line]) -> tuple[Issued, ...]:
    return tuple(one for one in lines if isinstance(one, Issued))


def _taken_back(lines: Sequence[Line]) -> tuple[Revoked, ...]:
    return tuple(one for one in lines if isinstance(one, Revoked))


def _parse(path: Path, data: bytes) -> tuple[tuple[Line, ...], int]:
    """The list and where it ends; nobody was given what a line that a crash cut off speaks of."""
    end = data.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            found.append(_LINE.validate_json(line))
        except ValidationError as error:
            raise StateError(
                f"line {number} of '{path}' is damaged; restore the file from a backup, or remove "
                "that line"
            ) from error
    return tuple(found), end
