"""The round loop: introduce, report, align round by round, prune when the plan says so.

Everything that matters is in the store before the next step begins, so a run continues at its
last committed round. The loop speaks to farms through FarmLink alone and takes time from a Clock.
"""

import logging
import time
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from common import backbone, codec
from common.config import ServerConfig
from common.errors import FieldfedError, ProtocolError, RejectReason, StateError
from common.logs import bound
from common.mask import Mask
from common.messages import (
    AlignReply,
    EvaluateReply,
    HelloReply,
    HelloRequest,
    Label,
    Refusal,
    Reply,
)
from server.close import Base, RoundCloser, SourceBatches
from server.collect import Exchange, Verdict, collect, quorum_of
from server.link import Clock, FarmLink
from server.models import Models
from server.plan import Plan
from server.pretrain import source_batches
from server.requests import Requests
from server.rows import RoundKind
from server.spool import Spool
from server.store import Store
from server.verify import Asked, Expected, check_align, check_evaluate

log = logging.getLogger(__name__)


class RunSettings(BaseModel):
    """What one run does; written by the command that starts it, read by the server process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: ServerConfig
    label: Label = "model"
    probe: bool = Field(default=True, description="report the base before the first round")
    local_rounds: int = Field(default=0, ge=0, description="report the local-only baseline")

    @field_validator("label")
    @classmethod
    def _not_a_baseline(cls, label: str) -> str:
        if label in ("probe", "local"):
            raise ValueError(f"'{label}' names a baseline; choose another label")
        return label


class WallClock:
    """Real time."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def run_rounds(
    link: FarmLink, state_dir: Path, run_settings: Path, clock: Clock | None = None
) -> int:
    """Run, or continue, what the settings file says; returns the run's number.

    Raises:
        FieldfedError: the run cannot go on; it is marked failed with the reason.
    """
    settings = RunSettings.model_validate_json(run_settings.read_text())
    store = Store.open(state_dir / "fieldfed.db")
    try:
        run = start_or_resume(settings, store, Models(state_dir), state_dir)
        RoundLoop(run, settings, link, clock or WallClock(), store, state_dir).go()
    finally:
        store.close()
    return run


def start_or_resume(settings: RunSettings, store: Store, models: Models, state_dir: Path) -> int:
    """The run to work on: the last one when it is unfinished and the same, else a new one."""
    text = settings.model_dump_json()
    last = store.latest_run()
    if last is not None and last.state == "running" and last.config_json == text:
        log.info("run %d continues", last.run)
        return last.run
    model, spec = backbone.load_backbone(state_dir / "base.safetensors")
    base, mask = models.save(model, spec), Mask.dense(spec)
    models.import_anchors(mask.digest, state_dir / "anchors.safetensors")
    run = store.start_run(text, settings.config.seed, base, mask.to_json(), settings.label)
    log.info("run %d starts from backbone %s", run, base[:12])
    return run


class RoundLoop:
    """One run."""

    def __init__(
        self,
        run: int,
        settings: RunSettings,
        link: FarmLink,
        clock: Clock,
        store: Store,
        state_dir: Path,
    ) -> None:
        self.run, self._settings, self._config = run, settings, settings.config
        self._link, self._clock, self._store = link, clock, store
        self._models, self._spool = Models(state_dir), Spool(state_dir / "spool")
        self._spool.sweep(store.spooled_paths(run))
        self._farms: dict[int, str] = {}
        row = store.run(run)
        first = Mask.from_json(row.mask_json)
        self._start = Base(row.base, first)
        self._dense = backbone.read_spec(self._models.path(row.base))
        self._plan = Plan(self._config.plan, self._dense)
        self._requests = Requests(run, self._config, self._models)
        self._closer = RoundCloser(
            self._config, self._dense, self._models, self._spool, store, self._source()
        )

    def go(self) -> None:
        """Everything from the first hello to the last report.

        Raises:
            FieldfedError: no farm answered; the run is marked failed and says so.
        """
        try:
            with bound(run=self.run):
                self._play()
        except FieldfedError as error:
            self._store.finish_run(self.run, "failed", str(error))
            raise
        self._store.finish_run(self.run, "done")
        log.info("run %d is done", self.run)

    def _play(self) -> None:
        self._wait_for_farms()
        self._first_reports()
        base, done = self._committed()
        for number in range(done + 1, self._plan.rounds + 1):
            with bound(round=number):
                base = self._round(number, base)
        self._report(self._settings.label, self._plan.rounds, base)

    def _committed(self) -> tuple[Base, int]:
        last = self._store.last_committed(self.run)
        if last is None:
            return self._start, 0
        number, candidate = last
        return Base(candidate.digest, Mask.from_json(self._store.mask(candidate.mask))), number

    def _source(self) -> SourceBatches | None:
        folder = self._config.backbone.source
        if folder is None:
            return None
        count, seed = self._config.backbone.anchor_images, self._config.seed
        return partial(source_batches, folder, count=count, seed=seed)

    # --- farms -----------------------------------------------------------------------------

    def _wait_for_farms(self) -> None:
        """Wait until enough farms are online, then ask each who it is."""
        rules = self._config.rounds
        limit = self._clock.now() + rules.deadline_seconds
        told = False
        while len(self._link.online()) < rules.min_farms:
            if self._clock.now() > limit:
                raise StateError(
                    f"only {len(self._link.online())} of {rules.min_farms} farms came online "
                    f"within {rules.deadline_seconds:.0f} s; start the farms or lower "
                    "rounds.min_farms"
                )
            if not told:
                log.info("waiting for %d farms", rules.min_farms)
                told = True
            self._clock.sleep(1.0)
        self._meet()
        if not self._farms:
            raise StateError("no farm answered; 'fieldfed-server status' shows why")

    def _meet(self) -> None:
        """Ask farms that we do not know yet who they are and what they hold."""
        strangers = [node for node in self._link.online() if node not in self._farms]
        if strangers:
            exchange = Exchange(
                nodes=strangers,
                request=lambda _node, _attempt: HelloRequest(),
                accept=self._welcome,
                sent=lambda _node, _attempt, _size: None,
                fault=partial(self._quarantine, 0),
            )
            # a hello trains nothing: nobody needs to wait for a turn
            rules = self._config.rounds.model_copy(update={"max_in_flight": len(strangers)})
            collect(self._link, self._clock, rules, exchange)

    def _welcome(self, node: int, _attempt: int, reply: Reply, _size: int) -> Verdict:
        if not isinstance(reply, HelloReply):
            return self._unexpected(0, node, reply)
        self._farms[node] = reply.farm
        self._requests.farm_holds(node, reply.held)
        self._store.upsert_farm(self.run, node, reply.farm, reply.examples, reply.classes)
        log.info("farm %s: %d images, %d classes", reply.farm, reply.examples, reply.classes)
        return Verdict.ACCEPTED

    # --- a round ---------------------------------------------------------------------------

    def _round(self, number: int, base: Base) -> Base:
        self._meet()
        scored, budget = self._plan.scores_in(number), self._plan.event_after(number)
        asked = Asked(self.run, number, base.digest, base.mask.digest)
        rules = self._config.rounds
        self._store.open_round(
            self.run,
            number,
            kind="align",
            base=base.digest,
            mask=base.mask.digest,
            quorum=quorum_of(len(self._farms), rules),
            deadline=time.time() + rules.deadline_seconds,
        )
        answered = self._answered(number)
        exchange = Exchange(
            nodes=[node for node in self._farms if node not in answered],
            request=partial(self._requests.align, number=number, base=base, score=scored),
            accept=partial(self._take_aligned, asked, self._expected(base, scored)),
            sent=partial(self._sent, number, "align"),
            fault=partial(self._quarantine, number),
        )
        accepted = collect(self._link, self._clock, rules, exchange) + len(answered)
        if not accepted:
            raise StateError(f"round {number}: no farm answered; 'status' shows the reasons")
        new = self._closer.close(self.run, number, base, scored, budget)
        log.info(
            "round %d of %d: %d farms, heads kept %.0f %%",
            *(number, self._plan.rounds, accepted, 100 * new.mask.heads_kept_ratio),
        )
        return new

    def _answered(self, number: int) -> set[int]:
        """Farms whose replies are on disk already; a damaged one is forgotten and asked again."""
        answered = set()
        for row in self._store.replies(self.run, number):
            try:
                self._spool.open(Path(row.path)).close()
                answered.add(row.node)
            except StateError as error:
                log.warning("%s; the farm is asked again", error)
                self._store.drop_reply(self.run, number, row.node)
        return answered

    def _expected(self, base: Base, scored: bool) -> Expected:
        model, spec = self._models.load(base.digest)
        names = backbone.trainable_names(model, self._config.train.trainable)
        count = codec.layout_of(model, names).count
        return Expected(spec, count, scored, self._config.rounds.max_reply_bytes)

    def _take_aligned(
        self, asked: Asked, expected: Expected, node: int, attempt: int, reply: Reply, size: int
    ) -> Verdict:
        if not isinstance(reply, AlignReply):
            return self._unexpected(asked.round, node, reply)
        try:
            check_align(reply, asked, expected)
        except ProtocolError as error:
            self._quarantine(asked.round, node, error.reason, str(error))
            return Verdict.REJECTED
        spooled = self._spool.put(self.run, asked.round, node, reply)
        self._store.record_reply(self.run, asked.round, node, attempt, size, reply, spooled)
        self._requests.farm_holds(node, [asked.base])
        return Verdict.ACCEPTED

    # --- reports ---------------------------------------------------------------------------

    def _first_reports(self) -> None:
        if self._settings.probe:
            self._report("probe", 0, self._start)
        if self._settings.local_rounds:
            self._report("local", 0, self._start, self._settings.local_rounds)

    def _report(self, label: str, number: int, base: Base, local_rounds: int = 0) -> None:
        done = {row.node for row in self._store.reports(self.run, label)}
        exchange = Exchange(
            nodes=[node for node in self._farms if node not in done],
            request=partial(
                self._requests.evaluate,
                number=number,
                base=base,
                label=label,
                local_rounds=local_rounds,
            ),
            accept=partial(
                self._take_report, Asked(self.run, number, base.digest, base.mask.digest), label
            ),
            sent=partial(self._sent, number, "evaluate"),
            fault=partial(self._quarantine, number),
        )
        collect(self._link, self._clock, self._config.rounds, exchange)

    def _take_report(
        self, asked: Asked, label: str, node: int, _attempt: int, reply: Reply, size: int
    ) -> Verdict:
        if not isinstance(reply, EvaluateReply):
            return self._unexpected(asked.round, node, reply)
        try:
            check_evaluate(reply, asked, label)
        except ProtocolError as error:
            self._quarantine(asked.round, node, error.reason, str(error))
            return Verdict.REJECTED
        self._store.record_report(self.run, label, node, size, reply)
        self._requests.farm_holds(node, [asked.base])
        return Verdict.ACCEPTED

    # --- what both share -------------------------------------------------------------------

    def _sent(self, number: int, kind: RoundKind, node: int, attempt: int, size: int) -> None:
        self._store.record_sent(self.run, number, node, attempt, size, kind)

    def _quarantine(self, number: int, node: int, reason: RejectReason, detail: str) -> None:
        name = self._farms.get(node, f"node {node}")
        log.warning("round %d, %s: %s (%s)", number, name, detail, reason)
        self._store.record_rejection(self.run, number, node, reason, detail)

    def _unexpected(self, number: int, node: int, reply: Reply) -> Verdict:
        """A refusal, or an answer to another question."""
        if isinstance(reply, Refusal) and reply.reason == "missing_base":
            self._requests.farm_lost(node)
            return Verdict.RETRY
        if isinstance(reply, Refusal):
            reason = RejectReason.REFUSED
            if reply.reason == "protocol":
                reason = RejectReason.PROTOCOL
            self._quarantine(number, node, reason, f"{reply.reason}: {reply.detail}")
        else:
            self._quarantine(number, node, RejectReason.STALE, f"an unasked {reply.kind}")
        return Verdict.REJECTED
