"""A reply comes in: checked, then spooled and on record, or in quarantine.

Farms whose replies are bad several times in a row are paused: they are not asked any more until an
operator readmits them (``fieldfed-server readmit``). Messages that are lost on the way are nobody's
fault and pause nobody.
"""

import logging
from functools import partial

from common import codec
from common.compress import expand
from common.config import ServerConfig
from common.errors import ModelError, ProtocolError, RejectReason
from common.mask import Mask
from common.messages import AlignReply, EvaluateReply, Extent, HelloReply, Refusal, Reply
from common.networks import Network
from common.spec import Spec
from common.surgery import slice_flat
from common.trainable import TrainableSet, trainable_set
from server.close import Base, Work
from server.collect import Accept, Verdict
from server.models import Models
from server.nodes import certified_farm
from server.requests import Requests
from server.spool import Spool
from server.store import Store
from server.verify import Asked, Expected, check_align, check_evaluate

log = logging.getLogger(__name__)

BLAMELESS = frozenset({RejectReason.LOST, RejectReason.LATE, RejectReason.DUPLICATE})


class Intake:
    """Judges the replies of one run and keeps the good ones.

    ``farms`` names the farms that have introduced themselves, by node.
    """

    def __init__(
        self,
        run: int,
        config: ServerConfig,
        models: Models,
        spool: Spool,
        store: Store,
        requests: Requests,
    ) -> None:
        self.farms: dict[int, str] = {}
        self._nodes: dict[str, int] = {}
        self._shapes: dict[str, tuple[Spec, int, int]] = {}
        self._run, self._config, self._models = run, config, models
        self._spool, self._store, self._requests = spool, store, requests

    def active(self) -> list[int]:
        """Nodes of the farms that are not paused, those with most images first.

        Where farms take turns, the longest work begins first, so that nobody waits for it alone.
        """
        paused = {row.farm for row in self._store.pauses()}
        rows = self._store.farms(self._run)
        order = sorted(rows, key=lambda row: (-row.examples, row.farm, row.node))
        return [row.node for row in order if row.node in self.farms and row.farm not in paused]

    def hello(self) -> Accept:
        """Judges introductions."""
        return self._welcome

    def aligned(self, work: Work) -> Accept:
        """Judges replies to the round's own requests."""
        asked = Asked(self._run, work.number, work.base.digest, work.base.mask.digest)
        return partial(
            self._take_aligned, asked, self._expected(work.base, work.scored, work.moments)
        )

    def late(self, work: Work) -> Accept:
        """Judges replies to requests of earlier rounds, while ``work`` is going on."""
        return partial(self._take_late, work)

    def report(self, number: int, base: Base, label: str) -> Accept:
        """Judges reports."""
        asked = Asked(self._run, number, base.digest, base.mask.digest)
        return partial(self._take_report, asked, label)

    def quarantine(self, number: int, node: int, reason: RejectReason, detail: str) -> None:
        """Put a rejection on record; a farm that is at fault too often is paused."""
        farm = self.farms.get(node)
        log.warning("round %d, %s: %s (%s)", number, farm or f"node {node}", detail, reason)
        self._store.record_rejection(self._run, number, node, reason, detail)
        if farm is None or reason in BLAMELESS:
            return
        blamed = set(RejectReason) - BLAMELESS
        strikes = self._store.strikes(node, farm, blamed)
        if strikes >= self._config.rounds.strikes:
            self._store.pause(farm, f"{strikes} bad replies in a row, the last: {detail}"[:500])
            log.warning("farm %s is paused; 'fieldfed-server readmit' asks it again", farm)

    # --- what comes in ---------------------------------------------------------------------

    def _welcome(self, node: int, _attempt: int, reply: Reply, _size: int) -> Verdict:
        if not isinstance(reply, HelloReply):
            return self._unexpected(0, node, reply)
        shown = certified_farm(self._models.state_dir, node)
        if shown not in (None, reply.farm):
            detail = f"farm {shown}, by its certificate, says that it is {reply.farm}"
            self.quarantine(0, node, RejectReason.PROTOCOL, detail)
            return Verdict.REJECTED
        # a node gets another number when it starts again
        self.farms.pop(self._nodes.get(reply.farm, node), None)
        self.farms[node], self._nodes[reply.farm] = reply.farm, node
        self._requests.farm_holds(node, reply.held)
        if reply.hub:
            self._requests.farm_fetches(node)
        self._store.upsert_farm(
            *(self._run, node, reply.farm, reply.examples, reply.classes, reply.protocol)
        )
        log.info("farm %s: %d images, %d classes", reply.farm, reply.examples, reply.classes)
        return Verdict.ACCEPTED

    def _take_aligned(
        self, asked: Asked, expected: Expected, node: int, attempt: int, reply: Reply, size: int
    ) -> Verdict:
        if not isinstance(reply, AlignReply):
            return self._unexpected(asked.round, node, reply)
        try:
            reply = _expanded(reply, expected)
            check_align(reply, asked, expected)
        except ProtocolError as error:
            self.quarantine(asked.round, node, error.reason, str(error))
            return Verdict.REJECTED
        return self._keep(asked.round, node, attempt, reply, size)

    def _take_late(self, work: Work, node: int, attempt: int, reply: Reply, size: int) -> Verdict:
        if not isinstance(reply, AlignReply):
            return self._unexpected(work.number, node, reply)
        try:
            folded = self._made_current(reply, work)
        except ProtocolError as error:
            self.quarantine(work.number, node, error.reason, str(error))
            return Verdict.RETRY
        verdict = self._keep(work.number, node, attempt, folded, size)
        if verdict is Verdict.ACCEPTED and work.scored:
            return Verdict.FOLDED  # it brings no scores, and scores are what this round is for
        return verdict

    def _made_current(self, reply: AlignReply, work: Work) -> AlignReply:
        """A late reply, checked against its own round, as an update of the present base.

        Raises:
            ProtocolError: LATE outside the window, or from before a cut since which other numbers
                are trained; FOREIGN_MASK when it trained units that a restored model does not
                have; or whatever is wrong with it.
        """
        window, late = self._config.rounds.staleness, work.number - reply.round
        if not 0 < late <= window:
            detail = f"answers round {reply.round} in round {work.number}, the limit is {window}"
            raise ProtocolError(f"{detail} late", RejectReason.LATE)
        row = self._store.align_round(self._run, reply.round)
        if row is None:
            raise ProtocolError(f"answers round {reply.round}, which never was", RejectReason.STALE)
        asked = Asked(self._run, reply.round, row.base, row.mask)
        mask = Mask.from_json(self._store.mask(row.mask))
        expected = self._expected(Base(row.base, mask), scored=False)
        reply = _expanded(reply, expected)
        check_align(reply, asked, expected)
        plain: dict[str, object] = {
            "head_importance": None,
            "head_mmd2": None,
            "neuron_importance": None,
            "moments": None,
        }
        if row.mask != work.base.mask.digest:
            plain["update"] = self._sliced(reply, expected.count, mask, work.base)
        return reply.model_copy(update=plain)

    def _sliced(self, reply: AlignReply, count: int, before: Mask, base: Base) -> codec.Bytes:
        """An update from before a prune event without what the event removed."""
        try:
            keep = base.mask.keep_in(before)
        except ModelError:
            raise ProtocolError(
                f"trained under mask {reply.mask[:12]}, which the present one is not within",
                RejectReason.FOREIGN_MASK,
            ) from None
        old, old_spec = self._models.view(reply.base)
        values = codec.decode(reply.update, base=reply.base, count=count)
        new, _ = self._models.view(base.digest)
        trained, smaller = self._trained(old, before), self._trained(new, base.mask)
        if not trained.holds(smaller):
            raise ProtocolError(
                f"trained before the cut of mask {base.mask.digest[:12]}, since which more is",
                RejectReason.LATE,
            )
        flat = slice_flat(values, trained.layout, old_spec, keep, smaller.layout)
        return codec.encode(flat, base.digest, bits=32, rank=smaller.rank)

    def _keep(self, number: int, node: int, attempt: int, reply: AlignReply, size: int) -> Verdict:
        spooled = self._spool.put(self._run, number, node, reply)
        if not self._store.record_reply(self._run, number, node, attempt, size, reply, spooled):
            self.quarantine(number, node, RejectReason.DUPLICATE, "its reply counts already")
            return Verdict.FOLDED
        self._requests.farm_holds(node, [reply.base])
        self._requests.farm_has_anchors(node, reply.mask)
        return Verdict.ACCEPTED

    def _take_report(
        self, asked: Asked, label: str, node: int, _attempt: int, reply: Reply, size: int
    ) -> Verdict:
        if not isinstance(reply, EvaluateReply):
            return self._unexpected(asked.round, node, reply)
        try:
            check_evaluate(reply, asked, label)
        except ProtocolError as error:
            self.quarantine(asked.round, node, error.reason, str(error))
            return Verdict.REJECTED
        self._store.record_report(self._run, label, node, size, reply)
        self._requests.farm_holds(node, [asked.base])
        return Verdict.ACCEPTED

    def _unexpected(self, number: int, node: int, reply: Reply) -> Verdict:
        """A refusal, or an answer to another question."""
        if isinstance(reply, Refusal) and reply.reason == "missing_base":
            self._requests.farm_lost(node)
            return Verdict.RETRY
        if isinstance(reply, Refusal):
            reason = RejectReason.REFUSED
            if reply.reason == "protocol":
                if self._requests.farm_speaks(node, reply.protocol):
                    log.info("node %d is asked in its protocol, %d", node, reply.protocol)
                    return Verdict.RETRY
                reason = RejectReason.PROTOCOL
            self.quarantine(number, node, reason, f"{reply.reason}: {reply.detail}")
        else:
            self.quarantine(number, node, RejectReason.STALE, f"an unasked {reply.kind}")
        return Verdict.REJECTED

    def _expected(self, base: Base, scored: bool, moments: Extent | None = None) -> Expected:
        digest = base.digest
        if digest not in self._shapes:  # late replies ask for the same few again and again
            model, spec = self._models.network(digest)
            trained = self._trained(model, base.mask)
            self._shapes[digest] = spec, trained.layout.count, trained.rank
        limit = self._config.rounds.max_reply_bytes
        return Expected(*self._shapes[digest], scored, limit, moments)

    def _trained(self, model: Network, mask: Mask) -> TrainableSet:
        train = self._config.train_under(mask)
        return trainable_set(model, train.trainable, train.rank)


def _expanded(reply: AlignReply, expected: Expected) -> AlignReply:
    """The reply with its update as the codec reads it."""
    limit = min(expected.limit_bytes, codec.largest_payload(expected.count))
    return reply.model_copy(update={"update": expand(reply.update, limit)})
