"""A region's desk: where the centre leaves its order, and finds the sealed answer.

    region.db    the order of the moment, and answers by what they answer

Two programs meet here: the one that the centre talks to (server/region.py), and the one that plays
orders with the region's farms (server/region_play.py). An answer that is here is the answer: asked
again, after whatever crash on either side, the centre gets the same bytes. It stays until the
centre says that it counts, or until a later run begins.
"""

import time
from pathlib import Path
from typing import ClassVar

from common.messages import AlignRequest
from server.database import Database
from server.migrations import Migration
from server.region_record import HELLO, Order

NAME = "region.db"
KEPT = 16
"""Newest answers of a run that stay at most: a centre that was away for longer has gone on."""


class Desk(Database):
    """The desk of one region; open it by :meth:`at`."""

    migrations: ClassVar[tuple[Migration, ...]] = (
        (
            """CREATE TABLE orders (
                slot INTEGER PRIMARY KEY CHECK (slot = 1),
                key TEXT NOT NULL,
                attempt INTEGER NOT NULL,
                data BLOB NOT NULL
            ) STRICT""",
            """CREATE TABLE answers (
                key TEXT PRIMARY KEY,
                run_id TEXT NOT NULL,
                round INTEGER NOT NULL,
                attempt INTEGER NOT NULL,
                refusal INTEGER NOT NULL CHECK (refusal IN (0, 1)),
                data BLOB NOT NULL,
                made REAL NOT NULL
            ) STRICT, WITHOUT ROWID""",
        ),
    )

    @classmethod
    def at(cls, state_dir: Path) -> "Desk":
        """The desk of a server; raises StateError."""
        return cls.open(state_dir / NAME)

    # --- the centre's side -----------------------------------------------------------------

    def give(self, data: bytes) -> None:
        """Leave an order in the place of the one before; one that is answered is not done again.

        Raises:
            ProtocolError: it is no order.
        """
        order = Order.from_bytes(data)
        if self.take(order.key, order.request.attempt) is None:
            self._change(
                "INSERT INTO orders VALUES (1, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "key = excluded.key, attempt = excluded.attempt, data = excluded.data",
                *(order.key, order.request.attempt, data),
            )

    def take(self, key: str, attempt: int) -> bytes | None:
        """The sealed answer, if there is one; a refusal answers no later attempt."""
        found = self._select(
            "SELECT data FROM answers WHERE key = ? AND (NOT refusal OR attempt >= ?)", key, attempt
        )
        return bytes(found[0]["data"]) if found else None

    # --- the region's side -----------------------------------------------------------------

    def current(self) -> Order | None:
        """The order that is to be played; None when it is answered, or there is none yet."""
        found = self._select(
            "SELECT data FROM orders WHERE NOT EXISTS (SELECT 1 FROM answers WHERE answers.key = "
            "orders.key AND (NOT refusal OR answers.attempt >= orders.attempt))"
        )
        return Order.from_bytes(bytes(found[0]["data"])) if found else None

    def introduce(self, data: bytes) -> None:
        """What the centre hears when it asks who the region is."""
        self._answer(HELLO, "", 0, 1, False, data)

    def answer(self, order: Order, data: bytes, refusal: bool) -> None:
        """Put the answer to an order there for good; what the centre needs no more goes."""
        request, run_id = order.request, order.terms.run_id
        self._answer(order.key, run_id, request.round, request.attempt, refusal, data)
        folded = request.folded if isinstance(request, AlignRequest) else None
        self._change(
            "DELETE FROM answers WHERE key NOT IN (?1, ?2) AND (run_id != ?3 "
            "OR (?4 IS NOT NULL AND round <= ?4 AND key LIKE 'align-%') OR key NOT IN "
            "(SELECT key FROM answers WHERE run_id = ?3 ORDER BY made DESC LIMIT ?5))",
            *(HELLO, order.key, run_id, folded, KEPT),
        )

    def _answer(
        self, key: str, run_id: str, number: int, attempt: int, refusal: bool, data: bytes
    ) -> None:
        self._change(
            "INSERT OR REPLACE INTO answers (key, run_id, round, attempt, refusal, data, made) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(key, run_id, number, attempt, int(refusal), data, time.time()),
        )
