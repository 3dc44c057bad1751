"""What operators do to channels, and the record of what was done from the page.

promote, roll_back    the same for the command line and for the page
Actions               actions.db: who did what, when, and what came of it; written down before
                      it is done, so that a crash in between leaves a trace
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.errors import FieldfedError
from server.database import Database
from server.migrations import Migration
from server.registry import Registry
from server.versions import ChannelRow

_FIRST: Migration = (
    """CREATE TABLE actions (
        id INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        who TEXT NOT NULL,
        what TEXT NOT NULL,
        outcome TEXT NOT NULL DEFAULT ''
    ) STRICT""",
)


def promote(registry: Registry, channel: str, version: int) -> ChannelRow:
    """Let a channel name a version.

    Raises:
        ConfigError: there is no such version, or another one is on its way to the channel.
    """
    registry.require_settled(channel)
    return registry.promote(channel, version)


def roll_back(registry: Registry, channel: str, to: int | None = None) -> ChannelRow:
    """Let a channel name an earlier version again, by default the one before.

    Raises:
        ConfigError: there is no such channel or version, nothing to go back to, or a version is on
            its way to the channel.
    """
    registry.require_settled(channel)
    return registry.roll_back(channel, to)


@dataclass(frozen=True)
class ActionRow:
    """What somebody did; ``outcome`` is empty while it is not known."""

    id: int
    at: float
    who: str
    what: str
    outcome: str


class Actions(Database):
    """The record of what was done."""

    migrations: ClassVar = (_FIRST,)

    @classmethod
    def path(cls, state_dir: Path) -> Path:
        """Where it lies."""
        return state_dir / "actions.db"

    def do(self, who: str, what: str, act: Callable[[], str]) -> str:
        """Write down what is about to be done, do it, and write down what came of it.

        Args:
            who: does it.
            what: in words.
            act: does it; returns in words what came of it.

        Raises:
            FieldfedError: it was refused, which is on record as well.
        """
        with self._writing() as db:
            cursor = db.execute(
                "INSERT INTO actions (at, who, what) VALUES (?, ?, ?)", (time.time(), who, what)
            )
        try:
            outcome = act()
        except FieldfedError as error:
            self._end(cursor.lastrowid, f"refused: {error}")
            raise
        self._end(cursor.lastrowid, outcome)
        return outcome

    def newest(self, most: int) -> list[ActionRow]:
        """The newest actions, newest first."""
        return self._all(ActionRow, "SELECT * FROM actions ORDER BY id DESC LIMIT ?", most)

    def _end(self, row: int | None, outcome: str) -> None:
        self._change("UPDATE actions SET outcome = ? WHERE id = ?", outcome, row)
