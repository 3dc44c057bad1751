"""What comes from devices, on its way into ``telemetry.db`` (server/telemetry.py).

A device's messages are told apart by their ids, which are keys of the tables: one that comes again,
however late and whatever was restarted meanwhile, is kept once.

A batch with a result, an event or a state is fsynced before the broker hears that it arrived, as
the device had fsynced it before. Of telemetry a power cut may take the last seconds: an fsync for
each batch would have the disk work for every measurement, and the store's commits wait for it.
"""

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from common.topics import DeviceState, Event, Result, Telemetry
from server.telemetry import COLUMNS, HOUR, Fate, Table, TelemetryStore

Value: TypeAlias = str | int | float | None

MOST_DEVICES, MOST_OF_FARM = 10_000, 100
MOST_ROWS: Mapping[Table, int] = {"telemetry": 100_000, "results": 600_000, "events": 50_000}
"""Of each device, so that one that says too much does not take the place of the others: results of
a photograph a minute for 400 days, and all that is kept of one that measures every ten seconds."""
STEP_ROWS = 20_000
"""Beyond that many, one call deletes so many, and says so."""
_THIN = (
    "DELETE FROM telemetry WHERE device = :device AND received < :before AND id NOT IN (SELECT "
    "max(id) FROM telemetry WHERE device = :device AND received < :before "
    "GROUP BY CAST(time / :hour AS INTEGER))"
)
_BEYOND = (
    "DELETE FROM {0} WHERE device = :device AND id IN (SELECT id FROM {0} WHERE device = :device "
    "AND id <= (SELECT id FROM {0} WHERE device = :device ORDER BY id DESC LIMIT 1 OFFSET :most) "
    "ORDER BY id LIMIT :step)"
)


@dataclass(frozen=True)
class Ages:
    """How old rows may become, in seconds; of telemetry beyond ``raw`` one an hour stays."""

    raw: float
    telemetry: float
    results: float
    events: float


@dataclass(frozen=True)
class There:
    """A device is there, or no longer."""

    device: str
    online: bool


@dataclass(frozen=True)
class Said:
    """What a device says of itself."""

    device: str
    state: DeviceState


@dataclass(frozen=True)
class Message:
    """What a device sent under an id, and when it was put there (unix seconds)."""

    device: str
    table: Table
    id: int
    time: float
    values: tuple[Value, ...]


def values_of(table: Table, body: Telemetry | Result | Event) -> tuple[Value, ...]:
    """What a message says, in the order of its table's columns."""
    return tuple(getattr(body, name) for name in COLUMNS[table])


@dataclass
class Batch:
    """What came since the last commit.

    ``seen`` says when devices were heard of, ``fates`` counts what is not kept.
    """

    news: list[There | Said | Message] = field(default_factory=list)
    seen: dict[str, float] = field(default_factory=dict)
    fates: Counter[Fate] = field(default_factory=Counter)

    def __len__(self) -> int:
        """How many messages it is made of."""
        return len(self.news) + self.fates.total()

    @property
    def durable(self) -> bool:
        """Whether it has to survive a power cut."""
        return any(not isinstance(one, Message) or one.table != "telemetry" for one in self.news)


class Arrivals(TelemetryStore):
    """The tables, to be written; for the bridge alone."""

    def keep(self, batch: Batch, now: float) -> Counter[Fate]:
        """Write a batch, in one transaction; returns what became of its messages.

        Args:
            batch: what came.
            now: when, in unix seconds.
        """
        with self._writing(batch.durable) as db:
            work = _Writing(db, now, batch)
            work.write()
        return work.fates

    def limit(self, most_bytes: int) -> None:
        """Refuse, with DiskError, what would make the file longer than that; for this connection.

        SQLite's log beside it comes on top.
        """
        self._select(f"PRAGMA max_page_count = {most_bytes // self._pragma('page_size')}")

    @property
    def used_bytes(self) -> int:
        """Of the file, without pages that are free."""
        pages = self._pragma("page_count") - self._pragma("freelist_count")
        return pages * self._pragma("page_size")

    def numbers(self) -> list[int]:
        """Of all devices, to go through them."""
        return [row["number"] for row in self._select("SELECT number FROM devices")]

    def thin(self, number: int, ages: Ages, now: float) -> int:
        """Delete what a device told too long ago, and what is too much; returns how many rows went.

        When these are ``STEP_ROWS`` or more there may be more to delete. Ages count from when a
        message came: a device's clock may say anything.
        """
        before = {name: now - age for name, age in vars(ages).items()}
        with self._writing(durable=False) as db:
            done = [
                db.execute(_THIN, {"device": number, "before": before["raw"], "hour": HOUR}),
                *(
                    db.execute(
                        f"DELETE FROM {table} WHERE device = ? AND received < ?",  # noqa: S608
                        (number, before[table]),
                    )
                    for table in COLUMNS
                ),
                *(
                    db.execute(
                        _BEYOND.format(table),
                        {"device": number, "most": most, "step": STEP_ROWS},
                    )
                    for table, most in MOST_ROWS.items()
                ),
            ]
        return sum(one.rowcount for one in done)

    def forget(self, before: float) -> int:
        """Forget devices that were last heard of before; returns how many."""
        return self._change("DELETE FROM devices WHERE seen < ?", before, durable=False)

    def _pragma(self, name: str) -> int:
        return int(self._select(f"PRAGMA {name}")[0][0])


class _Writing:
    """One transaction."""

    def __init__(self, db: sqlite3.Connection, now: float, batch: Batch) -> None:
        self._db, self._now, self._batch = db, now, batch
        self._numbers: dict[str, int | None] = {}
        self._known: int = db.execute("SELECT COUNT(*) FROM devices").fetchone()[0]
        self.fates = Counter(batch.fates)

    def write(self) -> None:
        for one in self._batch.news:
            number = self._number(one.device)
            try:
                fate: Fate = "crowded" if number is None else self._fate(number, one)
            except (sqlite3.IntegrityError, OverflowError):
                # what passed the border and fits no row: it would come again for ever
                fate = "malformed"
            self.fates[fate] += 1
        seen = [
            (at, number) for name, at in self._batch.seen.items() if (number := self._number(name))
        ]
        sql = "UPDATE devices SET seen = max(ifnull(seen, 0), ?) WHERE number = ?"
        self._db.executemany(sql, seen)
        self._db.executemany(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT DO UPDATE SET "
            "count = count + excluded.count",
            list(self.fates.items()),
        )

    def _number(self, name: str) -> int | None:
        """Of a device, which is made known; None where there are as many as may be."""
        if name in self._numbers:
            return self._numbers[name]
        found = self._db.execute("SELECT number FROM devices WHERE name = ?", (name,)).fetchone()
        number = found[0] if found else None
        if number is None and self._known < MOST_DEVICES:
            sql = "INSERT INTO devices (name) VALUES (?)"
            number = self._db.execute(sql, (name,)).lastrowid
            self._known += 1
        self._numbers[name] = number
        return number

    def _fate(self, number: int, one: There | Said | Message) -> Fate:
        """What becomes of a message of a device that is known."""
        match one:
            case There(online=online):
                sql = (
                    "UPDATE devices SET online = ?1, since = ?2 "
                    "WHERE number = ?3 AND online IS NOT ?1"
                )
                changed = self._db.execute(sql, (int(online), self._now, number))
            case Said(state=state):
                if self._full(state.farm, number):
                    return "crowded"
                text = state.model_dump_json(exclude_none=True)
                sql = (
                    "UPDATE devices SET farm = ?, state = ?2 WHERE number = ?3 AND state IS NOT ?2"
                )
                changed = self._db.execute(sql, (state.farm, text, number))
            case Message():
                values = (number, one.id, one.time, self._now, *one.values)
                changed = self._db.execute(_INSERTS[one.table], values)
                if changed.rowcount and one.table == "telemetry":
                    sql = "UPDATE devices SET outbox = ? WHERE number = ?"
                    self._db.execute(sql, (one.values[_OUTBOX], number))
        return "stored" if changed.rowcount else "duplicate"

    def _full(self, farm: str, number: int) -> bool:
        sql = "SELECT COUNT(*) FROM devices WHERE farm = ? AND number <> ?"
        return bool(self._db.execute(sql, (farm, number)).fetchone()[0] >= MOST_OF_FARM)


_OUTBOX = COLUMNS["telemetry"].index("outbox_messages")


def _insert(table: str, columns: Sequence[str]) -> str:
    names = ", ".join(("device", "id", "time", "received", *columns))
    places = ", ".join("?" * (4 + len(columns)))
    return f"INSERT INTO {table} ({names}) VALUES ({places}) ON CONFLICT DO NOTHING"  # noqa: S608


_INSERTS = {table: _insert(table, columns) for table, columns in COLUMNS.items()}
