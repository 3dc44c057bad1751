"""What the server tells devices over MQTT: that a round is open, and what channels name.

Both are read from what is on disk, so that neither a run nor the hub knows of a broker. A round is
told once, and again when it is opened again, or when the bridge has been started anew: a run that
goes on after a power cut waits for farms that may be asleep. That a run has begun and looks for
farms is told as its round 0. Channels are told to whoever comes, and to all when they change.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.config import RoundConfig
from common.errors import FieldfedError
from common.manifest import Manifest
from common.mqtt import Connection
from common.outbox import Outbox, text_of
from common.topics import ModelNotice, RoundNotice, models, rounds
from server.database import Database
from server.figures import reading
from server.versions import Versions

log = logging.getLogger(__name__)

WAKE_SECONDS = 600.0
"""A round whose deadline is over is about to be opened again, and told to last so long at least."""


class Opening(NamedTuple):
    """A round that is open, and how often it was opened."""

    run: int
    round: int
    attempt: int
    deadline: float


class OpenRounds(Database):
    """The store, looked at for a round that is open."""

    def newest(self) -> Opening | None:
        """The open round of the run that goes on; None where there is none."""
        runs = self._select("SELECT * FROM runs ORDER BY run DESC LIMIT 1")
        if not runs or runs[0]["state"] != "running":
            return None
        run = runs[0]
        found = self._select(
            "SELECT * FROM rounds WHERE run = ? AND kind = 'align' ORDER BY round DESC LIMIT 1",
            run["run"],
        )
        if not found:
            return Opening(run["run"], 0, 1, run["started"] + _patience(run["config_json"]))
        row = found[0]
        if row["state"] != "open":
            return None
        return Opening(run["run"], row["round"], row["attempt"], row["deadline"])


def _patience(settings: str) -> float:
    """Seconds that a run waits for farms before its first round."""
    try:
        return float(json.loads(settings)["config"]["rounds"]["deadline_seconds"])
    except (ValueError, TypeError, KeyError):
        return RoundConfig().deadline_seconds


class Notices:
    """Tells what is new whenever it is asked to look.

    Args:
        connection: to the broker.
        outbox: of that connection.
        state_dir: of the server.
        network: its name.
    """

    def __init__(
        self, connection: Connection, outbox: Outbox, state_dir: Path, network: str
    ) -> None:
        self._connection, self._outbox = connection, outbox
        self._store, self._network = state_dir / "fieldfed.db", network
        self._registry = state_dir / "registry" / "registry.db"
        self._opening: tuple[int, int, int] | None = None
        self._channels: dict[str, object] = {}
        self._accuracies: dict[int, float | None] = {}
        self._faults: dict[Path, str] = {}

    def look(self, now: float | None = None) -> None:
        """Tell what is new; a store or a registry that is not there yet, or damaged, tells nothing.

        Args:
            now: unix seconds.
        """
        self._tried(self._store, lambda: self._rounds(time.time() if now is None else now))
        self._tried(self._registry, self._models)

    def _tried(self, path: Path, look: Callable[[], None]) -> None:
        if not path.is_file():
            return
        try:
            look()
        except FieldfedError as error:
            if self._faults.get(path) != str(error):
                log.warning("devices are told nothing new: %s", error)
            self._faults[path] = str(error)
        else:
            self._faults.pop(path, None)

    def _rounds(self, now: float) -> None:
        with reading(OpenRounds, self._store) as store:
            found = store.newest()
        # one that nobody can hear of now is told once there is a line, if it is still open
        if found is None or found[:3] == self._opening or not self._connection.connected:
            return
        deadline = max(found.deadline, now + WAKE_SECONDS)
        notice = RoundNotice(run=found.run, round=found.round, deadline=deadline)
        self._outbox.put("event", rounds(self._network), notice.body())
        self._opening = found[:3]
        log.info("devices are told of round %d of run %d", found.round, found.run)

    def _models(self) -> None:
        with reading(Versions, self._registry) as versions:
            going = {row.channel: row for row in versions.rollouts() if row.going}
            for row in versions.channels():
                coming = going.get(row.name)
                # a stage lets more farms see the same document: they are told as well
                state = row.counter, coming and (coming.counter, coming.stage, coming.state)
                if self._channels.get(row.name) == state:
                    continue
                notice = ModelNotice(
                    channel=row.name,
                    counter=max(row.counter, coming.counter if coming else 0),
                    version=row.version,
                    accuracy=self._accuracy(versions, row.version),
                )
                payload = text_of(notice.body()).encode()
                self._connection.retain(models(self._network, row.name), payload)
                self._channels[row.name] = state

    def _accuracy(self, versions: Versions, version: int) -> float | None:
        """Of a version, over all images that farms judged it by; None where nobody has."""
        if version not in self._accuracies:
            row = versions.version(version)
            self._accuracies[version] = None if row is None else accuracy_of(row.document)
        return self._accuracies[version]


def accuracy_of(document: str) -> float | None:
    """What farms found on a version together, by its signed manifest, which is our own.

    Returns:
        A ratio; None where no farm has evaluated it, or another release wrote the manifest.
    """
    try:
        manifest = Manifest.model_validate_json(json.loads(document)["body"])
    except (ValueError, TypeError, KeyError):
        return None
    examples = sum(one.examples for one in manifest.farms.values())
    right = sum(one.accuracy * one.examples for one in manifest.farms.values())
    return min(1.0, right / examples) if examples else None
