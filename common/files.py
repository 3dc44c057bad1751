"""State on disk: written whole or not at all."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import DiskError, StateError

_LOOK_SECONDS = 0.2


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Write to a temporary file beside ``path``, fsync, rename, fsync the folder.

    ``durable=False`` leaves out both fsyncs: a crash of the process still leaves the old file or
    the new one, but a power cut may leave a damaged one, which the reader has to notice.

    Raises:
        DiskError: the disk is full or the folder cannot be written; ``path`` is left as it was.
    """
    temporary = None
    try:
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(temporary).replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        raise _disk_error(path, error) from error


def append(path: Path, data: bytes) -> int:
    """Write ``data`` behind what is in ``path``, without fsync; returns where it begins.

    Raises:
        DiskError: the disk is full or the folder cannot be written; ``path`` is as long as before.
    """
    try:
        make_folder(path.parent)
        with path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(start)
                raise
            return start
    except OSError as error:
        raise _disk_error(path, error) from error


@contextlib.contextmanager
def only_one(path: Path, seconds: float = 0.0) -> Iterator[None]:
    """Hold ``path`` as a lock; the system lets go of it however the process ends.

    Args:
        path: of the lock.
        seconds: to wait for another process that holds it.

    Raises:
        StateError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        until = time.monotonic() + seconds
        while not (ours := lock(file)) and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        if not ours:
            raise StateError(f"another process works in '{path.parent}'; wait until it ends")
        yield


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed, if nobody else has; returns whether it is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _disk_error(path: Path, error: OSError) -> DiskError:
    why = error.strerror or error
    return DiskError(f"cannot write '{path}': {why}; make room, or let this user write there")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; a power cut leaves them there. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk: what was written there survives a power cut.

    Raises:
        DiskError: the disk could not take it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _disk_error(path, error) from error
