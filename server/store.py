"""The truth about every run, on disk: SQLite in WAL mode, fsynced when a run or round moves on.

A run writes itself down before it acts: the round before its requests, a reply before it counts,
and the end of a round (aggregate, consensus, mask, candidate) in ONE transaction. Killed at any
instant, the server finds each of these wholly there or not at all, and goes on behind the last
committed round. Other processes (status, page) open the file read-only while the run writes.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import StateError
from server.records import Records
from server.rows import (
    CandidateRow,
    FarmRow,
    Floats,
    LinkRow,
    RejectionRow,
    ReplyRow,
    ReportRow,
    RoundKind,
    RoundRow,
    RunRow,
    ScoreRow,
    TrafficRow,
    TrialRow,
    VerdictRow,
)

__all__ = [
    "CandidateRow",
    "FarmRow",
    "LinkRow",
    "RejectionRow",
    "ReplyRow",
    "ReportRow",
    "RoundRow",
    "RunRow",
    "ScoreRow",
    "Store",
    "TrafficRow",
    "VerdictRow",
]

_VECTORS = ("heads", "neurons", "importance", "mmd2")
_RUNS = (
    "SELECT runs.*, masks.json AS mask_json FROM runs JOIN masks ON mask = digest "
    "WHERE ?1 IS NULL OR run = ?1 ORDER BY run"
)


class Store(Records):
    """Runs, farms, rounds and what rounds end with; see ``Records`` and ``Database``."""

    # --- runs ------------------------------------------------------------------------------

    def start_run(
        self, config_json: str, seed: int, base: str, mask_json: str, message: str = ""
    ) -> int:
        """A new run on backbone ``base`` with its mask; a run left unfinished is stopped."""
        mask = _mask_digest(mask_json)
        now = time.time()
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET state = 'stopped', finished = ?, detail = 'another run was "
                "started' WHERE state = 'running'",
                (now,),
            )
            db.execute("INSERT OR IGNORE INTO masks VALUES (?, ?)", (mask, mask_json))
            cursor = db.execute(
                "INSERT INTO runs (config_json, seed, base, mask, message, started) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (config_json, seed, base, mask, message, now),
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def finish_run(
        self, run: int, state: Literal["done", "stopped", "failed"], detail: str = ""
    ) -> None:
        """The run is over."""
        self._change(
            "UPDATE runs SET state = ?, detail = ?, finished = ? WHERE run = ?",
            *(state, detail, time.time(), run),
        )

    def run(self, run: int) -> RunRow:
        """One run; raises StateError when there is none of that number."""
        found = self._all(RunRow, _RUNS, run)
        if not found:
            raise StateError(f"'{self._path}' knows no run {run}")
        return found[0]

    def latest_run(self) -> RunRow | None:
        """The newest run."""
        runs = self.runs()
        return runs[-1] if runs else None

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        return self._all(RunRow, _RUNS, None)

    def teaches(self, run: int) -> bool:
        """Whether farms teach a student in a run, so that nothing is cut (server/distil.py)."""
        return json.loads(self.run(run).config_json).get("taught") is not None

    def tau(self, run: int) -> float | None:
        """The frozen invariance scale; None before the first score round."""
        return self.run(run).tau

    def freeze_tau(self, run: int, tau: float) -> None:
        """Keep the invariance scale; once frozen, it stays."""
        self._change("UPDATE runs SET tau = ? WHERE run = ? AND tau IS NULL", tau, run)

    # --- farms -----------------------------------------------------------------------------

    def upsert_farm(
        self,
        run: int,
        node: int,
        farm: str,
        examples: int,
        classes: int,
        protocol: int | None = None,
    ) -> None:
        """A farm introduced itself, perhaps again."""
        self._change(
            "INSERT INTO farms (run, node, farm, examples, classes, protocol, last_seen) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET farm = excluded.farm, "
            "examples = excluded.examples, classes = excluded.classes, "
            "protocol = excluded.protocol, last_seen = excluded.last_seen",
            *(run, node, farm, examples, classes, protocol, time.time()),
            durable=False,
        )

    def farms(self, run: int) -> list[FarmRow]:
        """The farms of a run, by node."""
        return self._all(
            FarmRow,
            "SELECT *, (SELECT COUNT(*) FROM rejections AS bad WHERE bad.run = farms.run "
            "AND bad.node = farms.node) AS rejected FROM farms WHERE run = ? ORDER BY node",
            run,
        )

    # --- rounds ----------------------------------------------------------------------------

    def open_round(
        self,
        run: int,
        number: int,
        *,
        kind: RoundKind,
        base: str,
        mask: str,
        quorum: int,
        deadline: float,
        scored: bool = False,
    ) -> None:
        """Write a round down before its requests are sent; open again after a crash.

        Raises:
            StateError: a round of alignment that is already committed.
        """
        with self._writing() as db:
            if kind == "align" and self._round_state(run, number) == "committed":
                raise StateError(f"round {number} of run {run} is committed; it cannot be reopened")
            db.execute(
                "INSERT INTO rounds (run, round, kind, base, mask, quorum, deadline, started, "
                "scored) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET base = excluded.base, "
                "mask = excluded.mask, quorum = excluded.quorum, deadline = excluded.deadline, "
                "scored = max(scored, excluded.scored), "
                "attempt = attempt + 1, state = 'open', finished = NULL",
                (run, number, kind, base, mask, quorum, deadline, time.time(), int(scored)),
            )

    def align_round(self, run: int, number: int) -> RoundRow | None:
        """One round of alignment; None when it was never opened."""
        query = "SELECT * FROM rounds WHERE run = ? AND round = ? AND kind = 'align'"
        found = self._all(RoundRow, query, run, number)
        return found[0] if found else None

    def rounds(self, run: int) -> list[RoundRow]:
        """All rounds, in order; at the same number, alignment before evaluation."""
        return self._all(RoundRow, "SELECT * FROM rounds WHERE run = ? ORDER BY round, kind", run)

    def commit_round(
        self,
        run: int,
        number: int,
        *,
        candidate: CandidateRow,
        mask_json: str | None = None,
        scores: Sequence[ScoreRow] = (),
        macs_ratio: float,
        heads_kept_ratio: float,
        mean_accuracy: float | None,
        verdict: VerdictRow | None = None,
    ) -> None:
        """Everything a round of alignment ends with, in one transaction.

        Args:
            run: of the round.
            number: of the round in its run.
            candidate: the next training base.
            mask_json: the mask of the candidate as canonical JSON, when it is a new one.
            scores: of the farms and of the consensus, in a score round.
            macs_ratio: MACs of the candidate over those of the dense backbone.
            heads_kept_ratio: the same for heads.
            mean_accuracy: of the round's base on the farms' decide parts, mean over farms; None
                when only late replies came.
            verdict: on the last prune event, when the round's replies judged it.

        Raises:
            StateError: the round is not open, or the candidate's mask is not known.
        """
        with self._writing() as db:
            if self._round_state(run, number) != "open":
                raise StateError(f"round {number} of run {run} is not open; it cannot be committed")
            if mask_json is not None:
                values = (_mask_digest(mask_json), mask_json)
                db.execute("INSERT OR IGNORE INTO masks VALUES (?, ?)", values)
            db.execute(
                "UPDATE rounds SET state = 'committed', finished = ?, macs_ratio = ?, "
                "heads_kept_ratio = ?, mean_accuracy = ?, participants = (SELECT COUNT(*) FROM "
                "replies WHERE replies.run = rounds.run AND replies.round = rounds.round) "
                "WHERE run = ? AND round = ? AND kind = 'align'",
                (time.time(), macs_ratio, heads_kept_ratio, mean_accuracy, run, number),
            )
            db.execute(
                "INSERT INTO candidates (run, round, digest, parent, mask, spec_json, macs, "
                "params, path) VALUES (:run, :round, :digest, :parent, :mask, :spec_json, :macs, "
                ":params, :path)",
                {"run": run, "round": number, **vars(candidate)},
            )
            db.executemany(
                "INSERT INTO scores (run, round, farm, mask, heads, neurons, importance, mmd2) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (run, number, row.farm, row.mask, *(_blob(getattr(row, of)) for of in _VECTORS))
                    for row in scores
                ],
            )
            if verdict is not None:
                _insert_verdict(db, run, verdict)

    def record_verdict(self, run: int, verdict: VerdictRow) -> None:
        """A verdict that no commit goes with: the last cut was accepted at the end of the run."""
        with self._writing() as db:
            _insert_verdict(db, run, verdict)

    def verdicts(self, run: int) -> list[VerdictRow]:
        """Verdicts on the run's prune events, in order."""
        sql = "SELECT * FROM verdicts WHERE run = ? ORDER BY judged, event"
        return self._all(VerdictRow, sql, run)

    def keep_trials(self, run: int, event: int, rows: Sequence[TrialRow]) -> None:
        """What was tried before the cut after round ``event``; what was noted of it goes."""
        with self._writing(durable=False) as db:
            db.execute("DELETE FROM trials WHERE run = ? AND event = ?", (run, event))
            db.executemany(
                "INSERT INTO trials (run, place, event, rule, farms, accuracy, made) "
                "VALUES (:run, :place, :event, :rule, :farms, :accuracy, :made)",
                [{"run": run, "place": place, **vars(row)} for place, row in enumerate(rows)],
            )

    def trials(self, run: int) -> dict[int, list[TrialRow]]:
        """Cuts that were tried by the round that they would have ended, in order."""
        events: dict[int, list[TrialRow]] = {}
        sql = "SELECT * FROM trials WHERE run = ? ORDER BY event, place"
        for row in self._all(TrialRow, sql, run):
            events.setdefault(row.event, []).append(row)
        return events

    def last_committed(self, run: int) -> tuple[int, CandidateRow] | None:
        """Number and candidate of the last committed round of alignment."""
        found = self.candidates(run)
        return max(found.items(), key=lambda item: item[0]) if found else None

    def candidates(self, run: int) -> dict[int, CandidateRow]:
        """Candidates by round, in order."""
        found = self._select("SELECT * FROM candidates WHERE run = ? ORDER BY round", run)
        names = CandidateRow.__dataclass_fields__
        return {row["round"]: CandidateRow(**{name: row[name] for name in names}) for row in found}

    # --- scores and masks ------------------------------------------------------------------

    def scores(self, run: int) -> dict[int, list[ScoreRow]]:
        """Scores by score round, oldest first; in a round in the order of the commit."""
        rounds: dict[int, list[ScoreRow]] = {}
        for row in self._select("SELECT * FROM scores WHERE run = ? ORDER BY round, id", run):
            vectors = {of: _floats(row[of]) for of in _VECTORS if row[of] is not None}
            scores = ScoreRow(row["farm"], row["mask"], **vectors)
            rounds.setdefault(row["round"], []).append(scores)
        return rounds

    def mask(self, digest: str) -> str:
        """The mask of that digest as JSON; raises StateError when it is not known."""
        found = self._select("SELECT json FROM masks WHERE digest = ?", digest)
        if not found:
            raise StateError(f"'{self._path}' knows no mask {digest[:12]}")
        return str(found[0]["json"])

    def keep_mask(self, mask_json: str) -> None:
        """Have a mask known by its digest before a round ends with it, if one ever does."""
        with self._writing(durable=False) as db:
            values = (_mask_digest(mask_json), mask_json)
            db.execute("INSERT OR IGNORE INTO masks VALUES (?, ?)", values)

    def last_mask(self, run: RunRow) -> str:
        """The mask as JSON that a run has come to; before its first commit, that it began with."""
        last = self.last_committed(run.run)
        return run.mask_json if last is None else self.mask(last[1].mask)

    def masks(self, run: int) -> dict[str, str]:
        """The masks of a run as JSON by digest, oldest first."""
        digests = [self.run(run).mask] + [row.mask for row in self.candidates(run).values()]
        return {digest: self.mask(digest) for digest in dict.fromkeys(digests)}


@contextmanager
def opened_run(folder: Path, number: int | None = None) -> Iterator[tuple[Store, RunRow]]:
    """A server's store, open for reading, and one of its runs: by default the last.

    Raises:
        StateError: there is no run yet or none of that number, or the store cannot be read.
    """
    path = folder / "fieldfed.db"
    nothing = f"no run in '{folder}' yet; start one with: fieldfed-server train {folder}"
    if not path.is_file():
        raise StateError(nothing)
    with Store.open(path, read_only=True) as store:
        run = store.latest_run() if number is None else store.run(number)
        if run is None:
            raise StateError(nothing)
        yield store, run


def _mask_digest(mask_json: str) -> str:
    """What ``Mask.digest`` is: sha256 of its canonical JSON; status needs no torch for it."""
    return hashlib.sha256(mask_json.encode()).hexdigest()


def _insert_verdict(db: sqlite3.Connection, run: int, verdict: VerdictRow) -> None:
    db.execute(
        "INSERT INTO verdicts (run, event, judged, accepted, drop_ratio, farms, mask) "
        "VALUES (:run, :event, :judged, :accepted, :drop_ratio, :farms, :mask)",
        {"run": run, **vars(verdict)},
    )


def _blob(values: Floats | None) -> bytes | None:
    return None if values is None else values.astype("<f4").tobytes()


def _floats(blob: bytes) -> Floats:
    return np.frombuffer(blob, "<f4").astype(np.float32)
