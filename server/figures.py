"""What the store and the registry say in sums, for metrics (server/families.py).

Counts go over all runs. What they count is never taken back, and a reply counts from the commit of
its round on, so they only ever rise: also across restarts, and whoever reads them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.messages import TRIAL
from server.database import Database
from server.rows import GUARD, RunRow, ScoreRow
from server.store import Store
from server.versions import Versions

READ_SECONDS = 5.0
"""That the figures of one database may take; Prometheus waits for 10 s."""
MOST_FARMS = 1000
"""Whose own figures are shown: the first by name of the latest run."""

# Late replies judge an older backbone, and the local-only baseline none of the network's. Beside a
# max() the other columns are of the row that has it.
_QUALITY = (
    "SELECT farm, part, accuracy, f1, max(received) FROM ("
    "SELECT farm, 'decide' AS part, accuracy, f1, received FROM replies "
    "WHERE run = ?1 AND of_round = round UNION ALL "
    "SELECT farm, iif(label = ?2, 'decide', 'test'), accuracy, f1, received FROM reports "
    "WHERE run = ?1 AND label <> 'local' AND label NOT GLOB ?3) GROUP BY farm, part"
)

Kind = TypeVar("Kind", bound=Database)


@dataclass(frozen=True)
class RoundSums:
    """Rounds of alignment over all runs.

    ``failed`` were open when their run failed, ``reopened`` counts how often one was begun again,
    ``replies`` are those of committed rounds.
    """

    committed: int
    failed: int
    reopened: int
    replies: int


@dataclass(frozen=True)
class RoundNow:
    """The newest round; ``replies`` came so far, ``deadline`` is in unix seconds."""

    round: int
    open: int
    replies: int
    quorum: int
    deadline: float


@dataclass(frozen=True)
class Quality:
    """What a farm's classifier reaches on a part of its images, as ratios."""

    farm: str
    part: str
    accuracy: float
    f1: float


@contextmanager
def reading(kind: type[Kind], path: Path) -> Iterator[Kind]:
    """A database as it is at this instant, for ``READ_SECONDS``.

    Raises:
        StateError: it is not there or damaged, or the time is over.
    """
    with kind.open(path, read_only=True) as database:
        database.freeze(READ_SECONDS)
        yield database


class Figures(Store):
    """Sums over the store."""

    def newest_run(self) -> RunRow | None:
        """The newest run, found without reading the others."""
        number = self._select("SELECT max(run) AS run FROM runs")[0]["run"]
        return None if number is None else self.run(number)

    def newest_round(self) -> RoundNow | None:
        """The newest round of alignment in the newest run."""
        found = self._all(
            RoundNow,
            "SELECT round, state = 'open' AS open, (SELECT COUNT(*) FROM replies WHERE "
            "replies.run = rounds.run AND replies.round = rounds.round) AS replies, quorum, "
            "deadline FROM rounds WHERE run = (SELECT max(run) FROM runs) AND kind = 'align' "
            "ORDER BY round DESC LIMIT 1",
        )
        return found[0] if found else None

    def size_bytes(self) -> int:
        """Size of the database and of its log on disk."""
        log = self._path.with_name(f"{self._path.name}-wal")
        return sum(path.stat().st_size for path in (self._path, log) if path.is_file())

    # --- over all runs -----------------------------------------------------------------------

    def runs_by_state(self) -> Mapping[str, int]:
        """Runs by their state."""
        return self._counted("SELECT state AS of, COUNT(*) AS count FROM runs GROUP BY state")

    def round_sums(self) -> RoundSums:
        """How many rounds there were, and what became of them."""
        row = self._select(
            "SELECT total(rounds.state = 'committed') AS committed, "
            "total(rounds.state = 'open' AND runs.state = 'failed') AS failed, "
            "total(attempt - 1) AS reopened, total(participants) AS replies "
            "FROM rounds JOIN runs USING (run) WHERE kind = 'align'"
        )[0]
        return RoundSums(**{name: int(row[name]) for name in RoundSums.__dataclass_fields__})

    def round_seconds(self) -> list[float]:
        """How long each committed round took, from when it was first begun."""
        found = self._select(
            "SELECT max(finished - started, 0) AS seconds FROM rounds "
            "WHERE kind = 'align' AND state = 'committed'"
        )
        return [row["seconds"] for row in found]

    def rounds_late(self) -> Mapping[int, int]:
        """Replies of committed rounds by how many rounds late they were."""
        return self._counted(
            "SELECT replies.round - of_round AS of, COUNT(*) AS count FROM replies JOIN rounds "
            "ON rounds.run = replies.run AND rounds.round = replies.round "
            "AND rounds.kind = 'align' AND state = 'committed' GROUP BY of"
        )

    def rejected(self) -> Mapping[str, int]:
        """Rejections by reason."""
        return self._counted("SELECT reason AS of, COUNT(*) AS count FROM rejections GROUP BY of")

    def verdicts_by_outcome(self) -> Mapping[int, int]:
        """Verdicts on prune events: accepted (1) and undone (0)."""
        return self._counted("SELECT accepted AS of, COUNT(*) AS count FROM verdicts GROUP BY of")

    def message_bytes(self) -> tuple[int, int]:
        """Bytes of messages up from farms and down to them."""
        sql = "SELECT total(bytes_up) AS up, total(bytes_down) AS down FROM traffic"
        return self._both(sql)

    def socket_bytes(self) -> tuple[int, int]:
        """The same at the sockets of the farms that count them."""
        return self._both("SELECT total(sent) AS up, total(received) AS down FROM link_bytes")

    def last_commit(self) -> float | None:
        """When a round was last committed, in any run."""
        sql = "SELECT max(finished) AS at FROM rounds WHERE kind = 'align' AND state = 'committed'"
        found = self._select(sql)[0]["at"]
        return None if found is None else float(found)

    # --- the farms of a run ------------------------------------------------------------------

    def active_farms(self, run: int) -> int:
        """Farms of a run, by name, that are not paused."""
        sql = (
            "SELECT COUNT(DISTINCT farm) AS count FROM farms WHERE run = ? AND farm NOT IN "
            "(SELECT farm FROM pauses WHERE readmitted IS NULL)"
        )
        return int(self._select(sql, run)[0]["count"])

    def last_seen(self, run: int) -> Mapping[str, float]:
        """When each farm was last heard of; of the first ``MOST_FARMS`` by name."""
        found = self._select(
            "SELECT farm, max(last_seen) AS at FROM farms WHERE run = ? GROUP BY farm "
            "ORDER BY farm LIMIT ?",
            *(run, MOST_FARMS),
        )
        return {row["farm"]: row["at"] for row in found}

    def quality(self, run: int) -> list[Quality]:
        """The newest figures of each farm on its decide and its test part, of a shared backbone."""
        return self._all(Quality, _QUALITY, run, GUARD, f"{TRIAL}*")

    # --- the backbone of a run ---------------------------------------------------------------

    def mask_now(self, run: RunRow) -> str:
        """What ``last_mask`` says, found without reading every candidate."""
        sql = "SELECT mask FROM candidates WHERE run = ? ORDER BY round DESC LIMIT 1"
        found = self._select(sql, run.run)
        return self.mask(found[0]["mask"]) if found else run.mask_json

    def macs_ratio(self, run: int) -> float:
        """MACs of the newest candidate over those of the backbone that the run began with."""
        found = self._select(
            "SELECT macs_ratio FROM rounds WHERE run = ? AND kind = 'align' "
            "AND state = 'committed' ORDER BY round DESC LIMIT 1",
            run,
        )
        return float(found[0]["macs_ratio"]) if found else 1.0

    def last_scores(self, run: int) -> list[ScoreRow]:
        """Head scores of the newest score round, in the order of the commit."""
        found = self._select(
            "SELECT farm, mask, heads FROM scores WHERE run = ?1 AND round = "
            "(SELECT max(round) FROM scores WHERE run = ?1) ORDER BY id",
            run,
        )
        return [
            ScoreRow(row["farm"], row["mask"], np.frombuffer(row["heads"], "<f4")) for row in found
        ]

    def _counted(self, sql: str) -> dict[Any, int]:
        return {row["of"]: row["count"] for row in self._select(sql)}

    def _both(self, sql: str) -> tuple[int, int]:
        row = self._select(sql)[0]
        return int(row["up"]), int(row["down"])


class RegistryFigures(Versions):
    """Sums over the registry."""

    def newest_version(self) -> int | None:
        """Number of the newest version; None before the first."""
        found = self._select("SELECT max(counter) AS newest FROM versions")[0]["newest"]
        return None if found is None else int(found)

    def outcomes(self) -> Mapping[str, int]:
        """Reports of devices by outcome, over all versions."""
        found = self._select("SELECT outcome, COUNT(*) AS count FROM installs GROUP BY outcome")
        return {row["outcome"]: row["count"] for row in found}
