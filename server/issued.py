"""Which certificates farms were given: a file of lines that only grows.

issued.jsonl   one JSON object a line, on disk before the certificate is given out
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from common import certificates
from common.errors import DiskError, ProtocolError, StateError
from common.files import append


class Issued(BaseModel):
    """A certificate that a farm was given; ``key`` is the sha256 of its public key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    farm: str
    serial: str
    key: str
    issued: AwareDatetime
    expires: AwareDatetime


def issued_in(path: Path) -> tuple[Issued, ...]:
    """The list, oldest first.

    Raises:
        StateError: a line is damaged; names it.
        DiskError: the file cannot be used.
    """
    with _locked(path) as file:
        return _parse(path, file.read())[0]


def seen_in(path: Path) -> tuple[Issued, ...]:
    """The same without waiting for whoever writes, for a reader that may not write.

    Raises:
        StateError: a line is damaged; names it.
        OSError: the file cannot be read.
    """
    return _parse(path, path.read_bytes())[0]


def record(path: Path, issued: Issued) -> None:
    """Append to the list; it is on disk when this returns.

    Raises:
        ProtocolError: the key was given to another farm.
        StateError: the list is damaged.
        DiskError: the file cannot be used, or the disk is full.
    """
    with _locked(path) as file:
        known, end = _parse(path, file.read())
        for other in known:
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


def _parse(path: Path, data: bytes) -> tuple[tuple[Issued, ...], int]:
    """The list and where it ends; nobody was given what a line that a crash cut off speaks of."""
    end = data.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            found.append(Issued.model_validate_json(line))
        except ValidationError as error:
            raise StateError(
                f"line {number} of '{path}' is damaged; restore the file from a backup, or remove "
                "that line"
            ) from error
    return tuple(found), end
