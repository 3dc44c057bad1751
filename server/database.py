"""One SQLite connection: opened with care, written in whole transactions, read into typed rows.

WAL lets other processes read while the run writes. A commit survives the crash of any process. A
durable one is fsynced and survives a power cut as well, with all that was committed before it.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from common.errors import DiskError, StateError
from server.migrations import MIGRATIONS, Migration, migrate, require_known, version_of

Row = TypeVar("Row")

BUSY_SECONDS = 30.0
MIGRATION_SECONDS = 5.0
"""That a reader waits for a writer that has just started, before it calls a database too old."""
PROGRESS_STEPS = 10_000
"""Of SQLite's virtual machine, between two looks at the clock: well below a millisecond."""
WAL_PAGES = 8192
"""Of 4 KiB: how long the log grows before it is brought into the database."""
_DISK_CODES = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})


class Database:
    """A connection for the thread that opened it; every method that writes is atomic.

    Any method raises StateError when the disk is full, the file is damaged, or another process
    writes for longer than ``BUSY_SECONDS``.
    """

    migrations: ClassVar[Sequence[Migration]] = MIGRATIONS
    """Of the tables that a kind of database has; by default those of the store."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path, self._db = path, connection
        self._db.row_factory = sqlite3.Row
        self._durable = True

    @classmethod
    def open(cls, path: Path, read_only: bool = False) -> Self:
        """Open the database; a writer creates it and brings it up to date.

        Raises:
            StateError: it is damaged, newer than this program, or (read only) not there yet or
                older than this program.
        """
        if read_only and not path.is_file():
            raise StateError(f"no database at '{path}'; start the server once to create it")
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,  # transactions are ours: BEGIN and COMMIT are written out
            )
        try:
            with _explained(path):
                _prepare(connection, cls.migrations, read_only)
        except BaseException:
            connection.close()
            raise
        return cls(path, connection)

    def freeze(self, seconds: float) -> None:
        """From now on read the state of one instant; a query that ends too late is interrupted.

        Args:
            seconds: from now, after which every query raises StateError.
        """
        end = time.monotonic() + seconds
        self._db.set_progress_handler(lambda: int(time.monotonic() > end), PROGRESS_STEPS)
        self._select(f"PRAGMA busy_timeout = {int(1000 * seconds)}")
        self._select("BEGIN")

    def close(self) -> None:
        """Close the connection; nothing is pending."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing when anything is raised."""
        with _explained(self._path):
            if durable != self._durable:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _change(self, sql: str, *values: object, durable: bool = True) -> int:
        """One statement that writes; returns how many rows it touched."""
        with self._writing(durable) as db:
            return db.execute(sql, values).rowcount

    def _select(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Rows as they are."""
        with _explained(self._path):
            return self._db.execute(sql, values).fetchall()

    def _all(self, kind: type[Row], sql: str, *values: object) -> list[Row]:
        """Rows as dataclasses, fields by column name; other columns are left out.

        SQLite has no truth values: what a field calls a bool comes as 0 or 1.
        """
        names: dict[str, Any] = getattr(kind, "__dataclass_fields__", {})
        flags = {name for name, field in names.items() if field.type is bool}
        return [
            kind(**{name: bool(row[name]) if name in flags else row[name] for name in names})
            for row in self._select(sql, *values)
        ]


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except StateError as error:
        if str(path) in str(error):
            raise
        raise StateError(f"'{path}': {error}") from error
    except (sqlite3.Error, OSError) as error:
        kind = DiskError if getattr(error, "sqlite_errorcode", 0) in _DISK_CODES else StateError
        raise kind(
            f"'{path}': {error}; check that the disk has room, that this user may write there and "
            "that no other server uses it; if it is damaged, restore it from a backup"
        ) from error


def _wait_for_writer(connection: sqlite3.Connection, steps: int) -> None:
    """A process that has just started may be creating the tables, or bringing them up to date."""
    until = time.monotonic() + MIGRATION_SECONDS
    while version_of(connection) < steps and time.monotonic() < until:
        time.sleep(0.05)


def _prepare(connection: sqlite3.Connection, steps: Sequence[Migration], read_only: bool) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    if read_only:
        _wait_for_writer(connection, len(steps))
        require_known(connection, len(steps), exactly=True)
        return
    require_known(connection, len(steps))
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # each checkpoint waits for the disk: of a round with hundreds of farms, one is enough
    connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
    migrate(connection, steps)
