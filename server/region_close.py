"""A region ends a round: what its farms sent becomes one record, and no candidate of its own.

Which sums of a region make the same update and scores as if its farms were the centre's own:

    update    sum of images, mean weighted by them              exact, up to fp32
    scores    sum of weights, mean weighted by them, maximum    exact, up to fp32
    tau       number of farms, mean of their squared MMDs       exact, up to fp32
    accuracy  mean over farms                                   the centre counts a region once

Not made of sums, and so a matter of each region: the length to which updates are clipped (a
multiple of the region's median length), the weight at which a farm is capped (three times the
region's median), and every robust rule. A region merges by its own ``rounds.aggregation`` and
``plan.consensus``; the centre's are rules over regions. Where no farm is clipped or capped and all
rules are means, a network in regions does what one without them would.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from common import codec
from common.errors import StateError
from common.mask import Mask
from common.messages import AlignRequest
from common.scores import UnitScores
from common.spec import ModelSpec
from common.trainable import trainable_set
from server.close import Base, RoundCloser, Work
from server.consensus import consensus, total_weight
from server.region_record import RegionReply
from server.rows import ReplyRow, RoundRow, ScoreRow
from server.scored import replied_scores
from server.spool import ReplyReader, ReplyScores

log = logging.getLogger(__name__)


class RegionCloser(RoundCloser):
    """Turns the spooled replies of a region's round into its record."""

    def record(
        self, run: int, work: Work, asked: AlignRequest, region: str, seconds: float
    ) -> RegionReply:
        """What the region answers with.

        Args:
            run: of the region.
            work: the round in it.
            asked: the centre's request, whose run is the centre's.
            region: its name.
            seconds: that the round took.

        Raises:
            StateError: nobody judged the base or, where that was asked, scored it.
        """
        replies = self._store.replies(run, work.number)
        readers = [self._spool.open(row.spooled) for row in replies]
        model, spec = self._models.view(work.base.digest)
        trained = trainable_set(model, self._config.train.trainable, self._config.train.rank)
        merged = self._merged(replies, readers, trained.layout.count)
        update = codec.encode(merged, work.base.digest, bits=32, rank=trained.rank)
        return RegionReply(
            **asked.identity(),
            farm=region,
            seconds=seconds,
            update=update,
            **_figures(replies),
            **(self._sums(run, replies, readers, spec) if work.scored else {}),
        )

    def adopt(self, run: int, row: RoundRow, base: Base) -> None:
        """End an open round with the centre's candidate."""
        mask = Mask.from_json(self._store.mask(row.mask))
        work = Work(row.round, Base(row.base, mask), bool(row.scored))
        model, spec = self._models.view(base.digest)
        replies = self._store.replies(run, row.round)
        candidate = self._candidate(model, spec, base.digest, row.base, base.mask)
        scores: list[ScoreRow] = []
        try:
            readers = [self._spool.open(reply.spooled) for reply in replies]
            _, before = self._models.view(row.base)
            _, scores = self._consensus(run, work, replies, readers, before)
        except StateError as error:  # what the farms said is in the record; this is for looking up
            log.warning("the scores of round %d are not kept: %s", row.round, error)
        self._commit(run, row.round, candidate, base.mask, replies, scores, None)

    def _sums(
        self, run: int, replies: list[ReplyRow], readers: list[ReplyReader], spec: ModelSpec
    ) -> dict[str, Any]:
        sent = replied_scores(replies, readers)
        if not sent:
            raise StateError("no farm scored the backbone in a round that was to score it")
        farms = self._score(run, sent, spec)
        weighed = [(row.examples, farms[row.node]) for row in replies if row.node in farms]
        mean = consensus(weighed, kappa=0.0, rule=self._config.plan.consensus)
        # where no maximum is to be trusted, it is the mean again and adds nothing
        most = consensus(weighed, kappa=1.0) if self._counts_maximum else mean
        weight = total_weight([examples for examples, _ in weighed])
        return sums_of(mean, most, list(sent.values()), weight)

    def _scale(self, run: int, sent: Mapping[int, ReplyScores]) -> tuple[float, float]:  # noqa: ARG002
        """As the centre has frozen it; until it has, invariance counts for nothing."""
        tau = self._store.tau(run)
        return (1.0, 0.0) if tau is None else (tau, self._config.plan.invariance_exponent)


def sums_of(
    mean: UnitScores, most: UnitScores, sent: list[ReplyScores], weight: float
) -> dict[str, codec.Floats]:
    """The arrays of a record of a score round, by name."""
    # sorted per head, for the sum must not depend on the order of the farms
    shifts = np.sort(np.stack([part.head_mmd2 for part in sent]), axis=0)
    return {
        "head_mean": mean.flat_heads(),
        "head_most": most.flat_heads(),
        "neuron_mean": mean.flat_neurons(),
        "neuron_most": most.flat_neurons(),
        "shift": shifts.mean(axis=0, dtype=np.float64).astype(np.float32),
        "totals": np.array([weight, len(sent)], np.float32),
    }


def _figures(replies: list[ReplyRow]) -> dict[str, Any]:
    """Sums and means over farms; a late reply says nothing of this round's base."""
    now = [row for row in replies if row.of_round == row.round]
    if not now:
        raise StateError("only late replies came, and nobody judged the round's base")
    means = {
        name: float(np.mean([getattr(row, name) for row in now]))
        for name in ("accuracy", "f1", "loss", "dal")
    }
    return means | {
        "farms": len(replies),
        "examples": sum(row.examples for row in replies),
        "steps": max(1, sum(row.steps for row in replies)),
        "train_seconds": max(row.train_seconds for row in replies),
    }
