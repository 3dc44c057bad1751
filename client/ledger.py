"""What left this farm: what kind of message, to whom, how many bytes, hour by hour.

    STATE/ledger.db     SQLite in WAL mode; rows are added, and within an hour (UTC) summed

Whoever sends writes it down before it sends, so that the ledger may name what did not arrive, and
never lacks what did. Counted are the bytes of messages; what HTTP, TLS and TCP put around them, and
what is sent again after a lost line, is in ``STATE/traffic.json`` (client/traffic.py).

No image and no classifier is ever in it, by construction: all that leaves is a message of a fixed
form (common/messages.py, common/topics.py, common/hub.proto), those forms have no field for either,
and :class:`Kind` names those forms. A kind "image" would have nothing to count. Who adds a field to
a reply that may hold an array has to say here which kind it is, or a test fails. What a person
carries away as a file, say with ``fieldfed-client bundle``, is not sent and not counted.

Several processes of a device write, each through a connection of its own, which is made anew every
hour. A damaged file is set aside by whoever has it open alone. While the disk is full or the file
cannot be used, sums stay in memory, and what is recorded goes on.
"""

import fcntl
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Self, TypeVar, assert_never

from common.errors import FieldfedError
from common.files import make_folder
from common.messages import AlignReply, EvaluateReply, HelloReply, Refusal, Reply
from common.sqlite import Run, connect, explained, is_damage, set_aside, writing

log = logging.getLogger(__name__)

FILE: Final = "ledger.db"
HOUR: Final = 3600
KEPT_HOURS: Final = 2 * 366 * 24
"""In which anything left, the newest: at least two years, whatever the clock says."""
MOST_ROWS: Final = 200_000
MOST_WAITING: Final = 10_000
"""Sums in memory while the file cannot be written."""
LONGEST_NAME: Final = 200

_VERSION = 1
_PAGE = 4096
_SCHEMA = """
CREATE TABLE IF NOT EXISTS places (place INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS sent (
    hour INTEGER NOT NULL,
    kind TEXT NOT NULL,
    place INTEGER NOT NULL REFERENCES places,
    messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (hour, kind, place)
) WITHOUT ROWID;
"""
_ADD = """
INSERT INTO sent SELECT ?1, ?2, place, ?4, ?5 FROM places WHERE name = ?3
ON CONFLICT DO UPDATE SET messages = messages + excluded.messages, bytes = bytes + excluded.bytes
"""
_SINCE = "FROM sent JOIN places USING (place) WHERE hour >= ?"
_FORGET = (
    "DELETE FROM sent WHERE hour <= "
    "(SELECT hour FROM sent GROUP BY hour ORDER BY hour DESC LIMIT 1 OFFSET ?)",
    "DELETE FROM sent WHERE hour <= (SELECT hour FROM sent ORDER BY hour DESC LIMIT 1 OFFSET ?)",
)

Found = TypeVar("Found")


class Kind(StrEnum):
    """What there is that leaves a farm; see above why no image and no classifier is among it."""

    HELLO = "hello"
    UPDATE = "update"
    SCORES = "scores"
    MOMENTS = "moments"
    METRICS = "metrics"
    REPORT = "report"
    REFUSAL = "refusal"
    REQUEST = "request"
    INSTALL_REPORT = "install report"
    AVAILABILITY = "availability"
    STATE = "state"
    TELEMETRY = "telemetry"
    RESULT = "result"
    EVENT = "event"
    DISCOVERY = "discovery"


class _Key(NamedTuple):
    hour: int
    kind: Kind
    destination: str


class _Sum(NamedTuple):
    messages: int
    bytes: int


@dataclass(frozen=True)
class Total:
    """What left as one kind to one destination; ``kind`` may be one of a later release."""

    kind: str
    destination: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class Row(Total):
    """The same within the hour from ``time`` on (seconds since 1970)."""

    time: int


class Ledger:
    """The ledger of one farm; any thread may call any method.

    ``add`` raises nothing. The others raise StateError when the file cannot be used, as DiskError
    when the disk is full.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._waiting: dict[_Key, _Sum] = {}
        self._db: sqlite3.Connection | None = None
        self._holding: IO[bytes] | None = None
        self._hour: int | None = None
        self._opened: tuple[int, int] | None = None
        self._well = True

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Self:
        """The ledger at this path; the file is opened, or begun, when it is first needed."""
        return cls(path, clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and close the file; what comes later opens it again."""
        with self._lock:
            if self._waiting:
                self._write()
            self._shut()

    def add(
        self,
        kind: Kind,
        bytes: int,  # noqa: A002
        destination: str,
        time: float | None = None,
    ) -> None:
        """Write down that a message leaves.

        Args:
            kind: what it is.
            bytes: how long it is.
            destination: "server HOST:PORT", "hub HOST:PORT" or "broker HOST:PORT".
            time: seconds since 1970; now if not given.
        """
        hour = int(self._clock() if time is None else time) // HOUR
        key = _Key(hour, kind, destination[:LONGEST_NAME])
        with self._lock:
            before = self._waiting.get(key)
            if before is None and len(self._waiting) >= MOST_WAITING:
                return
            messages, size = before or _Sum(0, 0)
            self._waiting[key] = _Sum(messages + 1, size + bytes)
            self._write()

    def rows(self, since: float | None = None) -> list[Row]:
        """What left, hour by hour, the oldest first.

        Args:
            since: seconds since 1970; the hour in which that lies counts whole.
        """
        columns = f"hour * {HOUR}, kind, name, messages, bytes"
        found = self._select(f"SELECT {columns} {_SINCE} ORDER BY hour, kind, name", since)
        return [Row(kind, name, count, size, hour) for hour, kind, name, count, size in found]

    def totals(self, since: float | None = None) -> list[Total]:
        """The same without hours, by destination and kind."""
        columns = "kind, name, sum(messages), sum(bytes)"
        sql = f"SELECT {columns} {_SINCE} GROUP BY kind, name ORDER BY name, kind"
        return [Total(*row) for row in self._select(sql, since)]

    # --- the file ----------------------------------------------------------------------------

    def _select(self, sql: str, since: float | None) -> Sequence[Any]:
        first = -1 if since is None else int(since) // HOUR

        def read(db: sqlite3.Connection) -> list[Any]:
            return db.execute(sql, (first,)).fetchall()

        with self._lock:
            return self._do(read)

    def _write(self) -> None:
        """Bring what waits into the file; where that cannot be, say so once and go on."""
        try:
            self._do(self._put)
        except FieldfedError as error:
            if self._well:
                log.error("what leaves is counted, but not written down: %s", error)
            self._well = False
        else:
            self._waiting.clear()
            self._well = True

    def _put(self, db: sqlite3.Connection) -> None:
        # as in the outbox: telemetry comes every minute, and memory cards wear out
        durable = any(key.kind is not Kind.TELEMETRY for key in self._waiting)
        with writing(db, durable=durable) as run:
            for key, (messages, size) in self._waiting.items():
                run("INSERT OR IGNORE INTO places (name) VALUES (?)", (key.destination,))
                run(_ADD, (key.hour, key.kind, key.destination, messages, size))

    def _do(self, work: Callable[[sqlite3.Connection], Found]) -> Found:
        with explained(self._path):
            try:
                return work(self._open())
            except sqlite3.DatabaseError as error:
                self._shut()
                if not is_damage(error):
                    raise
                self._set_aside(error)
            return work(self._open())

    def _open(self) -> sqlite3.Connection:
        """The file, opened and checked anew every hour."""
        hour = int(self._clock()) // HOUR
        if self._db is not None and hour == self._hour:
            return self._db
        self._shut()
        make_folder(self._path.parent)
        self._holding = self._guard(fcntl.LOCK_SH)  # from here on nobody sets the file aside
        self._opened = self._identity()
        self._db = connect(self._path, _SCHEMA, _VERSION, _PAGE, shared=True)
        self._hour = hour
        with writing(self._db, durable=False) as run:
            _forget(run)
        return self._db

    def _shut(self) -> None:
        if self._db is not None:
            self._db.close()
        if self._holding is not None:
            self._holding.close()
        self._db = self._holding = None

    def _guard(self, how: int) -> IO[bytes]:
        """Hold the file as one of many, or alone; raises BlockingIOError."""
        file = self._path.with_name(f"{self._path.name}.lock").open("ab")
        try:
            fcntl.flock(file, how)
        except BaseException:
            file.close()
            raise
        return file

    def _set_aside(self, why: sqlite3.DatabaseError) -> None:
        """Rename a damaged file, unless another process has it open: it would write on there."""
        try:
            alone = self._guard(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise why from None
        with alone:
            if self._identity() == self._opened:  # else another process was faster
                set_aside(self._path, why)

    def _identity(self) -> tuple[int, int] | None:
        if not self._path.exists():
            return None
        found = self._path.stat()
        return found.st_dev, found.st_ino


def _forget(run: Run) -> None:
    for sql, kept in zip(_FORGET, (KEPT_HOURS, MOST_ROWS), strict=True):
        run(sql, (kept,))


# --- what a reply is -----------------------------------------------------------------------------


def kinds_of(reply: Reply, size: int) -> Mapping[Kind, int]:
    """A reply to the server taken apart: bytes by kind.

    Args:
        reply: that leaves.
        size: its bytes as it is sent; what is no array goes with the figures.
    """
    match reply:
        case AlignReply():
            scores = (reply.head_importance, reply.head_mmd2, reply.neuron_importance)
            scored = sum(one.nbytes for one in scores if one is not None)
            moments = 0 if reply.moments is None else reply.moments.nbytes
            found = {
                Kind.UPDATE: reply.update.nbytes,
                Kind.SCORES: scored,
                Kind.MOMENTS: moments,
                Kind.METRICS: max(size - reply.update.nbytes - scored - moments, 0),
            }
            return {kind: count for kind, count in found.items() if count}
        case EvaluateReply():
            return {Kind.REPORT: size}
        case HelloReply():
            return {Kind.HELLO: size}
        case Refusal():
            return {Kind.REFUSAL: size}
        case _:
            assert_never(reply)
