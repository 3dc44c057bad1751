"""The centre of a network in regions: the ordinary round loop, whose farms are regions.

To the loop a region is one big farm. Two things are different: what a region sends in a score round
are sums over its farms (server/region_close.py), and what it is asked carries the terms of the run.
A region is one voice where means over farms are shown and where the accuracy guard decides.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from common import scores as unit_scores
from common.config import ServerConfig
from common.errors import ConfigError, ProtocolError
from common.files import only_one
from common.messages import AlignRequest, EvaluateRequest, Reply
from common.scores import UnitScores
from common.spec import ModelSpec
from server.begin import start_or_resume
from server.close import RoundCloser, Work
from server.collect import Accept, Verdict
from server.consensus import Part, pooled
from server.intake import Intake
from server.link import Clock, FarmLink
from server.models import Models
from server.region_record import Order, RegionReply, Terms, check_sums
from server.rounds import RoundLoop, WallClock
from server.rows import ReplyRow, RunRow, ScoreRow
from server.settings import RunSettings
from server.spool import ReplyReader
from server.store import Store
from server.verify import Asked, Expected

log = logging.getLogger(__name__)

Describe = Callable[[AlignRequest | EvaluateRequest], Order]


def require_centre(config: ServerConfig) -> None:
    """What a centre's settings cannot say.

    Raises:
        ConfigError: names the setting, and where it belongs instead.
    """
    plan = config.plan
    faults = {
        "[region]: a server is a region or a centre, not both": config.region is not None,
        "[privacy]: noise is added on farms; set it in server.toml of every region": (
            config.privacy is not None
        ),
        "rounds.step_budget: farms are paced by their region; set it there": (
            config.rounds.step_budget
        ),
        "plan.moments = 'farms': regions send sums of scores, not of moments": (
            plan.moments == "farms"
        ),
        "plan.warmup below 2 with criterion taha: round 1 only finds the scale that regions need "
        "for scores": plan.prunes and plan.invariance_exponent > 0 and plan.warmup < 2,
    }
    for text in [text for text, wrong in faults.items() if wrong]:
        raise ConfigError(f"a centre cannot have {text}")
    names = [region.name for region in config.regions]
    if len(set(names)) < len(names):
        raise ConfigError(f"[[regions]]: two of the same name among {', '.join(names)}")


class CentreCloser(RoundCloser):
    """Turns the records of a round into the next training base."""

    def _consensus(
        self,
        run: int,
        work: Work,
        replies: Sequence[ReplyRow],
        readers: Sequence[ReplyReader],
        spec: ModelSpec,
    ) -> tuple[UnitScores | None, list[ScoreRow]]:
        """What the farms of all regions agree on: parts add up in the order of their names."""
        pairs = zip(replies, readers, strict=True)
        scored = sorted(
            ((row.farm, reader) for row, reader in pairs if row.of_round == row.round),
            key=lambda one: one[0],
        )
        if not (work.scored and scored):
            return None, []
        self._freeze(run, [reader for _, reader in scored])
        parts = {region: _part(reader, spec) for region, reader in scored}
        plan, mask = self._config.plan, work.base.mask.digest
        kappa = plan.kappa if self._counts_maximum else 0.0
        agreed = pooled(list(parts.values()), kappa, plan.consensus)
        together = agreed.flat_heads()
        return agreed, [
            ScoreRow(farm=None, mask=mask, heads=together, importance=together),
            *(
                ScoreRow(region, mask, part.mean.flat_heads(), mmd2=reader.array("shift"))
                for (region, reader), part in zip(scored, parts.values(), strict=True)
            ),
        ]

    def _freeze(self, run: int, readers: Sequence[ReplyReader]) -> None:
        """tau, the median over heads of the mean over all farms, once in a run."""
        if self._store.tau(run) is None:
            farms = [float(reader.array("totals")[1]) for reader in readers]
            shifts = np.stack([reader.array("shift") for reader in readers])
            mean = np.average(shifts.astype(np.float64), axis=0, weights=farms)
            self._store.freeze_tau(run, unit_scores.median_tau(mean))


def _part(reader: ReplyReader, spec: ModelSpec) -> Part:
    mean, most = (
        UnitScores.from_flat(reader.array(f"head_{what}"), reader.array(f"neuron_{what}"), spec)
        for what in ("mean", "most")
    )
    return Part(float(reader.array("totals")[0]), mean, most)


class CentreIntake(Intake):
    """Judges what regions send."""

    def aligned(self, work: Work) -> Accept:
        """Judges records of the round; scores are sums and checked as such."""
        asked = Asked(self._run, work.number, work.base.digest, work.base.mask.digest)
        expected = self._expected(work.base, scored=False)
        return partial(self._take_record, work.scored, asked, expected)

    def _take_record(
        self,
        scored: bool,
        asked: Asked,
        expected: Expected,
        node: int,
        attempt: int,
        reply: Reply,
        size: int,
    ) -> Verdict:
        if scored and isinstance(reply, RegionReply):
            try:
                assert isinstance(expected.spec, ModelSpec)  # a centre teaches no student
                check_sums(reply, expected.spec)
            except ProtocolError as error:
                self.quarantine(asked.round, node, error.reason, str(error))
                return Verdict.REJECTED
        return self._take_aligned(asked, expected, node, attempt, reply, size)


class CentreLoop(RoundLoop):
    """One run of a network in regions."""

    intake: ClassVar[type[Intake]] = CentreIntake
    closer: ClassVar[type[RoundCloser]] = CentreCloser


class Orders:
    """Makes orders of the requests of a run."""

    def __init__(self, run: int, config: ServerConfig, store: Store) -> None:
        self._config, self._store, row = config, store, store.run(run)
        self.run_id = run_id_of(row)

    def describe(self, request: AlignRequest | EvaluateRequest) -> Order:
        """The request with the terms of the run as they are now."""
        row = self._store.run(request.run)
        terms = Terms(
            centre=self._config.server.name,
            run_id=self.run_id,
            rounds=self._config.plan.rounds,
            criterion=self._config.plan.criterion,
            exponent=self._config.plan.invariance_exponent,
            tau=row.tau,
            mask=self._store.mask(request.mask),
        )
        return Order(terms, request)


def run_id_of(row: RunRow) -> str:
    """Another for every run that ever begins, and the same whenever it goes on."""
    text = f"{row.run} {row.started!r} {row.base} {row.config_json}"
    return hashlib.sha256(text.encode()).hexdigest()


def run_centre(
    reach: Callable[[Orders], FarmLink],
    state_dir: Path,
    settings: RunSettings,
    clock: Clock | None = None,
) -> int:
    """Run, or continue, a plan with regions; returns the run's number.

    Args:
        reach: makes the link to the regions.
        state_dir: of the centre.
        settings: of the run.
        clock: of deadlines; real time by default.

    Raises:
        ConfigError: the settings are not those of a centre.
        FieldfedError: the run cannot go on; it is marked failed with the reason.
    """
    require_centre(settings.config)
    if settings.taught is not None:
        raise ConfigError("a centre cannot have its regions teach a student yet")
    with only_one(state_dir / "run.lock"), Store.open(state_dir / "fieldfed.db") as store:
        models = Models(state_dir)
        models.sweep()
        run = start_or_resume(settings, store, models, state_dir)
        link = reach(Orders(run, settings.config, store))
        CentreLoop(run, settings, link, clock or WallClock(), store, models, state_dir).go()
    return run
