"""A region plays its centre's orders with its own farms.

One order after another from the desk (server/region_desk.py): come up to the base that it names,
end the round before with it, have the farms do what it says, and put the sealed answer on the desk.
Rounds have the centre's numbers. A round stays open, its replies in the spool, until the next order
shows what the centre has made of it.

A run of the centre is a run here. Everything is on disk before the next step begins, so a region
that was killed goes on at the order on its desk: farms that have answered are not asked again, and
an answer that was sealed stands.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

from common import backbone
from common.config import ServerConfig
from common.errors import (
    ConfigError,
    DiskError,
    FieldfedError,
    LaunchError,
    ProtocolError,
    StateError,
)
from common.files import only_one
from common.mask import Mask
from common.messages import (
    AlignRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    Refusal,
    Reply,
    is_trial,
)
from common.plan import PlanConfig
from server.close import Base, Work
from server.collect import Collector, Exchange, Verdict, greeting_rules
from server.keys import SigningKeys
from server.link import Clock, FarmLink
from server.models import Models
from server.region_base import MissingBaseError, bring_up, held
from server.region_close import RegionCloser
from server.region_desk import Desk
from server.region_record import HELLO, Order, RegionReply, Terms, sealed
from server.requests import Requests
from server.rounds import RoundLoop
from server.rows import on_the_way
from server.settings import RunSettings
from server.store import Store

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
HELLO_SECONDS = 60.0
BASELINES = ("probe", "local")
Waiting = Callable[[], bool]


class RegionLoop(RoundLoop):
    """One run of the centre, as far as this region takes part in it."""

    closer: ClassVar[type[RegionCloser]] = RegionCloser
    _counted: int | None = None

    @property
    def closing(self) -> RegionCloser:
        """What ends rounds."""
        assert isinstance(self._closer, RegionCloser)
        return self._closer

    def adopt(self, base: Base, before: int) -> None:
        """End the open rounds that come before this number: the centre has gone on to ``base``."""
        for row in self._store.rounds(self.run):
            if row.kind == "align" and row.state == "open" and row.round < before:
                self.closing.adopt(self.run, row, base)
                log.info("round %d ends with %s", row.round, base.digest[:12])

    def learn(self, asked: AlignRequest, base: Base, region: str, fewest: int) -> RegionReply:
        """Play a round of alignment; its record.

        Raises:
            FieldfedError: too few farms answered, or their privacy allows no further round.
        """
        started = time.monotonic()
        self._forget_drafts()
        work = Work(asked.round, base, asked.criterion is not None)
        self._counted = asked.folded
        if not self._intake.farms:
            self._participants.wait()
        if not self._gather(work):
            raise StateError(self._detail)
        require_enough(len(self._store.replies(self.run, work.number)), fewest)
        return self.closing.record(self.run, work, asked, region, time.monotonic() - started)

    def _forget_drafts(self) -> None:
        """Those that the centre had judged and has not gone on with; they are large."""
        kept = {row.digest for row in self._store.candidates(self.run).values()}
        for row in self._store.reports(self.run):
            if is_trial(row.label) and row.base not in kept:
                self._models.discard(row.base)

    def judge(self, asked: EvaluateRequest, base: Base, region: str, fewest: int) -> EvaluateReply:
        """Have the farms evaluate; mean over them. Raises FieldfedError as :meth:`learn` does."""
        started = time.monotonic()
        if not self._intake.farms:
            self._participants.wait()
        self._participants.meet()
        self._report(
            *(asked.label, asked.round, base), local_rounds=asked.local_rounds, part=asked.part
        )
        rows = [
            one for one in self._store.reports(self.run, asked.label) if one.base == base.digest
        ]
        require_enough(len(rows), fewest)
        return EvaluateReply(
            **asked.identity(),
            farm=region,
            label=asked.label,
            examples=sum(row.examples for row in rows),
            accuracy=float(np.mean([row.accuracy for row in rows])),
            f1=float(np.mean([row.f1 for row in rows])),
            seconds=time.monotonic() - started,
        )

    def _folded(self) -> dict[str, int]:
        """What counts here and, as far as it has said, at the centre."""
        if self._counted is None:
            return {}
        return {farm: min(newest, self._counted) for farm, newest in super()._folded().items()}


def require_enough(farms: int, fewest: int) -> None:
    """No record of so few farms that it would be theirs; raises StateError."""
    if farms < fewest:
        raise StateError(
            f"{farms} farms answered, and a record needs {fewest} (fewest in [region]): nothing "
            "leaves the region"
        )


class Player:
    """Plays orders with the farms of a link."""

    def __init__(
        self, config: ServerConfig, link: FarmLink, clock: Clock, state_dir: Path, store: Store
    ) -> None:
        if config.region is None:
            raise ConfigError("this server is no region: give it a [region] in server.toml")
        self._config, self._region, self._name = config, config.region, config.server.name
        self._link, self._clock, self._state_dir, self._store = link, clock, state_dir, store
        self._models, self._keys = Models(state_dir), SigningKeys.open(state_dir / "signing")
        self._models.sweep()
        self._requests = Requests(0, config, self._models)
        self._loop: RegionLoop | None = None
        self._label = ""
        self._farms: dict[str, HelloReply] = {}

    def introduce(self, desk: Desk, waiting: Waiting) -> None:
        """Wait for farms, then tell the centre how many images they have, and what is held here."""
        wanted = max(self._config.rounds.min_farms, self._region.fewest)
        while waiting() and len(self._link.online()) < wanted:
            self._clock.sleep(LOOK_SECONDS)
        base = self._state_dir / "base.safetensors"
        if base.is_file() and not held(self._state_dir):
            self._models.save(*backbone.load_backbone(base))
        while waiting() and len(self._farms) < wanted:
            self._ask()
            self._clock.sleep(LOOK_SECONDS)
        if len(self._farms) >= wanted:
            self._say_hello(desk)

    def play(self, desk: Desk, order: Order) -> None:
        """Answer an order, and have the sealed answer on the desk.

        Raises:
            DiskError: the disk is full; the order is played when there is room.
            LaunchError: the link to the farms is gone.
        """
        reply = self._answered(order)
        self._end(order, reply)
        data = sealed(reply, self._name, order.terms.centre, order.key, self._keys)
        desk.answer(order, data, isinstance(reply, Refusal))
        self._say_hello(desk)
        log.info("%s is answered: %s, %d bytes", order.key[:40], reply.kind, len(data))

    # --- orders ----------------------------------------------------------------------------

    def _answered(self, order: Order) -> Reply:
        try:
            base = self._ready(order)
        except MissingBaseError as error:
            return Refusal(reason="missing_base", detail=str(error))
        except DiskError:
            raise
        except FieldfedError as error:
            return Refusal(reason="bad_request", detail=str(error)[:500])
        try:
            return self._played(order, base)
        except (DiskError, LaunchError):  # of this machine, and over when that is
            raise
        except FieldfedError as error:  # its text may name farms and folders: it stays here
            log.error("%s cannot be answered: %s", order.key[:40], error)
            return Refusal(reason="internal", detail=f"{self._name}: see the region's own log")

    def _ready(self, order: Order) -> Base:
        """What the order stands on, brought here."""
        if order.terms.centre != self._region.centre:
            raise ProtocolError(
                f"an order of '{order.terms.centre}', and the centre is {self._region.centre}"
            )
        if order.request.base_kind != "backbone":
            raise ProtocolError("an order to teach a student, which regions cannot play yet")
        bring_up(self._models, order.request)
        return Base(order.request.base, Mask.from_json(order.terms.mask))

    def _played(self, order: Order, base: Base) -> Reply:
        loop, asked = self._run_of(order, base), order.request
        if order.terms.tau is not None:
            self._store.freeze_tau(loop.run, order.terms.tau)
        if isinstance(asked, AlignRequest):
            loop.adopt(base, asked.round)
            return loop.learn(asked, base, self._name, self._region.fewest)
        # a draft judges nothing but itself; any other report comes after the end of its round
        loop.adopt(base, asked.round + (not is_trial(asked.label)))
        return loop.judge(asked, base, self._name, self._region.fewest)

    def _run_of(self, order: Order, base: Base) -> RegionLoop:
        """The run here that belongs to the centre's, begun or gone on with where it must be."""
        label = f"centre{order.request.run}-{order.terms.run_id[:16]}"
        if self._loop is None or label != self._label or self._over(self._loop.run, order):
            settings = RunSettings(config=_config_of(self._config, order), label=label, probe=False)
            run = self._resumed(settings, order, base)
            self._models.settle()  # the loop reads what kind of backbone it is
            self._loop = RegionLoop(
                *(run, settings, self._link, self._clock, self._store, self._models),
                self._state_dir,
            )
            self._label = label
        return self._loop

    def _resumed(self, settings: RunSettings, order: Order, base: Base) -> int:
        last = self._store.latest_run()
        if last is not None and last.message == settings.label and not self._over(last.run, order):
            return last.run
        config, text = settings.config, settings.model_dump_json()
        run = self._store.start_run(
            text, config.seed, base.digest, base.mask.to_json(), settings.label
        )
        log.info("run %d plays %s from %s", run, settings.label, base.digest[:12])
        return run

    def _over(self, run: int, order: Order) -> bool:
        """Whether a round is ordered that is over here: the centre was restored from a backup."""
        row = self._store.align_round(run, order.request.round)
        return (
            isinstance(order.request, AlignRequest) and row is not None and row.finished is not None
        )

    def _end(self, order: Order, reply: Reply) -> None:
        """The closing report is the last that a centre asks for in a run."""
        asked = order.request
        if not isinstance(asked, EvaluateRequest) or on_the_way(asked.label):
            return
        closing = asked.label not in BASELINES
        if closing and isinstance(reply, EvaluateReply) and self._loop is not None:
            self._models.settle()
            self._store.finish_run(self._loop.run, "done")

    # --- introductions ---------------------------------------------------------------------

    def _ask(self) -> None:
        """Ask the farms that are online who they are, those of an older protocol in theirs."""

        def welcome(node: int, _attempt: int, reply: Reply, _size: int) -> Verdict:
            if isinstance(reply, HelloReply):
                self._farms[reply.farm] = reply
            older = isinstance(reply, Refusal) and reply.reason == "protocol"
            if older and self._requests.farm_speaks(node, reply.protocol):
                return Verdict.RETRY
            return Verdict.ACCEPTED

        nodes = list(self._link.online())
        if nodes:
            exchange = Exchange(
                nodes=nodes,
                request=self._requests.hello,
                accept=welcome,
                sent=lambda _node, _attempt, _size: None,
                fault=lambda node, *words: log.warning("node %d: %s, %s", node, *words),
            )
            soon = {"deadline_seconds": min(self._config.rounds.deadline_seconds, HELLO_SECONDS)}
            rules = self._config.rounds.model_copy(update=soon)
            rules = greeting_rules(rules, len(self._farms), len(nodes))
            Collector(self._link, self._clock, rules).run(exchange)

    def _say_hello(self, desk: Desk) -> None:
        """Have on the desk who the region is, as it stands now."""
        known = {farm: (hello.examples, hello.classes) for farm, hello in self._farms.items()}
        if self._loop is not None:
            rows = self._store.farms(self._loop.run)
            known |= {row.farm: (row.examples, row.classes) for row in rows}
        if len(known) < self._region.fewest:
            return  # their sums would be theirs
        hello = HelloReply(
            farm=self._name,
            examples=sum(examples for examples, _ in known.values()),
            classes=sum(classes for _, classes in known.values()),
            held=held(self._state_dir),
        )
        desk.introduce(sealed(hello, self._name, self._region.centre, HELLO, self._keys))


def _config_of(config: ServerConfig, order: Order) -> ServerConfig:
    """The region's settings, with what the centre decides: how farms train and score."""
    terms: Terms = order.terms
    plan = PlanConfig(
        rounds=terms.rounds,
        criterion=terms.criterion,
        exponent=terms.exponent,
        consensus=config.plan.consensus,
    )
    changes = {"seed": order.request.seed, "train": order.request.train, "plan": plan}
    changes["recovery"] = None  # a centre has none
    return config.model_copy(update=changes)


def play_orders(
    config: ServerConfig,
    link: FarmLink,
    state_dir: Path,
    clock: Clock,
    waiting: Waiting = lambda: True,
) -> None:
    """Play what the centre orders for as long as ``waiting`` says so.

    Raises:
        FieldfedError: the store, the desk or the keys cannot be used, or the link is gone.
    """
    # a process that outlived its SuperLink must not write beside the one that replaces it
    with (
        only_one(state_dir / "run.lock"),
        Store.open(state_dir / "fieldfed.db") as store,
        Desk.at(state_dir) as desk,
    ):
        player = Player(config, link, clock, state_dir, store)
        player.introduce(desk, waiting)
        while waiting():
            order = desk.current()
            if order is None:
                link.online()  # it tells whether this process is still wanted
                clock.sleep(LOOK_SECONDS)
            else:
                player.play(desk, order)
