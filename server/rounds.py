"""The round loop: introduce, report, align round by round, prune when the plan says so.

Everything that matters is in the store before the next step begins, so a run continues at its
last committed round. The loop speaks to farms through FarmLink alone and takes time from a Clock.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from common import backbone
from common.errors import DiskError, FieldfedError, StateError
from common.logs import bound
from common.mask import Mask
from common.messages import Extent
from server.close import Base, RoundCloser, SourceBatches, Work
from server.collect import Exchange, Owed, quorum_of
from server.guard import accuracies, judge
from server.intake import Intake
from server.link import Clock, FarmLink
from server.models import Models
from server.pace import step_budgets, whole_round
from server.participants import Participants
from server.plan import CutRule
from server.pretrain import source_batches
from server.privacy import over_budget
from server.requests import Requests
from server.rows import GUARD, RoundKind, VerdictRow
from server.search import planned
from server.settings import RunSettings
from server.spool import Spool
from server.store import Store
from server.trial import Tried, outcome, trial_label, weighed

log = logging.getLogger(__name__)


class WallClock:
    """Real time."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class RoundLoop:
    """One run."""

    intake: ClassVar[type[Intake]] = Intake
    closer: ClassVar[type[RoundCloser]] = RoundCloser

    def __init__(
        self,
        run: int,
        settings: RunSettings,
        link: FarmLink,
        clock: Clock,
        store: Store,
        models: Models,
        state_dir: Path,
    ) -> None:
        self.run, self._settings, self._config = run, settings, settings.config
        self._link, self._store = link, store
        self._models, self._spool = models, Spool(state_dir / "spool")
        self._spool.sweep(store.spooled_paths(run))
        self._owed: dict[str, Owed] = {}
        self._detail = ""
        row = store.run(run)
        self._start = Base(row.base, Mask.from_json(row.mask_json))
        self._dense = backbone.read_spec(self._models.path(row.base))
        self._plan = planned(self._config.plan, self._dense, store.verdicts(run))
        self._requests = Requests(run, self._config, self._models, settings.lesson)
        self._intake = self.intake(
            run, self._config, self._models, self._spool, store, self._requests
        )
        self._participants = Participants(self._config, link, clock, self._intake, self._requests)
        self._closer = self.closer(
            self._config, self._dense, self._models, self._spool, store, self._source()
        )

    def go(self) -> None:
        """Everything from the first hello to the last report.

        Raises:
            DiskError: the disk is full; the run goes on from here when it is started again.
            FieldfedError: no farm answered; the run is marked failed and says so.
        """
        try:
            with bound(run=self.run):
                self._play()
                self._models.settle()
        except DiskError as error:
            log.error("%s; the run goes on when there is room", error)
            raise
        except FieldfedError as error:
            self._store.finish_run(self.run, "failed", str(error))
            raise
        self._store.finish_run(self.run, "done", self._detail)
        log.info("run %d is done", self.run)

    def _play(self) -> None:
        self._participants.wait()
        self._first_reports()
        base, done = self._committed()
        for number in range(done + 1, self._plan.rounds + 1):
            with bound(round=number):
                after = self._round(number, base)
            if after is None:
                break
            base = after
        base = self._judge_last(base)
        self._report(self._settings.label, self._plan.rounds, base)

    def _committed(self) -> tuple[Base, int]:
        last = self._store.last_committed(self.run)
        number = 0 if last is None else last[0]
        return self._base_after(number), number

    def _base_after(self, number: int) -> Base:
        """What a committed round ended with; round 0 is the beginning."""
        if number == 0:
            return self._start
        candidate = self._store.candidates(self.run)[number]
        return Base(candidate.digest, Mask.from_json(self._store.mask(candidate.mask)))

    def _source(self) -> SourceBatches | None:
        folder = self._config.backbone.source
        if folder is None:
            return None
        count, seed = self._config.backbone.anchor_images, self._config.seed
        return partial(source_batches, folder, count=count, seed=seed)

    # --- a round ---------------------------------------------------------------------------

    def _round(self, number: int, base: Base) -> Base | None:
        """The next training base; None when the farms' privacy allows no further round."""
        work = Work(number, base, self._plan.scores_in(number), self._moments_in(number))
        if not self._gather(work):
            log.warning("%s", self._detail)
            self._plan.end_after(number - 1)
            return None
        verdict = self._judge(number, base)
        if verdict is not None and not verdict.accepted:
            return self._undo(number, verdict)
        if verdict is not None:
            self._plan.accept(verdict.event, number)
        new = self._closer.close(self.run, work, self._rule(work), verdict)
        log.info(
            "round %d of %d closed, heads kept %.0f %%",
            *(number, self._plan.rounds, 100 * new.mask.heads_kept_ratio),
        )
        return new

    def _moments_in(self, number: int) -> Extent | None:
        """What farms send of second moments, where a cut may end the round."""
        plan, may_cut = self._config.plan, bool(self._plan.rules_after(number))
        if plan.moments == "source" or not (may_cut or self._plan.judged_in(number)):
            return None
        return "all" if plan.cuts_neurons else "heads"

    def _rule(self, work: Work) -> CutRule | None:
        """How the prune event that ends a round cuts; of several rules, what farms find best."""
        rules = self._plan.rules_after(work.number)
        if len(rules) < 2:
            return rules[0] if rules else None
        tried, drafts = [], []
        for rule, base in self._closer.drafts(self.run, work, rules):
            label = trial_label(base.digest)
            self._report(label, work.number, base, part="decide")
            reports = self._store.reports(self.run, label)
            tried.append(Tried(rule, {row.farm: row.accuracy for row in reports}))
            drafts.append(base.digest)
        if not tried:
            return rules[0]
        rows = weighed(work.number, tried)
        self._store.keep_trials(self.run, work.number, rows)
        log.log(logging.INFO if rows[0].farms else logging.WARNING, "%s", outcome(rows))
        for row, digest in zip(rows, drafts, strict=True):
            if not row.made:
                self._models.discard(digest)
        return next(one.rule for one, row in zip(tried, rows, strict=True) if row.made)

    def _gather(self, work: Work) -> bool:
        """Have the farms' replies on disk; False when their privacy allows no further round."""
        self._participants.meet()
        number = work.number
        asked, answered = self._asked(number), self._answered(number)
        names = [self._intake.farms[node] for node in asked]
        privacy = self._config.privacy
        self._detail = over_budget(self._store, self.run, privacy, names, number, work.scored)
        if self._detail:
            return False
        self._open(work, len(asked))
        budgets = self._step_budgets(asked, work.base.mask)
        folded, farms = self._folded(), self._intake.farms.items()
        self._requests.counts({node: folded[farm] for node, farm in farms if farm in folded})
        exchange = Exchange(
            nodes=[node for node in asked if node not in answered],
            request=partial(self._requests.align, work=work, budgets=budgets),
            accept=self._intake.aligned(work),
            sent=partial(self._sent, number, "align"),
            fault=partial(self._intake.quarantine, number),
            late=self._intake.late(work),
        )
        self._participants.ask(exchange, self._config.rounds, number, self._owed)
        if not self._store.replies(self.run, number):
            raise StateError(f"round {number}: no farm answered; 'status' shows the reasons")
        return True

    def _asked(self, number: int) -> list[int]:
        """The farms of a round."""
        return self._participants.of_round(number)

    def _folded(self) -> dict[str, int]:
        """The newest round, by farm, whose reply counts."""
        return self._store.folded(self.run)

    def _open(self, work: Work, farms: int) -> None:
        rules = self._config.rounds
        self._store.open_round(
            self.run,
            work.number,
            kind="align",
            base=work.base.digest,
            mask=work.base.mask.digest,
            quorum=quorum_of(farms, rules),
            deadline=time.time() + rules.deadline_seconds,
            scored=work.scored,
        )

    def _step_budgets(self, nodes: Sequence[int], mask: Mask) -> dict[int, int]:
        if not self._config.rounds.step_budget:
            return {}
        full = whole_round(self._store.farms(self.run), nodes, self._config.train_under(mask))
        return step_budgets(self._store.last_replies(self.run), full)

    def _answered(self, number: int) -> set[int]:
        """Farms whose replies are on disk already; a damaged one is forgotten and asked again."""
        answered = set()
        for row in self._store.replies(self.run, number):
            try:
                self._spool.open(row.spooled)
                answered.add(row.node)
            except StateError as error:
                log.warning("%s; the farm is asked again", error)
                self._store.drop_reply(self.run, number, row.node)
        return answered

    # --- the accuracy guard ----------------------------------------------------------------

    def _judge(self, number: int, base: Base) -> VerdictRow | None:
        """The verdict of a round's replies on the last cut, when this round judges it."""
        event = self._unjudged(number)
        if event is None:
            return None
        if number > self._plan.rounds:
            after = {row.farm: row.accuracy for row in self._store.reports(self.run, GUARD)}
        else:
            after = accuracies(self._store.replies(self.run, number))
        before = accuracies(self._store.replies(self.run, self._plan.compared_with(event)))
        limit = self._config.plan.tolerance
        return judge(event, number, base.mask.digest, before, after, limit)

    def _unjudged(self, number: int) -> int | None:
        """The event that this round judges, unless an earlier one has done so."""
        judged = {row.event for row in self._store.verdicts(self.run)}
        event = self._plan.judged_in(number)
        return None if event in judged else event

    def _undo(self, number: int, verdict: VerdictRow) -> Base:
        """Back to the backbone of before the cut, as the end of this round."""
        before = self._base_after(verdict.event - 1)
        restored = self._closer.restore(self.run, number, before, verdict)
        self._plan.reject(verdict.event, number)
        log.warning("round %d: %s is restored", number, before.digest[:12])
        return restored

    def _judge_last(self, base: Base) -> Base:
        """Evaluate the last candidate where the farms decide, and undo its cut if it must be."""
        number = self._plan.rounds + 1
        if self._unjudged(number) is None:
            return base
        self._report(GUARD, self._plan.rounds, base, part="decide")
        verdict = self._judge(number, base)
        if verdict is None or verdict.accepted:
            if verdict is not None:
                self._store.record_verdict(self.run, verdict)
            return base
        self._open(Work(number, base, scored=False), len(self._intake.farms))
        return self._undo(number, verdict)

    # --- reports ---------------------------------------------------------------------------

    def _first_reports(self) -> None:
        if self._settings.probe:
            self._report("probe", 0, self._start)
        if self._settings.local_rounds:
            self._report("local", 0, self._start, local_rounds=self._settings.local_rounds)

    def _report(
        self,
        label: str,
        number: int,
        base: Base,
        *,
        local_rounds: int = 0,
        part: Literal["test", "decide"] = "test",
        nodes: Sequence[int] | None = None,
    ) -> None:
        """Have farms report on ``base``: by default all that have not yet."""
        if nodes is None:
            done = {row.node for row in self._store.reports(self.run, label)}
            nodes = [node for node in self._intake.active() if node not in done]
        exchange = Exchange(
            nodes=nodes,
            request=partial(
                self._requests.evaluate,
                number=number,
                base=base,
                label=label,
                part=part,
                local_rounds=local_rounds,
            ),
            accept=self._intake.report(number, base, label),
            sent=partial(self._sent, number, "evaluate"),
            fault=partial(self._intake.quarantine, number),
        )
        self._participants.ask(
            exchange, self._config.rounds.model_copy(update={"mode": "sync"}), number
        )

    def _sent(self, number: int, kind: RoundKind, node: int, attempt: int, size: int) -> None:
        self._store.record_sent(self.run, number, node, attempt, size, kind)
