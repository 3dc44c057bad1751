"""``telemetry.db``: what devices have told, in a file of its own beside the store.

    devices     each device once: whether it is there, its newest state, when it was last heard of
    telemetry   how devices were; of every hour one is left after a while (server/retention.py)
    results     what their photographs show
    events      what has happened on them
    counts      messages that came, by what became of them

The bridge alone writes (server/arrivals.py); others read, at any time and for as long as they say:

    with reading(TelemetryStore, folder / telemetry.NAME) as told:
        told.devices()
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from common.errors import ProtocolError
from common.topics import DeviceState, Event, Result, Telemetry
from server.database import Database
from server.migrations import Migration

NAME = "telemetry.db"
"""Of the file in a server's folder."""
HOUR = 3600

Presence: TypeAlias = Literal["online", "offline", "never"]
"""Of a device; never: it was heard of, and has not said yet that it is there."""
Fate: TypeAlias = Literal["stored", "duplicate", "malformed", "oversized", "foreign", "crowded"]
"""Of a message: kept; had before; no message of its kind; too long; its topic names no device;
there are as many devices, in all or of its farm, as may be."""
FATES: tuple[Fate, ...] = get_args(Fate)

_FIRST: Migration = (
    """CREATE TABLE devices (
        number INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        farm TEXT,
        online INTEGER CHECK (online IN (0, 1)),
        since REAL,
        seen REAL,
        state TEXT,
        outbox INTEGER
    ) STRICT""",
    "CREATE INDEX devices_by_farm ON devices (farm)",
    # clustered by device: what is read, and thinned, is the history of one
    """CREATE TABLE telemetry (
        device INTEGER NOT NULL REFERENCES devices ON DELETE CASCADE,
        id INTEGER NOT NULL,
        time REAL NOT NULL,
        received REAL NOT NULL,
        uptime_seconds REAL NOT NULL,
        cpu_ratio REAL,
        memory_used_bytes INTEGER,
        memory_bytes INTEGER,
        disk_free_bytes INTEGER,
        temperature_celsius REAL,
        throttled INTEGER,
        under_voltage INTEGER,
        gpu_ratio REAL,
        link_sent_bytes INTEGER,
        link_received_bytes INTEGER,
        outbox_messages INTEGER NOT NULL,
        outbox_bytes INTEGER NOT NULL,
        dropped_messages INTEGER NOT NULL,
        PRIMARY KEY (device, id)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE results (
        device INTEGER NOT NULL REFERENCES devices ON DELETE CASCADE,
        id INTEGER NOT NULL,
        time REAL NOT NULL,
        received REAL NOT NULL,
        taken REAL NOT NULL,
        label TEXT NOT NULL,
        share REAL NOT NULL,
        sure INTEGER NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (device, id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX results_by_taken ON results (taken, label, sure)",
    """CREATE TABLE events (
        device INTEGER NOT NULL REFERENCES devices ON DELETE CASCADE,
        id INTEGER NOT NULL,
        time REAL NOT NULL,
        received REAL NOT NULL,
        kind TEXT NOT NULL,
        words TEXT NOT NULL,
        outcome TEXT,
        version INTEGER,
        PRIMARY KEY (device, id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX events_by_received ON events (received)",
    """CREATE TABLE counts (
        fate TEXT PRIMARY KEY,
        count INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
)

Table: TypeAlias = Literal["telemetry", "results", "events"]
COLUMNS: Mapping[Table, tuple[str, ...]] = {
    "telemetry": tuple(Telemetry.model_fields),
    "results": tuple(Result.model_fields),
    "events": tuple(Event.model_fields),
}
"""Of each table, beside device, id, time and received."""
_DEVICES = (
    "SELECT name, farm, CASE online WHEN 1 THEN 'online' WHEN 0 THEN 'offline' ELSE 'never' END "
    "AS presence, since, seen, state AS state_json, outbox FROM devices"
)


@dataclass(frozen=True)
class DeviceRow:
    """A device: its farm once it has told it, and since when (unix seconds) it is there or not.

    ``seen`` is when a message last came from it; None where all that is known had been left at the
    broker. ``outbox`` counts messages that waited on it, by its newest telemetry.
    """

    name: str
    farm: str | None
    presence: Presence
    since: float | None
    seen: float | None
    state_json: str | None
    outbox: int | None

    @property
    def state(self) -> DeviceState | None:
        """What it said of itself; None before it has, or where another release understood it."""
        try:
            return None if self.state_json is None else DeviceState.parse(self.state_json.encode())
        except ProtocolError:
            return None


@dataclass(frozen=True)
class Measured:
    """How a device was at ``time``."""

    time: float
    telemetry: Telemetry


@dataclass(frozen=True)
class LabelHour:
    """Photographs taken within the hour that begins at ``hour``: of one label, and sure ones."""

    hour: int
    label: str
    count: int
    sure: int


@dataclass(frozen=True)
class EventRow:
    """Something that happened on a device at ``time`` by its own clock."""

    device: str
    time: float
    received: float
    kind: str
    words: str
    outcome: str | None
    version: int | None


class TelemetryStore(Database):
    """The tables; see ``Database`` for errors. Times are unix seconds."""

    migrations: ClassVar = (_FIRST,)

    # --- read --------------------------------------------------------------------------------

    def devices(self, limit: int = 10_000) -> list[DeviceRow]:
        """The first devices by name."""
        return self._all(DeviceRow, f"{_DEVICES} ORDER BY name LIMIT ?", limit)

    def device(self, name: str) -> DeviceRow | None:
        """One device; None where it was never heard of."""
        found = self._all(DeviceRow, f"{_DEVICES} WHERE name = ?", name)
        return found[0] if found else None

    def presence(self) -> Mapping[Presence, int]:
        """How many devices are there, are not, and have not said."""
        sql = "SELECT online, COUNT(*) AS count FROM devices GROUP BY online"
        counts = {row["online"]: row["count"] for row in self._select(sql)}
        return {
            "online": counts.get(1, 0),
            "offline": counts.get(0, 0),
            "never": counts.get(None, 0),
        }

    def measured(self, device: str, since: float = 0.0, limit: int = 10_000) -> list[Measured]:
        """Telemetry of a device by its own clock, the newest ``limit`` of it, oldest first."""
        found = self._select(
            "SELECT * FROM telemetry WHERE device = (SELECT number FROM devices WHERE name = ?) "
            "AND time >= ? ORDER BY id DESC LIMIT ?",
            *(device, since, limit),
        )
        return [_measured(row) for row in reversed(found)]

    def newest(self, device: str) -> Measured | None:
        """The newest telemetry of a device."""
        found = self.measured(device, limit=1)
        return found[0] if found else None

    def newest_of_all(self, limit: int = 10_000) -> Mapping[str, Measured]:
        """The newest telemetry of the first devices by name."""
        found = self._select(
            "SELECT name, telemetry.* FROM devices JOIN telemetry ON device = number AND id = "
            "(SELECT max(id) FROM telemetry WHERE device = number) ORDER BY name LIMIT ?",
            limit,
        )
        return {row["name"]: _measured(row) for row in found}

    def labels_by_hour(
        self, since: float, until: float, device: str | None = None
    ) -> list[LabelHour]:
        """Results of photographs taken in this time, per hour and label; of one device or of all.

        Labels are what farms call their classes: they are for the operator's eyes, not for metrics.
        """
        return self._all(
            LabelHour,
            f"SELECT CAST(taken / {HOUR} AS INTEGER) * {HOUR} AS hour, label, COUNT(*) AS count, "  # noqa: S608
            "sum(sure) AS sure FROM results WHERE taken >= ?1 AND taken < ?2 AND (?3 IS NULL OR "
            "device = (SELECT number FROM devices WHERE name = ?3)) GROUP BY 1, 2 ORDER BY 1, 2",
            *(since, until, device),
        )

    def events(self, limit: int = 100, device: str | None = None) -> list[EventRow]:
        """The events that came last, newest first; of one device or of all."""
        return self._all(
            EventRow,
            "SELECT devices.name AS device, events.* FROM events JOIN devices ON number = device "
            "WHERE ?2 IS NULL OR name = ?2 ORDER BY received DESC, id DESC LIMIT ?1",
            *(limit, device),
        )

    def counts(self) -> Mapping[Fate, int]:
        """Messages that came, by what became of them; what never happened counts 0."""
        found = {row["fate"]: row["count"] for row in self._select("SELECT * FROM counts")}
        return {fate: found.get(fate, 0) for fate in FATES}


def _measured(row: Any) -> Measured:
    fields = {name: row[name] for name in COLUMNS["telemetry"]}
    return Measured(row["time"], Telemetry(**fields))
