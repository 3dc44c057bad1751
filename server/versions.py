"""``registry.db``: which versions there are, what channels named and name, what devices said."""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from common.errors import ConfigError
from server.database import Database
from server.migrations import Migration

_FIRST: Migration = (
    """CREATE TABLE versions (
        counter INTEGER PRIMARY KEY,
        digest TEXT NOT NULL UNIQUE,
        backbone TEXT NOT NULL,
        document TEXT NOT NULL,
        created REAL NOT NULL,
        removed REAL
    ) STRICT""",
    """CREATE TABLE channels (
        name TEXT NOT NULL,
        counter INTEGER NOT NULL,
        version INTEGER NOT NULL REFERENCES versions,
        document TEXT NOT NULL,
        issued REAL NOT NULL,
        expires REAL NOT NULL,
        why TEXT NOT NULL,
        PRIMARY KEY (name, counter)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE installs (
        id INTEGER PRIMARY KEY,
        farm TEXT NOT NULL,
        device TEXT NOT NULL,
        version INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        detail TEXT NOT NULL,
        accuracy_before REAL,
        accuracy_after REAL,
        received REAL NOT NULL
    ) STRICT""",
    "CREATE INDEX installs_by_version ON installs (version, device)",
)


# A version on its way to a channel, one at a time.
_SECOND: Migration = (
    """CREATE TABLE rollouts (
        channel TEXT PRIMARY KEY,
        version INTEGER NOT NULL REFERENCES versions,
        previous INTEGER NOT NULL REFERENCES versions,
        counter INTEGER NOT NULL,
        document TEXT NOT NULL,
        plan TEXT NOT NULL,
        stage INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('running', 'paused', 'done', 'aborted')),
        since REAL NOT NULL,
        detail TEXT NOT NULL
    ) STRICT, WITHOUT ROWID""",
)

_NAMED = (
    "SELECT * FROM channels AS one WHERE counter = "
    "(SELECT max(counter) FROM channels WHERE name = one.name)"
)
_REMOVE = (
    "UPDATE versions SET removed = ? WHERE counter = ? AND NOT EXISTS ("
    "SELECT 1 FROM channels AS one WHERE version = versions.counter AND one.counter = "
    "(SELECT max(counter) FROM channels WHERE name = one.name))"
)


RolloutState = Literal["running", "paused", "done", "aborted"]


@dataclass(frozen=True)
class VersionRow:
    """A version; ``document`` is its signed manifest, ``removed`` when its objects were let go."""

    counter: int
    digest: str
    backbone: str
    document: str
    created: float
    removed: float | None


@dataclass(frozen=True)
class ChannelRow:
    """What a channel named from ``issued`` on, and why; ``document`` is signed."""

    name: str
    counter: int
    version: int
    document: str
    issued: float
    expires: float
    why: str


@dataclass(frozen=True)
class InstallRow:
    """What became of a version on a device."""

    farm: str
    device: str
    version: int
    outcome: str
    detail: str
    accuracy_before: float | None
    accuracy_after: float | None
    received: float


@dataclass(frozen=True)
class RolloutRow:
    """A version on its way to a channel: its document, the stage it is in since when, and why."""

    channel: str
    version: int
    previous: int
    counter: int
    document: str
    plan: str
    stage: int
    state: RolloutState
    since: float
    detail: str

    @property
    def going(self) -> bool:
        """Whether it is under way."""
        return self.state in ("running", "paused")

    def changed(self, **changes: Any) -> "RolloutRow":
        """The same with other values."""
        return replace(self, **changes)


class Versions(Database):
    """The tables of the registry."""

    migrations: ClassVar = (_FIRST, _SECOND)

    def add(self, make: Callable[[int], VersionRow]) -> VersionRow:
        """Add the version that ``make`` makes for the next counter."""
        with self._writing() as db:
            last = db.execute("SELECT max(counter) FROM versions").fetchone()[0] or 0
            row = make(last + 1)
            db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, NULL)",
                (row.counter, row.digest, row.backbone, row.document, row.created),
            )
            return row

    def versions(self) -> list[VersionRow]:
        """All that are there, oldest first."""
        return self._all(
            VersionRow, "SELECT * FROM versions WHERE removed IS NULL ORDER BY counter"
        )

    def version(self, counter: int) -> VersionRow | None:
        """One version, also when it was removed."""
        found = self._all(VersionRow, "SELECT * FROM versions WHERE counter = ?", counter)
        return found[0] if found else None

    def replace_document(self, counter: int, document: str) -> None:
        """Keep the same manifest with other signatures."""
        self._change("UPDATE versions SET document = ? WHERE counter = ?", document, counter)

    def remove(self, counters: list[int], now: float) -> None:
        """Mark versions as gone, before their objects go; one that a channel names now stays."""
        with self._writing() as db:
            db.executemany(_REMOVE, [(now, counter) for counter in counters])

    def name(self, channel: str, make: Callable[[int], ChannelRow]) -> ChannelRow:
        """Let a channel name what ``make`` makes for the counter it had last, 0 for a new one.

        Raises:
            ConfigError: that version was removed in the meantime.
        """
        with self._writing() as db:
            row = make(_last_counter(db, channel))
            sql = "SELECT 1 FROM versions WHERE counter = ? AND removed IS NULL"
            if db.execute(sql, (row.version,)).fetchone() is None:
                raise ConfigError(f"version {row.version} was removed a moment ago")
            db.execute(
                "INSERT INTO channels VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(row.name, row.counter, row.version, row.document),
                    *(row.issued, row.expires, row.why),
                ),
            )
            return row

    def channel(self, name: str) -> ChannelRow | None:
        """What a channel names now."""
        found = self.history(name)
        return found[-1] if found else None

    def history(self, name: str) -> list[ChannelRow]:
        """All that a channel has named, oldest first."""
        return self._all(ChannelRow, "SELECT * FROM channels WHERE name = ? ORDER BY counter", name)

    def channels(self) -> list[ChannelRow]:
        """What every channel names now, by name."""
        return self._all(ChannelRow, f"{_NAMED} ORDER BY name")

    def rollouts(self) -> list[RolloutRow]:
        """The last rollout of every channel."""
        return self._all(RolloutRow, "SELECT * FROM rollouts ORDER BY channel")

    def rollout(self, channel: str) -> RolloutRow | None:
        """The last rollout of a channel."""
        return next((row for row in self.rollouts() if row.channel == channel), None)

    def put_rollout(self, row: RolloutRow) -> None:
        """Keep a rollout in the place of the channel's last one."""
        names = list(RolloutRow.__dataclass_fields__)
        self._change(
            "INSERT OR REPLACE INTO rollouts (channel, version, previous, counter, document, plan, "
            "stage, state, since, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(getattr(row, name) for name in names),
        )

    def record_install(self, row: InstallRow) -> None:
        """Keep what a device reported."""
        self._change(
            "INSERT INTO installs (farm, device, version, outcome, detail, accuracy_before, "
            "accuracy_after, received) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(row.farm, row.device, row.version, row.outcome, row.detail),
            *(row.accuracy_before, row.accuracy_after, row.received),
        )

    def installs(self, version: int) -> list[InstallRow]:
        """What devices said of a version, oldest first."""
        return self._all(
            InstallRow, "SELECT * FROM installs WHERE version = ? ORDER BY id", version
        )


def _last_counter(db: sqlite3.Connection, channel: str) -> int:
    found = db.execute("SELECT max(counter) FROM channels WHERE name = ?", (channel,)).fetchone()[0]
    return int(found or 0)
