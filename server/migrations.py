"""The schema of the server's database: numbered steps, only ever forward, only ever appended.

``PRAGMA user_version`` is the number of steps applied. Each step and its number are one
transaction, so a step that fails or is cut off leaves the database as it was. A shipped step is
never edited: databases on farms' servers have it behind them.
"""

import sqlite3
from collections.abc import Sequence
from typing import TypeAlias

from common.errors import StateError

Migration: TypeAlias = tuple[str, ...]

_FIRST: Migration = (
    """CREATE TABLE masks (
        digest TEXT PRIMARY KEY,
        json TEXT NOT NULL
    ) STRICT""",
    """CREATE TABLE runs (
        run INTEGER PRIMARY KEY AUTOINCREMENT,
        config_json TEXT NOT NULL,
        seed INTEGER NOT NULL,
        base TEXT NOT NULL,
        mask TEXT NOT NULL REFERENCES masks,
        message TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'running'
            CHECK (state IN ('running', 'done', 'stopped', 'failed')),
        detail TEXT NOT NULL DEFAULT '',
        tau REAL CHECK (tau > 0),
        started REAL NOT NULL,
        finished REAL
    ) STRICT""",
    """CREATE TABLE farms (
        run INTEGER NOT NULL REFERENCES runs,
        node INTEGER NOT NULL,
        farm TEXT NOT NULL,
        examples INTEGER NOT NULL,
        classes INTEGER NOT NULL,
        last_seen REAL NOT NULL,
        PRIMARY KEY (run, node)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE rounds (
        run INTEGER NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('align', 'evaluate')),
        attempt INTEGER NOT NULL DEFAULT 1,
        base TEXT NOT NULL,
        mask TEXT NOT NULL REFERENCES masks,
        quorum INTEGER NOT NULL,
        deadline REAL NOT NULL,
        state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'committed')),
        started REAL NOT NULL,
        finished REAL,
        participants INTEGER NOT NULL DEFAULT 0,
        macs_ratio REAL,
        heads_kept_ratio REAL,
        mean_accuracy REAL,
        PRIMARY KEY (run, round, kind)
    ) STRICT, WITHOUT ROWID""",
    # kind is a column only to let the foreign key say: replies belong to rounds of alignment
    """CREATE TABLE replies (
        run INTEGER NOT NULL,
        round INTEGER NOT NULL,
        kind TEXT NOT NULL DEFAULT 'align' CHECK (kind = 'align'),
        node INTEGER NOT NULL,
        farm TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        examples INTEGER NOT NULL,
        accuracy REAL NOT NULL,
        f1 REAL NOT NULL,
        loss REAL NOT NULL,
        dal REAL NOT NULL,
        seconds REAL NOT NULL,
        size_bytes INTEGER NOT NULL,
        path TEXT NOT NULL,
        digest TEXT NOT NULL,
        received REAL NOT NULL,
        PRIMARY KEY (run, round, node),
        FOREIGN KEY (run, round, kind) REFERENCES rounds,
        FOREIGN KEY (run, node) REFERENCES farms
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE rejections (
        id INTEGER PRIMARY KEY,
        run INTEGER NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        node INTEGER,
        reason TEXT NOT NULL,
        detail TEXT NOT NULL,
        received REAL NOT NULL
    ) STRICT""",
    "CREATE INDEX rejections_by_farm ON rejections (run, node)",
    """CREATE TABLE traffic (
        run INTEGER NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('align', 'evaluate')),
        node INTEGER NOT NULL,
        requests INTEGER NOT NULL DEFAULT 0,
        attempt INTEGER NOT NULL DEFAULT 0,
        bytes_down INTEGER NOT NULL DEFAULT 0,
        bytes_up INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (run, round, kind, node)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE candidates (
        run INTEGER NOT NULL,
        round INTEGER NOT NULL,
        kind TEXT NOT NULL DEFAULT 'align' CHECK (kind = 'align'),
        digest TEXT NOT NULL,
        parent TEXT NOT NULL,
        mask TEXT NOT NULL REFERENCES masks,
        spec_json TEXT NOT NULL,
        macs INTEGER NOT NULL,
        params INTEGER NOT NULL,
        path TEXT NOT NULL,
        PRIMARY KEY (run, round),
        FOREIGN KEY (run, round, kind) REFERENCES rounds
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE scores (
        id INTEGER PRIMARY KEY,
        run INTEGER NOT NULL,
        round INTEGER NOT NULL,
        farm TEXT,
        mask TEXT NOT NULL REFERENCES masks,
        heads BLOB NOT NULL,
        neurons BLOB,
        FOREIGN KEY (run, round) REFERENCES candidates
    ) STRICT""",
    "CREATE INDEX scores_by_round ON scores (run, round)",
    """CREATE TABLE reports (
        run INTEGER NOT NULL,
        label TEXT NOT NULL,
        node INTEGER NOT NULL,
        round INTEGER NOT NULL,
        farm TEXT NOT NULL,
        base TEXT NOT NULL,
        accuracy REAL NOT NULL,
        f1 REAL NOT NULL,
        examples INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        seconds REAL NOT NULL,
        received REAL NOT NULL,
        PRIMARY KEY (run, label, node),
        FOREIGN KEY (run, node) REFERENCES farms
    ) STRICT, WITHOUT ROWID""",
)

# Late replies, farms that are paused, and verdicts on prune events.
_SECOND: Migration = (
    # the round that the reply answers; older than ``round`` when it was folded in late
    "ALTER TABLE replies ADD COLUMN of_round INTEGER NOT NULL DEFAULT 0",
    "UPDATE replies SET of_round = round",
    "ALTER TABLE replies ADD COLUMN steps INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE replies ADD COLUMN train_seconds REAL NOT NULL DEFAULT 0",
    "CREATE UNIQUE INDEX replies_count_once ON replies (run, node, of_round)",
    "CREATE INDEX rejections_by_node ON rejections (node, received)",
    "CREATE INDEX replies_by_node ON replies (node, received)",
    """CREATE TABLE pauses (
        farm TEXT PRIMARY KEY,
        reason TEXT NOT NULL,
        since REAL NOT NULL,
        readmitted REAL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE verdicts (
        run INTEGER NOT NULL REFERENCES runs,
        event INTEGER NOT NULL,
        judged INTEGER NOT NULL,
        accepted INTEGER NOT NULL CHECK (accepted IN (0, 1)),
        drop_ratio REAL NOT NULL,
        farms INTEGER NOT NULL,
        mask TEXT NOT NULL REFERENCES masks,
        PRIMARY KEY (run, event)
    ) STRICT, WITHOUT ROWID""",
)

# Whether a farm's reply counts already is asked for every reply.
_THIRD: Migration = ("CREATE INDEX replies_by_farm ON replies (run, farm)",)

# The replies of a round lie in one file.
_FOURTH: Migration = (
    "ALTER TABLE replies ADD COLUMN start INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE replies ADD COLUMN length INTEGER NOT NULL DEFAULT 0",
)

# Bytes at the farms' sockets. Farms are known by name here: a node's number changes whenever its
# farm wakes, and counters belong to the farm's life, over all runs.
_FIFTH: Migration = (
    """CREATE TABLE link_counters (
        farm TEXT PRIMARY KEY,
        sent INTEGER NOT NULL,
        received INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE link_bytes (
        run INTEGER NOT NULL REFERENCES runs,
        round INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('align', 'evaluate')),
        farm TEXT NOT NULL,
        sent INTEGER NOT NULL,
        received INTEGER NOT NULL,
        PRIMARY KEY (run, round, kind, farm)
    ) STRICT, WITHOUT ROWID""",
)

# Scores cost privacy, whether or not any of them arrived.
_SIXTH: Migration = ("ALTER TABLE rounds ADD COLUMN scored INTEGER NOT NULL DEFAULT 0",)

# What a farm's score was made of, so that the fate of a head can be explained.
_SEVENTH: Migration = (
    "ALTER TABLE scores ADD COLUMN importance BLOB",
    "ALTER TABLE scores ADD COLUMN mmd2 BLOB",
)

# Cuts that farms tried before one of them was made; farms of an older release.
_EIGHTH: Migration = (
    "ALTER TABLE farms ADD COLUMN protocol INTEGER",
    """CREATE TABLE trials (
        run INTEGER NOT NULL REFERENCES runs,
        event INTEGER NOT NULL,
        place INTEGER NOT NULL,
        rule TEXT NOT NULL,
        farms INTEGER NOT NULL,
        accuracy REAL,
        made INTEGER NOT NULL CHECK (made IN (0, 1)),
        PRIMARY KEY (run, event, place)
    ) STRICT, WITHOUT ROWID""",
)

MIGRATIONS: tuple[Migration, ...] = (
    *(_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH, _SIXTH, _SEVENTH, _EIGHTH),
)


def version_of(connection: sqlite3.Connection) -> int:
    """Steps that have been applied."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def require_known(
    connection: sqlite3.Connection, steps: int = len(MIGRATIONS), exactly: bool = False
) -> int:
    """The database's version.

    Raises:
        StateError: it was written by a newer program or, with ``exactly``, by an older one.
    """
    version = version_of(connection)
    if version > steps:
        raise StateError(
            f"the database has schema version {version}, this program knows up to {steps}; "
            "install the newer fieldfed that wrote it"
        )
    if exactly and version < steps:
        raise StateError(
            f"the database has schema version {version}, this program reads {steps}; "
            "start the server once to bring it up to date"
        )
    return version


def migrate(connection: sqlite3.Connection, steps: Sequence[Migration] = MIGRATIONS) -> None:
    """Apply the steps that are missing; the connection must be in autocommit mode.

    Raises:
        StateError: the database is newer than this program.
        sqlite3.Error: a step failed; the database is as it was before that step.
    """
    while require_known(connection, len(steps)) < len(steps):
        connection.execute("BEGIN EXCLUSIVE")
        try:
            version = version_of(connection)  # another process may have been faster
            if version < len(steps):
                for statement in steps[version]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
