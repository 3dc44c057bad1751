"""What farms send, on record: replies, rejections, traffic and reports.

None of it is fsynced by itself: a power cut before the end of a round costs some replies, and their
farms are asked again. The commit of the round makes all of it durable.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from common.errors import RejectReason, StateError
from common.messages import AlignReply, Done, EvaluateReply
from server.database import Database
from server.rows import (
    LinkRow,
    PauseRow,
    RejectionRow,
    ReplyRow,
    ReportRow,
    RoundKind,
    SpooledReply,
    TrafficRow,
)


class Records(Database):
    """The part of the store that fills up between the beginning and the end of a round."""

    def record_sent(
        self,
        run: int,
        number: int,
        node: int,
        attempt: int,
        size_bytes: int,
        kind: RoundKind = "align",
    ) -> None:
        """A request went out: messages and bytes down add up per farm and round."""
        self._change(
            "INSERT INTO traffic (run, round, kind, node, requests, attempt, bytes_down) "
            "VALUES (?, ?, ?, ?, 1, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + 1, "
            "attempt = excluded.attempt, bytes_down = bytes_down + excluded.bytes_down",
            *(run, number, kind, node, attempt, size_bytes),
            durable=False,
        )

    def record_reply(
        self,
        run: int,
        number: int,
        node: int,
        attempt: int,
        size_bytes: int,
        reply: AlignReply,
        spooled: SpooledReply,
    ) -> bool:
        """A valid reply that lies in the spool, to this round or late to an earlier one.

        Returns:
            False when the farm's reply to that round counts already, or another of its replies
            counts in this one: its bytes are counted, and the first one stands.

        Raises:
            StateError: the round is not open, or the farm is not known.
        """
        now = time.time()
        metrics = (reply.accuracy, reply.f1, reply.loss, reply.dal, reply.seconds)
        where = (str(spooled.path), spooled.start, spooled.length, spooled.digest)
        with self._writing(durable=False) as db:
            _count_up(db, run, number, "align", node, size_bytes, now)
            counted = self._select(
                "SELECT 1 FROM replies WHERE run = ?1 AND node = ?2 "
                "AND (round = ?4 OR of_round = ?5) UNION ALL "
                "SELECT 1 FROM replies WHERE run = ?1 AND farm = ?3 "
                "AND (round = ?4 OR of_round = ?5)",
                *(run, node, reply.farm, number, reply.round),
            )
            if counted:
                return False
            if self._round_state(run, number) != "open":
                raise StateError(f"round {number} of run {run} is not open; no reply can be taken")
            db.execute(
                "INSERT INTO replies (run, round, node, farm, attempt, examples, accuracy, f1, "
                "loss, dal, seconds, size_bytes, path, start, length, digest, received, of_round, "
                "steps, train_seconds) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(run, number, node, reply.farm, attempt, reply.examples),
                    *(*metrics, size_bytes, *where, now),
                    *(reply.round, reply.steps, reply.train_seconds),
                ),
            )
            _count_link(db, run, number, "align", reply)
        return True

    def replies(self, run: int, number: int) -> list[ReplyRow]:
        """The accepted replies of a round, by node."""
        return self._all(
            ReplyRow,
            "SELECT * FROM replies WHERE run = ? AND round = ? ORDER BY node",
            run,
            number,
        )

    def last_replies(self, run: int) -> list[ReplyRow]:
        """The newest reply of every farm, by node."""
        return self._all(
            ReplyRow,
            "SELECT *, max(round) FROM replies WHERE run = ? GROUP BY node ORDER BY node",
            run,
        )

    def folded(self, run: int) -> dict[str, int]:
        """The newest round, by farm, whose reply counts: not lost, and not undone with a cut."""
        rows = self._select(
            "SELECT farm, max(of_round) AS newest FROM replies WHERE run = ?1 AND round NOT IN "
            "(SELECT judged FROM verdicts WHERE run = ?1 AND NOT accepted) GROUP BY farm",
            run,
        )
        return {row["farm"]: row["newest"] for row in rows}

    def drop_reply(self, run: int, number: int, node: int) -> None:
        """Forget a reply of an open round whose spooled body is lost: its farm is asked again."""
        self._change(
            "DELETE FROM replies WHERE run = ? AND round = ? AND node = ? AND EXISTS (SELECT 1 "
            "FROM rounds WHERE rounds.run = replies.run AND rounds.round = replies.round "
            "AND rounds.kind = 'align' AND state = 'open')",
            *(run, number, node),
        )

    def spooled_paths(self, run: int) -> list[Path]:
        """Files with replies of rounds that are still open: what the spool must keep."""
        found = self._select(
            "SELECT DISTINCT path FROM replies JOIN rounds USING (run, round, kind) "
            "WHERE run = ? AND state = 'open' ORDER BY round",
            run,
        )
        return [Path(row["path"]) for row in found]

    def record_rejection(
        self, run: int, number: int, node: int | None, reason: RejectReason, detail: str
    ) -> None:
        """A reply was put into quarantine, or never came."""
        self._change(
            "INSERT INTO rejections (run, round, node, reason, detail, received) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            *(run, number, node, reason.value, detail, time.time()),
            durable=False,
        )

    def rejections(self, run: int) -> list[RejectionRow]:
        """Every rejection, in the order in which they happened."""
        found = self._select("SELECT * FROM rejections WHERE run = ? ORDER BY id", run)
        return [
            RejectionRow(
                row["round"],
                row["node"],
                RejectReason(row["reason"]),
                row["detail"],
                row["received"],
            )
            for row in found
        ]

    def strikes(self, node: int, farm: str, reasons: Iterable[RejectReason]) -> int:
        """Rejections for these reasons since the farm's last accepted reply or readmission.

        They add up over runs: a run that nobody answers well ends at its first round.
        """
        names = json.dumps(sorted(reason.value for reason in reasons))
        found = self._select(
            "SELECT COUNT(*) AS strikes FROM rejections WHERE node = ?1 "
            "AND reason IN (SELECT value FROM json_each(?3)) AND received > max("
            "coalesce((SELECT max(received) FROM replies WHERE node = ?1), 0), "
            "coalesce((SELECT readmitted FROM pauses WHERE farm = ?2), 0))",
            *(node, farm, names),
        )
        return int(found[0]["strikes"])

    def pause(self, farm: str, reason: str) -> None:
        """Do not ask this farm any more, in this run and later ones."""
        self._change(
            "INSERT INTO pauses (farm, reason, since) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
            "reason = excluded.reason, since = excluded.since, readmitted = NULL",
            *(farm, reason, time.time()),
        )

    def readmit(self, farm: str) -> None:
        """Ask a paused farm again.

        Raises:
            StateError: it is not paused.
        """
        changed = self._change(
            "UPDATE pauses SET readmitted = ? WHERE farm = ? AND readmitted IS NULL",
            *(time.time(), farm),
        )
        if not changed:
            paused = ", ".join(row.farm for row in self.pauses()) or "none"
            raise StateError(f"farm '{farm}' is not paused; paused farms: {paused}")

    def pauses(self) -> list[PauseRow]:
        """Farms that are not asked, by name."""
        return self._all(PauseRow, "SELECT * FROM pauses WHERE readmitted IS NULL ORDER BY farm")

    def rejection_counts(self, run: int) -> dict[RejectReason, int]:
        """Rejections by reason; reasons that never occurred count 0."""
        counts = Counter(row.reason for row in self.rejections(run))
        return {reason: counts[reason] for reason in RejectReason}

    def traffic(self, run: int) -> list[TrafficRow]:
        """Bytes per round, kind and farm, in that order."""
        return self._all(
            TrafficRow,
            "SELECT traffic.*, coalesce(farm, 'node ' || node) AS farm FROM traffic "
            "LEFT JOIN farms USING (run, node) WHERE run = ? ORDER BY round, kind, node",
            run,
        )

    def link_bytes(self, run: int) -> list[LinkRow]:
        """Bytes at the sockets of the farms that count them, by round, kind and farm."""
        return self._all(
            LinkRow,
            "SELECT * FROM link_bytes WHERE run = ? ORDER BY round, kind, farm",
            run,
        )

    def record_report(
        self, run: int, label: str, node: int, size_bytes: int, reply: EvaluateReply
    ) -> bool:
        """A farm reported on its test part.

        Returns:
            False for a second report of the same farm under the same label: the first stands.

        Raises:
            StateError: the farm is not known.
        """
        now = time.time()
        metrics = (reply.accuracy, reply.f1, reply.examples, size_bytes, reply.seconds)
        with self._writing(durable=False) as db:
            _count_up(db, run, reply.round, "evaluate", node, size_bytes, now)
            cursor = db.execute(
                "INSERT INTO reports (run, label, node, round, farm, base, accuracy, f1, "
                "examples, size_bytes, seconds, received) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (run, label, node, reply.round, reply.farm, reply.base, *metrics, now),
            )
            if cursor.rowcount == 1:
                _count_link(db, run, reply.round, "evaluate", reply)
            return cursor.rowcount == 1

    def reports(self, run: int, label: str | None = None) -> list[ReportRow]:
        """Reports by label and node; of one label when it is given."""
        return self._all(
            ReportRow,
            "SELECT * FROM reports WHERE run = ?1 AND (?2 IS NULL OR label = ?2) "
            "ORDER BY label, node",
            run,
            label,
        )

    def _round_state(self, run: int, number: int) -> str | None:
        """State of a round of alignment; None when it was never opened."""
        found = self._select(
            "SELECT state FROM rounds WHERE run = ? AND round = ? AND kind = 'align'", run, number
        )
        return str(found[0]["state"]) if found else None


def _count_up(
    db: sqlite3.Connection,
    run: int,
    number: int,
    kind: RoundKind,
    node: int,
    size_bytes: int,
    now: float,
) -> None:
    """Bytes that came up, and a sign of life."""
    db.execute(
        "INSERT INTO traffic (run, round, kind, node, bytes_up) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET bytes_up = bytes_up + excluded.bytes_up",
        (run, number, kind, node, size_bytes),
    )
    db.execute("UPDATE farms SET last_seen = ? WHERE run = ? AND node = ?", (now, run, node))


def _count_link(
    db: sqlite3.Connection, run: int, number: int, kind: RoundKind, reply: Done
) -> None:
    """What the farm's own counters grew by since its reply before, in whatever run.

    Counters that have gone backwards belong to a state folder that was wiped: they began at zero
    again, as those of a farm that is new here did.
    """
    if reply.link_sent is None or reply.link_received is None:
        return
    now = (reply.link_sent, reply.link_received)
    row = db.execute(
        "SELECT sent, received FROM link_counters WHERE farm = ?", (reply.farm,)
    ).fetchone()
    before = (0, 0) if row is None else (row["sent"], row["received"])
    if now[0] < before[0] or now[1] < before[1]:
        before = (0, 0)
    db.execute(
        "INSERT INTO link_counters (farm, sent, received) VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
        "SET sent = excluded.sent, received = excluded.received",
        (reply.farm, *now),
    )
    db.execute(
        "INSERT INTO link_bytes (run, round, kind, farm, sent, received) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET sent = sent + excluded.sent, "
        "received = received + excluded.received",
        (run, number, kind, reply.farm, now[0] - before[0], now[1] - before[1]),
    )
