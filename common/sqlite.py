"""SQLite files that belong to one device: opened with care, set aside when damaged.

WAL, so that a commit survives the end of the process at any instant; a durable one is fsynced and
survives a power cut as well, with all that was committed before it.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from common.errors import DiskError, StateError
from common.files import sync

log = logging.getLogger(__name__)

Run: TypeAlias = Callable[..., sqlite3.Cursor]

BUSY_SECONDS, LOOK_SECONDS = 5.0, 1.0
_STEPS = 10_000
"""Of SQLite's virtual machine, between two looks at the clock."""
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_DISK = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY})


class _Damaged(sqlite3.DatabaseError):
    """What SQLite's own check found."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def connect(
    path: Path, schema: str, version: int, page_bytes: int, *, shared: bool = False
) -> sqlite3.Connection:
    """Open a file for all threads of this process and for no other process, or create it.

    Args:
        path: of the file; its folder is there.
        schema: statements that create its tables.
        version: of the schema.
        page_bytes: of a file that is created.
        shared: other processes may have it open as well, and may be creating it at this moment:
            the statements of its schema leave alone what is there.

    Raises:
        sqlite3.Error: it cannot be used; :func:`is_damage` tells whether it is damaged.
        StateError: it is of a newer version.
    """
    existed = path.exists()
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _prepare(db, schema, version, page_bytes, shared)
    except StateError as error:
        db.close()
        raise StateError(f"'{path}': {error}") from error
    except BaseException:
        db.close()
        raise
    if not existed:
        sync(path.parent)
    return db


def _prepare(
    db: sqlite3.Connection, schema: str, version: int, page_bytes: int, shared: bool
) -> None:
    if not shared:
        # others may not even read: SQLite needs no third file then, and its lock is one that the
        # system lets go of however the process ends
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute(f"PRAGMA page_size = {page_bytes}")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    found = number(db, "user_version")
    if found > version:
        raise StateError(
            f"it is of version {found}, and this program knows {version}; update this program, or "
            "move the file away"
        )
    if found == 0:
        db.executescript(f"BEGIN IMMEDIATE; {schema} PRAGMA user_version = {version}; COMMIT")
    (fault,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if fault != "ok":
        raise _Damaged(fault)


def number(db: sqlite3.Connection, pragma: str) -> int:
    """What a pragma says."""
    return int(db.execute(f"PRAGMA {pragma}").fetchone()[0])


@contextlib.contextmanager
def writing(db: sqlite3.Connection, *, durable: bool) -> Iterator[Run]:
    """One transaction: all of it, or nothing when anything is raised."""
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db.execute
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


def set_aside(path: Path, why: Exception) -> float:
    """Rename a damaged file to NAME.damaged, in place of an earlier one.

    Returns:
        When it was last written, in seconds since 1970.
    """
    aside, latest = path.with_name(f"{path.name}.damaged"), 0.0
    for suffix in ("", "-wal"):
        source, target = (one.with_name(one.name + suffix) for one in (path, aside))
        target.unlink(missing_ok=True)
        if source.exists():
            latest = max(latest, source.stat().st_mtime)
            source.replace(target)
    sync(path.parent)
    log.error(
        "'%s' is damaged (%s): it is set aside as '%s' and a new one begun; check the disk",
        path,
        why,
        aside.name,
    )
    return latest


def is_damage(error: sqlite3.Error) -> bool:
    """Whether this says that the file is damaged."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise what an operator understands: DiskError, or StateError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        full = isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK
        raise (DiskError if full else StateError)(
            f"'{path}': {error}; check that the disk has room, that this user may write there and "
            "that no other process uses it"
        ) from error


# --- looked at, and left as it is ----------------------------------------------------------------


@contextlib.contextmanager
def looking(path: Path, seconds: float = LOOK_SECONDS) -> Iterator[sqlite3.Connection]:
    """A connection to any database, also one in use, that changes nothing on the disk.

    SQLite puts files beside a database even for one who only reads; here it does not.

    Args:
        path: of the database, which is there.
        seconds: that a lock is waited for.

    Raises:
        sqlite3.Error: it cannot be read; :func:`is_damage` and :func:`is_held` tell why.
    """
    how = ""
    if _log_of(path).exists():  # the index of the log is read, or made in memory
        how = "&readonly_shm=1"
    elif _keeps_log(path):  # which is not there: it was closed, and nobody has it open
        how = "&immutable=1"
    where = f"{path.absolute().as_uri()}?mode=ro{how}"
    db = sqlite3.connect(where, uri=True, timeout=seconds, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def fault_in(path: Path, seconds: float) -> str | None:
    """What SQLite's own check finds first; None: nothing, in as many seconds as were given.

    Raises:
        sqlite3.Error: as :func:`looking`.
    """
    closed = not _log_of(path).exists()
    found = _checked(path, seconds)
    if found is not None and closed and _log_of(path).exists():  # it was opened meanwhile
        return _checked(path, seconds)
    return found


def is_held(error: sqlite3.Error) -> bool:
    """Whether this says that another process has the file for itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def held(path: Path) -> bool:
    """Whether a process has this file for itself, as that of an outbox or a ledger does."""
    if not path.exists():
        return False
    try:
        with looking(path, seconds=0) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        return is_held(error)
    return False


def _checked(path: Path, seconds: float) -> str | None:
    until = time.monotonic() + seconds
    with looking(path) as db:
        db.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
        try:
            (said,) = db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                return None
            raise
    return None if said == "ok" else str(said)


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _keeps_log(path: Path) -> bool:
    """Whether it is of the kind (WAL) that has a log beside it while it is open."""
    with path.open("rb") as file:
        return file.read(20)[18:20] == b"\x02\x02"
