"""Messages of a device that wait on disk until the broker has them.

    telemetry   what is measured: may become coarser when the line is away for long
    event       what has happened
    result      what others work on: the last to be given up

Each message is canonical JSON with an ``id`` and the ``time`` at which it was put. Ids rise over
the life of a device, whatever happens to the file: they are reserved on disk, many at a time,
before the first of them is given out, and a new file begins with the time in microseconds. A result
or an event is on the disk when ``put`` returns. Telemetry survives the end of the process at any
instant; of the last of it a power cut may take some.

The file and SQLite's log beside it stay below a bound. When it is reached, telemetry is thinned: of
every two messages one goes, from the oldest on, and from the oldest again once the latest is
reached, so that a long outage leaves a history that is coarser the older it is. When no telemetry
is left, the oldest events go, and then the oldest results.
"""

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, Self, TypeAlias, TypeVar, get_args

from common.errors import ConfigError, ProtocolError, RejectReason
from common.files import make_folder
from common.sqlite import Run, connect, explained, is_damage, number, set_aside, writing

log = logging.getLogger(__name__)

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Kind: TypeAlias = Literal["telemetry", "event", "result"]
Mark: TypeAlias = tuple[str, int]
"""The name of a number that is kept together with a message, and its value."""
Found = TypeVar("Found")

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
LEAST_BYTES = 64_000
"""The smallest bound that there can be."""
RESERVED_IDS = 1 << 16
_VERSION = 1
_LOG_PAGES = 4000
"""How long SQLite's log grows before it is brought into the file."""
_BATCH_BYTES = 32_768
_SPARE_PAGES = 8
"""That one change may take beside those of its message: inner pages, and those that are split."""
_SHRINK_PAGES = 256
"""Of an empty outbox a file longer than this is made short again."""
_CHANGE_PAGES = 16
"""Most that one change writes beside the bytes of its message."""
_PAGE, _FRAME = 1024, 24
"""Bytes of a page, and of what is written before each in SQLite's log."""
_MARK = "mark "
"""Before the names of marks, among the outbox's own numbers."""
_SCHEMA = (
    "CREATE TABLE numbers (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;"
) + "".join(
    f"CREATE TABLE {kind} (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL);"
    for kind in KINDS
)
_SELECT = "SELECT id, '{0}' AS kind, topic, payload FROM {0} WHERE id > ?1"
_WAITING = " UNION ALL ".join(map(_SELECT.format, KINDS)) + " ORDER BY id LIMIT ?2"


@dataclass(frozen=True)
class Waiting:
    """A message that waits; ``payload`` is JSON in UTF-8."""

    id: int
    kind: Kind
    topic: str
    payload: bytes


@dataclass(frozen=True)
class Depth:
    """How many messages wait, and the bytes of their payloads."""

    count: int
    bytes: int


class Outbox:
    """The messages of one device; any thread may call any method. One process has it open.

    Any method raises DiskError when the disk is full or cannot be written; all that was put before
    is kept. A file that turns out to be damaged is set aside, and a new one is begun.
    """

    def __init__(self, path: Path, max_bytes: int, clock: Callable[[], float]) -> None:
        if max_bytes < LEAST_BYTES:
            raise ConfigError(
                f"an outbox of {max_bytes} bytes is too small; give it at least {LEAST_BYTES}"
            )
        self._path, self._max_bytes, self._clock = path, max_bytes, clock
        self._largest, self._batch = max_bytes // 16, min(_BATCH_BYTES, max_bytes // 16)
        self._lock = threading.RLock()
        self._told: set[Kind] = set()
        self._next, self._usable = 0, False
        self._numbers: dict[str, int] = {}
        self._listener: Callable[[], None] = lambda: None

    @classmethod
    def open(
        cls, path: Path, max_bytes: int = 64_000_000, clock: Callable[[], float] = time.time
    ) -> Self:
        """Open the outbox, or begin it.

        A damaged file becomes NAME.damaged, in place of an earlier one, and a new one is begun.

        Args:
            path: of the file.
            max_bytes: most that the file and SQLite's log beside it take.
            clock: seconds since 1970.

        Raises:
            StateError: another process has it open, or it is of a newer version of this program.
            ConfigError: ``max_bytes`` is below ``LEAST_BYTES``.
        """
        outbox = cls(path, max_bytes, clock)
        with explained(path):
            make_folder(path.parent)
            try:
                outbox._begin()
            except sqlite3.DatabaseError as error:
                outbox._begin_anew(error)
        return outbox

    def close(self) -> None:
        """Close the file; all that waits stays in it."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have this called, by the thread that puts, after each message that was put."""
        self._listener = listener

    def put(
        self, kind: Kind, topic: str, body: Mapping[str, JSON], mark: Mark | None = None
    ) -> int:
        """Keep a message until it is removed; returns its id.

        Args:
            kind: says how dear it is.
            topic: where it will be published.
            body: its fields; ``id`` and ``time`` (seconds since 1970) are added.
            mark: kept with the message, or neither of them: how far its source has been read.

        Raises:
            ProtocolError: the body is no JSON (say, not a number), or larger than a sixteenth of
                the bound.
        """
        found = self._do(lambda: self._put(kind, topic, body, mark))
        self._listener()
        return found

    def marked(self, name: str) -> int | None:
        """The latest value of a mark; None where none was put, or the file was damaged since."""
        with self._lock:
            return self._numbers.get(_MARK + name)

    def waiting(self, most: int, after: int = 0) -> list[Waiting]:
        """The oldest messages with ids above ``after``, in the order in which they were put."""
        rows = self._do(lambda: self._db.execute(_WAITING, (after, most)).fetchall())
        return [Waiting(*row) for row in rows]

    def remove(self, ids: Collection[int]) -> None:
        """Forget messages that the broker has; one that is not here any more is no error.

        A power cut may bring the last of them back: they are sent twice.
        """
        self._do(lambda: self._remove(ids))

    def refuse(self, id: int) -> None:  # noqa: A002
        """Forget a message that no broker will ever take, and count it as dropped."""
        for kind in KINDS:
            self._do(partial(self._drop, kind, [id]))

    @property
    def depth(self) -> Depth:
        """How much waits."""
        with self._lock:
            return Depth(self._count, self._bytes)

    @property
    def dropped(self) -> Mapping[Kind, int]:
        """Messages that were given up, over the life of the file."""
        with self._lock:
            return MappingProxyType({kind: self._numbers.get(kind, 0) for kind in KINDS})

    # --- the file ----------------------------------------------------------------------------

    def _begin(self, least: int = 0) -> None:
        """Open the file; ids begin at ``least`` or above."""
        self._db = connect(self._path, _SCHEMA, _VERSION, _PAGE)
        try:
            self._limit()
            marks = {name: at for name, at in self._numbers.items() if name.startswith(_MARK)}
            rows = self._db.execute("SELECT name, value FROM numbers").fetchall()
            self._numbers = marks | dict(rows)  # of a damaged file the marks are still known
            reserved = self._numbers.get("reserved", 0)
            self._next = max(self._next, reserved, least, int(self._clock() * 1e6))
            self._reserve()
            self._measure()
            if number(self._db, "page_count") > self._most_pages:  # the bound was higher before
                self._make_room(0)
                self._shrink()
                self._limit()  # which cannot be less than the file is long
        except BaseException:
            self._db.close()
            raise
        self._usable = True

    def _limit(self) -> None:
        """Share the bound between the file and SQLite's log beside it."""
        log_pages = min(_LOG_PAGES, self._max_bytes // 8 // _PAGE)
        self._db.execute(f"PRAGMA wal_autocheckpoint = {log_pages}")
        # it is brought into the file after the change with which it became long
        longest = log_pages + self._largest // _PAGE + _CHANGE_PAGES
        left = self._max_bytes - (longest + 1) * (_PAGE + _FRAME)
        self._most_pages = left // _PAGE
        self._db.execute(f"PRAGMA max_page_count = {self._most_pages}")

    def _measure(self) -> None:
        self._count = self._bytes = 0
        for kind in KINDS:
            sql = f"SELECT count(*), ifnull(sum(length(payload)), 0) FROM {kind}"  # noqa: S608
            count, size = self._db.execute(sql).fetchone()
            self._count, self._bytes = self._count + count, self._bytes + size

    def _begin_anew(self, why: sqlite3.DatabaseError) -> None:
        """Set a damaged file aside and begin another one; raises ``why`` if that is no damage."""
        if not is_damage(why):
            raise why
        self._usable = False
        with contextlib.suppress(AttributeError, sqlite3.Error):
            self._db.close()
        # no id was given out after the file was last written, should the clock be wrong by now
        self._begin(int((set_aside(self._path, why) + 1) * 1e6))

    def _do(self, work: Callable[[], Found]) -> Found:
        with self._lock, explained(self._path):
            try:
                if not self._usable:  # a file was set aside, and there was no room for a new one
                    self._begin()
                return work()
            except sqlite3.DatabaseError as error:
                self._begin_anew(error)
            return work()

    # --- messages ----------------------------------------------------------------------------

    def _reserve(self) -> None:
        until = self._next + RESERVED_IDS
        with writing(self._db, durable=True) as run:
            run("INSERT OR REPLACE INTO numbers VALUES ('reserved', ?)", (until,))
        self._numbers["reserved"] = until

    def _put(self, kind: Kind, topic: str, body: Mapping[str, JSON], mark: Mark | None) -> int:
        if self._next >= self._numbers["reserved"]:
            self._reserve()
        found = self._next
        payload = text_of({**body, "id": found, "time": round(self._clock(), 3)}).encode()
        size = len(payload) + len(topic.encode())
        if size > self._largest:
            raise ProtocolError(
                f"a message for '{topic}' has {size} bytes, and at most {self._largest} pass",
                RejectReason.OVERSIZED,
            )
        self._make_room(size)
        with writing(self._db, durable=kind != "telemetry") as run:
            run(f"INSERT INTO {kind} VALUES (?, ?, ?)", (found, topic, payload))  # noqa: S608
            if mark is not None:
                run("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (_MARK + mark[0], mark[1]))
        if mark is not None:
            self._numbers[_MARK + mark[0]] = mark[1]
        self._next += 1
        self._count, self._bytes = self._count + 1, self._bytes + len(payload)
        return found

    def _remove(self, ids: Collection[int]) -> None:
        with writing(self._db, durable=False) as run:
            sizes = [size for kind in KINDS for size in _delete(run, kind, ids)]
        self._forget(sizes)
        if sizes and not self._count and number(self._db, "page_count") > _SHRINK_PAGES:
            self._shrink()

    def _forget(self, sizes: Sequence[int]) -> None:
        self._count, self._bytes = self._count - len(sizes), self._bytes - sum(sizes)

    def _shrink(self) -> None:
        """Give free pages back to the disk."""
        # as a script: execute() would end after the first page
        self._db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")

    # --- room --------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        """Give up what is least dear until a message of so many bytes fits."""
        most = self._most_pages - size // _PAGE - _SPARE_PAGES
        while number(self._db, "page_count") - number(self._db, "freelist_count") > most:
            if not (self._thin() or self._drop_oldest("event") or self._drop_oldest("result")):
                return

    def _thin(self) -> bool:
        """Drop every second one of the next few telemetry messages; returns whether one was."""
        cursor = self._numbers.get("thinned", 0)
        rows = self._next_telemetry(cursor)
        if len(rows) < 2:
            rows = self._next_telemetry(0)
        if not rows:
            return False
        doomed = [row[0] for row in rows[1::2]] or [rows[0][0]]
        # those that stay are written anew: between gaps they would take as many pages as before
        kept = [row for row in rows[::2] if row[0] not in doomed and len(row[2]) < _PAGE]
        self._tell("telemetry")
        self._drop("telemetry", doomed, kept, rows[-1][0])
        return True

    def _next_telemetry(self, after: int) -> list[tuple[int, str, bytes]]:
        """At least two telemetry messages, if there are, and more as far as they are small."""
        rows: list[tuple[int, str, bytes]] = []
        size = 0
        found = self._db.execute("SELECT * FROM telemetry WHERE id > ? ORDER BY id", (after,))
        with contextlib.closing(found):
            for row in found:
                rows.append(row)
                size += len(row[2])
                if len(rows) > 1 and size >= self._batch:
                    break
        return rows

    def _drop_oldest(self, kind: Kind) -> bool:
        row = self._db.execute(f"SELECT min(id) FROM {kind}").fetchone()  # noqa: S608
        if row[0] is None:
            return False
        self._tell(kind)
        self._drop(kind, [row[0]])
        return True

    def _tell(self, kind: Kind) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("'%s' is full: the oldest of kind %s are given up", self._path, kind)

    def _drop(
        self,
        kind: Kind,
        ids: Sequence[int],
        kept: Sequence[tuple[int, str, bytes]] = (),
        thinned: int | None = None,
    ) -> None:
        """Give messages up and count them, and write others of their kind anew."""
        changes = dict(self._numbers)
        with writing(self._db, durable=False) as run:
            sizes = _delete(run, kind, ids)
            _delete(run, kind, [row[0] for row in kept])
            for row in kept:
                run(f"INSERT INTO {kind} VALUES (?, ?, ?)", row)  # noqa: S608
            changes[kind] = changes.get(kind, 0) + len(sizes)
            if thinned is not None:
                changes["thinned"] = thinned
            for name in changes.keys() - {"reserved"}:
                run("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (name, changes[name]))
        self._numbers = changes
        self._forget(sizes)


def _delete(run: Run, kind: Kind, ids: Collection[int]) -> list[int]:
    """Delete messages of a kind; returns the bytes of each that was there."""
    sql = f"DELETE FROM {kind} WHERE id = ? RETURNING length(payload)"  # noqa: S608
    return [size for one in ids for (size,) in run(sql, (one,)).fetchall()]


def text_of(body: Mapping[str, JSON]) -> str:
    """Canonical JSON: the same fields always give the same text; raises ProtocolError."""
    try:
        return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"a message is no JSON: {error}") from error
