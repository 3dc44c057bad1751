"""What the operator's page says of a run, read from the store and from the registry.

Each question is one query with a bound on how much it yields: a page stays small, and quick, with
a thousand farms and ten thousand rounds.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import RejectReason, StateError
from common.mask import Mask
from server import telemetry
from server.actions import ActionRow, Actions
from server.figures import MOST_FARMS, Figures, RegistryFigures, reading
from server.rows import FarmRow, Floats, LinkRow, RejectionRow, ReplyRow, RoundRow, RunRow
from server.story import RoundPoint
from server.telemetry import TelemetryStore
from server.versions import ChannelRow, InstallRow

MOST_ROUNDS = 60
"""The newest, that charts and tables show."""
MOST_REPLIES = 500
"""The newest of a farm, on its own page."""
MOST_RUNS = 12


@dataclass(frozen=True)
class RoundFacts:
    """A round: ``row`` as it was written down, and what came for it."""

    row: RoundRow
    replies: int
    rejected: Mapping[str, int]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class FarmFacts:
    """A farm, over all the nodes that it has been in a run.

    ``accuracy`` is by round on its decide part; ``tested`` its newest on its test part. ``base`` is
    the round whose candidate it trained on last; ``version`` what its devices last said they use.
    """

    farm: str
    examples: int
    classes: int
    last_seen: float
    rejected: int
    bytes_up: int
    bytes_down: int
    accuracy: Mapping[int, float]
    tested: float | None
    paused: str | None
    protocol: int | None
    version: int | None = None

    @property
    def latest(self) -> float | None:
        """The newest accuracy on the decide part."""
        return self.accuracy[max(self.accuracy)] if self.accuracy else None

    @property
    def base(self) -> int | None:
        """The newest round that it answered."""
        return max(self.accuracy) if self.accuracy else None


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Head scores of one farm, or of all together (``farm`` None), in a score round."""

    round: int
    farm: str | None
    mask: Mask
    heads: Floats


class Facts(Figures):
    """The store, as the page reads it."""

    def last_runs(self) -> list[RunRow]:
        """The newest runs, newest first."""
        sql = "SELECT run FROM runs ORDER BY run DESC LIMIT ?"
        return [self.run(row["run"]) for row in self._select(sql, MOST_RUNS)]

    # --- rounds ------------------------------------------------------------------------------

    def round_facts(
        self, run: int, before: int | None = None, most: int = MOST_ROUNDS
    ) -> list[RoundFacts]:
        """Rounds of alignment, oldest first: the newest ``most`` of those below ``before``."""
        rows = self._all(
            RoundRow,
            "SELECT * FROM rounds WHERE run = ?1 AND kind = 'align' "
            "AND (?2 IS NULL OR round < ?2) ORDER BY round DESC LIMIT ?3",
            *(run, before, most),
        )[::-1]
        if not rows:
            return []
        span = (run, rows[0].round, rows[-1].round)
        replies = self._sums("SELECT round, COUNT(*) AS count FROM replies", span)
        traffic = self._select(
            "SELECT round, sum(bytes_up) AS up, sum(bytes_down) AS down FROM traffic "
            "WHERE run = ? AND round BETWEEN ? AND ? AND kind = 'align' GROUP BY round",
            *span,
        )
        sizes = {row["round"]: (int(row["up"]), int(row["down"])) for row in traffic}
        rejected: dict[int, dict[str, int]] = {}
        for row in self._select(
            "SELECT round, reason, COUNT(*) AS count FROM rejections "
            "WHERE run = ? AND round BETWEEN ? AND ? GROUP BY round, reason ORDER BY reason",
            *span,
        ):
            rejected.setdefault(row["round"], {})[row["reason"]] = row["count"]
        return [
            RoundFacts(
                row,
                replies.get(row.round, 0),
                rejected.get(row.round, {}),
                *sizes.get(row.round, (0, 0)),
            )
            for row in rows
        ]

    def points(self, run: int) -> list[RoundPoint]:
        """The newest committed rounds as charts want them."""
        rows = [one.row for one in self.round_facts(run) if one.row.state == "committed"]
        if not rows:
            return []
        accuracy = self._accuracies(run, rows[0].round)
        points: list[RoundPoint] = []
        before, cuts = (1.0, 1.0), not self.teaches(run)
        for row in rows:
            now = (row.heads_kept_ratio or 1.0, row.macs_ratio or 1.0)
            known = bool(points) or row.round == 1  # what was before the first that is shown
            cut = cuts and known and (now[0] < before[0] or now[1] < before[1])
            event = f"pruned to {100 * now[0]:.0f} % of heads, {100 * now[1]:.0f} % of MACs"
            points.append(
                RoundPoint(
                    round=row.round,
                    macs_ratio=now[1],
                    heads_kept_ratio=now[0],
                    mean_accuracy=row.mean_accuracy,
                    accuracy=accuracy.get(row.round, {}),
                    seconds=max(0.0, (row.finished or row.started) - row.started),
                    event=event if cut else None,
                )
            )
            before = now
        return points

    def asked(self, run: int, number: int) -> list[str]:
        """Farms that were sent a request of a round of alignment, by name."""
        found = self._select(
            "SELECT DISTINCT farm FROM traffic JOIN farms USING (run, node) WHERE run = ? "
            "AND round = ? AND kind = 'align' AND requests > 0 ORDER BY farm LIMIT ?",
            *(run, number, MOST_FARMS),
        )
        return [row["farm"] for row in found]

    def answered(self, run: int, number: int) -> list[str]:
        """Farms whose replies count in a round, by name."""
        sql = "SELECT farm FROM replies WHERE run = ? AND round = ? ORDER BY farm LIMIT ?"
        return [row["farm"] for row in self._select(sql, run, number, MOST_FARMS)]

    def rejected_of(self, run: int, most: int) -> list[RejectionRow]:
        """The newest rejections, newest first."""
        sql = "SELECT * FROM rejections WHERE run = ? ORDER BY id DESC LIMIT ?"
        return self._rejections(sql, run, most)

    def names(self, run: int) -> dict[int, str]:
        """Farms by node."""
        sql = "SELECT node, farm FROM farms WHERE run = ?"
        return {row["node"]: row["farm"] for row in self._select(sql, run)}

    def _sums(self, sql: str, span: tuple[int, int, int]) -> dict[int, int]:
        where = "WHERE run = ? AND round BETWEEN ? AND ? GROUP BY round"
        return {row["round"]: row["count"] for row in self._select(f"{sql} {where}", *span)}

    def _accuracies(self, run: int, first: int) -> dict[int, dict[str, float]]:
        """By round and farm; late replies judge an older backbone and are left out."""
        found: dict[int, dict[str, float]] = {}
        for row in self._select(
            "SELECT round, farm, accuracy FROM replies WHERE run = ? AND round >= ? "
            "AND of_round = round ORDER BY round",
            *(run, first),
        ):
            found.setdefault(row["round"], {})[row["farm"]] = row["accuracy"]
        return found

    # --- farms -------------------------------------------------------------------------------

    def farm_facts(self, run: int) -> list[FarmFacts]:
        """The farms of a run, by name: the first ``MOST_FARMS``."""
        newest = self._all(
            FarmRow,
            "SELECT *, max(last_seen) AS last_seen, (SELECT COUNT(*) FROM rejections AS bad "
            "JOIN farms AS one ON one.run = bad.run AND one.node = bad.node "
            "WHERE bad.run = farms.run AND one.farm = farms.farm) AS rejected "
            "FROM farms WHERE run = ? GROUP BY farm ORDER BY farm LIMIT ?",
            *(run, MOST_FARMS),
        )
        sizes = {
            row["farm"]: (int(row["up"]), int(row["down"]))
            for row in self._select(
                "SELECT farm, sum(bytes_up) AS up, sum(bytes_down) AS down FROM traffic "
                "JOIN farms USING (run, node) WHERE run = ? GROUP BY farm",
                run,
            )
        }
        tested = {one.farm: one.accuracy for one in self.quality(run) if one.part == "test"}
        paused = {one.farm: one.reason for one in self.pauses()}
        history = self._histories(run)
        return [
            FarmFacts(
                farm=row.farm,
                examples=row.examples,
                classes=row.classes,
                last_seen=row.last_seen,
                rejected=row.rejected,
                bytes_up=sizes.get(row.farm, (0, 0))[0],
                bytes_down=sizes.get(row.farm, (0, 0))[1],
                accuracy=history.get(row.farm, {}),
                tested=tested.get(row.farm),
                paused=paused.get(row.farm),
                protocol=row.protocol,
            )
            for row in newest
        ]

    def replies_of(self, run: int, farm: str) -> list[ReplyRow]:
        """The newest replies of a farm, newest first."""
        return self._all(
            ReplyRow,
            "SELECT * FROM replies WHERE run = ? AND farm = ? ORDER BY round DESC LIMIT ?",
            *(run, farm, MOST_REPLIES),
        )

    def rejections_of(self, run: int, farm: str) -> list[RejectionRow]:
        """The newest rejections of a farm, newest first."""
        return self._rejections(
            "SELECT rejections.* FROM rejections JOIN farms USING (run, node) "
            "WHERE run = ? AND farm = ? ORDER BY id DESC LIMIT ?",
            *(run, farm, MOST_ROUNDS),
        )

    def _rejections(self, sql: str, *values: object) -> list[RejectionRow]:
        found = self._all(RejectionRow, sql, *values)
        return [replace(one, reason=RejectReason(one.reason)) for one in found]

    def link_of(self, run: int, farm: str) -> list[LinkRow]:
        """Bytes at a farm's socket, where it counts them."""
        sql = "SELECT * FROM link_bytes WHERE run = ? AND farm = ? ORDER BY round DESC LIMIT ?"
        return self._all(LinkRow, sql, run, farm, MOST_REPLIES)

    def _histories(self, run: int) -> dict[str, dict[int, float]]:
        newest = self._select("SELECT max(round) AS at FROM replies WHERE run = ?", run)[0]["at"]
        found: dict[str, dict[int, float]] = {}
        for number, farms in self._accuracies(run, (newest or 0) - MOST_ROUNDS + 1).items():
            for farm, value in farms.items():
                found.setdefault(farm, {})[number] = value
        return found

    # --- heads -------------------------------------------------------------------------------

    def head_scores(self, run: int) -> list[HeadScores]:
        """What was said of heads in every score round, oldest first; neurons are left out."""
        masks: dict[str, Mask] = {}
        found = []
        for row in self._select(
            "SELECT round, farm, mask, heads FROM scores WHERE run = ? ORDER BY round, id", run
        ):
            if row["mask"] not in masks:
                masks[row["mask"]] = Mask.from_json(self.mask(row["mask"]))
            heads = np.frombuffer(row["heads"], "<f4")
            found.append(HeadScores(row["round"], row["farm"], masks[row["mask"]], heads))
        return found


class RegistryFacts(RegistryFigures):
    """The registry, as the page reads it."""

    def newest_installs(self) -> list[InstallRow]:
        """The newest report of every device, by farm and device."""
        return self._all(
            InstallRow,
            "SELECT *, max(id) FROM installs GROUP BY farm, device ORDER BY farm, device LIMIT ?",
            MOST_FARMS,
        )

    def last_installs(self, most: int) -> list[InstallRow]:
        """The newest reports, newest first."""
        return self._all(InstallRow, "SELECT * FROM installs ORDER BY id DESC LIMIT ?", most)

    def last_named(self, most: int) -> list[ChannelRow]:
        """What channels came to name, newest first."""
        sql = "SELECT * FROM channels ORDER BY issued DESC LIMIT ?"
        return self._all(ChannelRow, sql, most)

    def outcomes_by_version(self) -> Mapping[int, Mapping[str, int]]:
        """How many devices said what of each version, by the newest report of each."""
        counts: dict[int, Counter[str]] = {}
        for row in self._select(
            "SELECT version, outcome, COUNT(*) AS count FROM (SELECT version, outcome, max(id) "
            "FROM installs GROUP BY version, farm, device) GROUP BY version, outcome"
        ):
            counts.setdefault(row["version"], Counter())[row["outcome"]] = row["count"]
        return counts

    def in_use(self) -> Mapping[str, int]:
        """The version that a farm's devices took last, by farm."""
        found = self._select(
            "SELECT farm, version, max(id) FROM installs WHERE outcome = 'committed' GROUP BY farm"
        )
        return {row["farm"]: row["version"] for row in found}


def planned_rounds(run: RunRow) -> int:
    """How many rounds a run has planned."""
    return int(json.loads(run.config_json)["config"]["plan"]["rounds"])


def worst(farms: Sequence[FarmFacts]) -> FarmFacts | None:
    """The farm with the lowest newest accuracy."""
    known = [one for one in farms if one.latest is not None]
    return min(known, key=lambda one: one.latest or 0.0) if known else None


# --- all that a page reads -----------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What one page reads, each as it is at one instant; None where there is none.

    ``registry`` holds the versions, ``told`` is what devices told over MQTT.
    ``faults`` says in words what cannot be read beside the store.
    """

    state_dir: Path
    facts: Facts
    registry: RegistryFacts | None
    told: TelemetryStore | None
    actions: tuple[ActionRow, ...]
    faults: tuple[str, ...]


@contextmanager
def sources(state_dir: Path, most_actions: int) -> Iterator[Sources]:
    """All that is on a server's disk, open for reading.

    Raises:
        StateError: there is no store, or it cannot be read.
    """
    faults = []
    with ExitStack() as opened:
        facts = opened.enter_context(reading(Facts, state_dir / "fieldfed.db"))
        registry, told, actions = None, None, []
        try:
            if registry_path(state_dir).is_file():
                kind = reading(RegistryFacts, registry_path(state_dir))
                registry = opened.enter_context(kind)
                registry.newest_version()  # a damaged file says so now
        except StateError as error:
            registry = None
            faults.append(f"The registry cannot be read: {error}")
        try:
            if (state_dir / telemetry.NAME).is_file():
                told = opened.enter_context(reading(TelemetryStore, state_dir / telemetry.NAME))
                told.presence()
        except StateError as error:
            told = None
            faults.append(f"What devices told cannot be read: {error}")
        try:
            actions = newest_actions(state_dir, most_actions)
        except StateError as error:
            faults.append(f"The record of actions cannot be read: {error}")
        yield Sources(state_dir, facts, registry, told, tuple(actions), tuple(faults))


def registry_path(state_dir: Path) -> Path:
    """Where the tables of the registry lie."""
    return state_dir / "registry" / "registry.db"


def newest_actions(state_dir: Path, most: int) -> list[ActionRow]:
    """What was done from the page, newest first; raises StateError where that cannot be read."""
    if not Actions.path(state_dir).is_file():
        return []
    with reading(Actions, Actions.path(state_dir)) as actions:
        return actions.newest(most)
