"""Close a round: replies on disk become one candidate, and at a prune event a smaller one.

Aggregate in node order -> code and decode the step (the canonical candidate is what the decoder
yields, so every farm reaches the same digest) -> consensus over farms, less what other units can
say instead -> mask -> surgery with compensation -> anchors of the new mask -> one commit.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common import backbone, codec, networks
from common.anchors import compute_anchors
from common.budget import Budget, choose_mask
from common.config import ServerConfig
from common.mask import Mask
from common.messages import Extent
from common.moments import with_farms
from common.networks import Network
from common.precision import bf16_supported
from common.scores import UnitScores, decode_neurons
from common.spec import ModelSpec, Spec
from common.step import Cut, Step
from common.surgery import Moments, collect_moments, prune, prune_compensated
from common.trainable import TrainableSet, trainable_set
from server.aggregate import aggregate
from server.consensus import consensus, farm_scores, median_tau
from server.guard import accuracies
from server.models import Models
from server.plan import CutRule
from server.redundancy import irreplaceable
from server.residual import Residuals, left_after
from server.scored import gone_by, replied_scores, score_rows
from server.spool import ReplyReader, ReplyScores, Spool
from server.store import CandidateRow, ReplyRow, ScoreRow, Store, VerdictRow

log = logging.getLogger(__name__)

SourceBatches = Callable[[ModelSpec], Iterable[Tensor]]


@dataclass(frozen=True)
class Base:
    """The training base of the moment: a candidate and the mask it carries."""

    digest: str
    mask: Mask


@dataclass(frozen=True)
class Work:
    """What a round asks of farms: alignment on a base and, in a score round, scores."""

    number: int
    base: Base
    scored: bool
    moments: Extent | None = None


class RoundCloser:
    """Turns the spooled replies of a round into the next training base.

    ``source`` yields batches of source images for a spec, or is None when the server has none;
    then nothing is compensated and no anchors are kept.
    """

    def __init__(
        self,
        config: ServerConfig,
        dense: ModelSpec,
        models: Models,
        spool: Spool,
        store: Store,
        source: SourceBatches | None,
    ) -> None:
        self._config, self._dense, self._source = config, dense, source
        self._models, self._spool, self._store = models, spool, store
        self._residuals = Residuals(models.state_dir)

    def close(
        self,
        run: int,
        work: Work,
        rule: CutRule | None = None,
        verdict: VerdictRow | None = None,
    ) -> Base:
        """Aggregate, perhaps prune, commit; returns the new training base.

        Args:
            run: of the round.
            work: what was asked.
            rule: of the prune event that ends the round, if one does.
            verdict: on the last event; committed along.
        """
        learned = self._learned(run, work, () if rule is None else (rule,))
        end = self._end(run, work, learned, rule)
        if end.lost.any():
            self._residuals.save(run, end.digest, end.lost)
        if end.mask != work.base.mask:
            self._keep_anchors(end)
            kept = 100 * end.mask.heads_kept_ratio
            log.info("pruned to %.0f %% of heads by %s: %s", kept, rule, end.digest[:12])
        candidate = self._candidate(*end.network, end.digest, work.base.digest, end.mask)
        self._commit(run, work.number, candidate, end.mask, learned.replies, end.scores, verdict)
        return Base(end.digest, end.mask)

    def drafts(
        self, run: int, work: Work, rules: Sequence[CutRule]
    ) -> Iterator[tuple[CutRule, Base]]:
        """What the round would end with by each of several rules, made when it is asked for.

        A draft is on disk, so that farms can be asked about it, and not on record. A rule by which
        nothing would go has none.
        """
        learned = self._learned(run, work, rules)
        for rule in rules:
            end = self._end(run, work, learned, rule)
            if end.mask != work.base.mask:
                self._store.keep_mask(end.mask.to_json())
                yield rule, Base(end.digest, end.mask)

    def _learned(self, run: int, work: Work, rules: Sequence[CutRule]) -> "_Learned":
        """What the replies of a round come to, ready to be cut by any of the rules."""
        replies = self._store.replies(run, work.number)
        readers = [self._spool.open(row.spooled) for row in replies]
        model, spec = self._models.load(work.base.digest)
        trained = self._trained(model, work.base.mask)
        update, change, lost = self._update(run, work, replies, readers, trained)
        trained.add(model, change)
        agreed, scores = self._consensus(run, work, replies, readers, spec)
        compensated = agreed is not None and any(one.compensation != "none" for one in rules)
        moments = self._moments(model, spec, work, replies, readers) if compensated else None
        spared, plan = agreed, self._config.plan
        spares = any(plan.spares_redundant(one.compensation) for one in rules)
        if agreed is not None and moments is not None and spares:
            spared = irreplaceable(agreed, model, moments)
        return _Learned(
            model, spec, replies, trained, update, lost, agreed, spared, scores, moments
        )

    def _end(self, run: int, work: Work, learned: "_Learned", rule: CutRule | None) -> "_End":
        """The round's end by a rule, on disk."""
        model, spec, mask, scores = learned.model, learned.spec, work.base.mask, learned.scores
        lost, cut = learned.lost, None
        spares = rule is not None and self._config.plan.spares_redundant(rule.compensation)
        counted = learned.spared if spares else learned.agreed
        if rule is not None and counted is not None:
            scores = [gone_by(row, counted) for row in scores]
            mask = self._choose(run, counted, mask, rule.budget)
        if rule is not None and mask != work.base.mask:
            model, spec, cut = self._cut(learned, work.base, mask, rule)
            after = self._trained(model, mask)
            lost = left_after(lost, learned.trained, learned.spec, cut.keep, after)
        digest = self._models.save(model, spec, Step(learned.update, cut).to_bytes())
        return _End((model, spec), digest, mask, scores, lost)

    def _trained(self, model: VisionTransformer, mask: Mask) -> TrainableSet:
        train = self._config.train_under(mask)
        return trainable_set(model, train.trainable, train.rank)

    def restore(self, run: int, number: int, base: Base, verdict: VerdictRow) -> Base:
        """End a round whose verdict undoes a cut: ``base``, of before the cut, comes back.

        What farms sent in this round stands on the undone backbone and is thrown away.
        """
        model, spec = self._models.view(base.digest)
        candidate = self._candidate(model, spec, base.digest, base.digest, base.mask)
        replies = self._store.replies(run, number)
        self._commit(run, number, candidate, base.mask, replies, [], verdict)
        return base

    def _commit(
        self,
        run: int,
        number: int,
        candidate: CandidateRow,
        mask: Mask,
        replies: Sequence[ReplyRow],
        scores: Sequence[ScoreRow],
        verdict: VerdictRow | None,
    ) -> None:
        """Put the end of a round on record, and let its spooled replies go."""
        judged = list(accuracies(replies).values())
        self._store.commit_round(
            run,
            number,
            candidate=candidate,
            mask_json=mask.to_json(),
            scores=scores,
            macs_ratio=candidate.macs / backbone.macs(self._dense),
            heads_kept_ratio=mask.heads_kept_ratio,
            mean_accuracy=float(np.mean(judged)) if judged else None,
            verdict=verdict,
        )
        self._spool.discard_round(run, number)

    def _candidate(
        self, model: Network, spec: Spec, digest: str, parent: str, mask: Mask
    ) -> CandidateRow:
        return CandidateRow(
            digest=digest,
            parent=parent,
            mask=mask.digest,
            spec_json=spec.to_json(),
            macs=networks.macs(spec),
            params=backbone.parameters(model),
            path=str(self._models.path(digest)),
        )

    def _update(
        self,
        run: int,
        work: Work,
        replies: Sequence[ReplyRow],
        readers: Sequence[ReplyReader],
        trained: TrainableSet,
    ) -> tuple[codec.Bytes, codec.Floats, codec.Floats]:
        """The aggregate coded as farms code theirs, what every farm will add, and what is lost."""
        count, base = trained.layout.count, work.base.digest
        train = self._config.train_under(work.base.mask)
        merged = self._merged(replies, readers, count)
        rest = self._residuals.load(run, base, count) if train.error_feedback else None
        if rest is not None:
            merged = merged + rest
        few = train.update_bits < codec.DEFAULT_BITS
        rng = np.random.default_rng([self._config.seed, work.number]) if few else None
        update = codec.encode(merged, base, bits=train.update_bits, rng=rng, rank=trained.rank)
        change = codec.decode(update, base=base, count=count)
        return update, change, merged - change

    def _merged(
        self, replies: Sequence[ReplyRow], readers: Sequence[ReplyReader], count: int
    ) -> codec.Floats:
        """What the farms learned together, fp32 (n,), as the rules of this server have it."""
        rules = self._config.rounds
        return aggregate(
            readers,
            [row.examples * self._freshness(row) for row in replies],
            count=count,
            clip=rules.clip,
            rule=rules.aggregation,
            liars=rules.liars,
        )

    def _freshness(self, row: ReplyRow) -> float:
        """Weight of a reply by its age (FedAsync, Xie et al., 2019): (1 + rounds late)^-a."""
        return float((1 + row.round - row.of_round) ** -self._config.rounds.staleness_exponent)

    # --- consensus -------------------------------------------------------------------------

    def _consensus(
        self,
        run: int,
        work: Work,
        replies: Sequence[ReplyRow],
        readers: Sequence[ReplyReader],
        spec: ModelSpec,
    ) -> tuple[UnitScores | None, list[ScoreRow]]:
        """What the farms agree on, where they scored, and what goes on record of it."""
        sent = replied_scores(replies, readers) if work.scored else {}
        farms = self._score(run, sent, spec)
        agreed = self._agree(replies, farms)
        return agreed, score_rows(agreed, farms, sent, replies, work.base.mask)

    def _score(
        self, run: int, sent: Mapping[int, ReplyScores], spec: ModelSpec
    ) -> dict[int, UnitScores]:
        """Each farm's scores by node."""
        if not sent:
            return {}
        tau, exponent = self._scale(run, sent)
        return {
            node: farm_scores(
                part.head_importance,
                part.head_mmd2,
                decode_neurons(part.neuron_importance, sum(spec.neurons)),
                tau=tau,
                exponent=exponent,
                spec=spec,
            )
            for node, part in sent.items()
        }

    def _scale(self, run: int, sent: Mapping[int, ReplyScores]) -> tuple[float, float]:
        """tau, frozen at the run's first score round, and the exponent of the invariance."""
        tau = self._store.tau(run)
        if tau is None:
            tau = median_tau([part.head_mmd2 for part in sent.values()])
            self._store.freeze_tau(run, tau)
        return tau, self._config.plan.invariance_exponent

    def _agree(
        self, replies: Sequence[ReplyRow], farms: dict[int, UnitScores]
    ) -> UnitScores | None:
        if not farms:
            return None
        plan = self._config.plan
        weighed = [(row.examples, farms[row.node]) for row in replies if row.node in farms]
        kappa = plan.kappa if self._counts_maximum else 0.0
        return consensus(weighed, kappa=kappa, rule=plan.consensus)

    @property
    def _counts_maximum(self) -> bool:
        """One liar is enough for a maximum, and so is the noise of one farm.

        Where farms are not trusted, or hide their scores, it counts for nothing.
        """
        private = self._config.privacy
        hidden = private is not None and private.score_noise > 0
        return self._config.plan.consensus == "mean" and not hidden

    def _moments(
        self,
        model: VisionTransformer,
        spec: ModelSpec,
        work: Work,
        replies: Sequence[ReplyRow],
        readers: Sequence[ReplyReader],
    ) -> Moments | None:
        """On source images, where there are some, and with what farms sent of theirs."""
        found = None
        if self._source is not None:
            neurons = self._config.plan.cuts_neurons
            found = collect_moments(model, self._source(spec), neurons, bf16_supported())
        if work.moments is None:
            return found
        bodies = (reader.optional("moments") for reader in readers)
        sent = (body for body in bodies if body is not None)
        return with_farms(found, sent, spec, work.moments, [row.examples for row in replies])

    def _choose(self, run: int, agreed: UnitScores, before: Mask, budget: Budget) -> Mask:
        """The mask of a prune event; one that was undone in this run is not tried again."""
        mask = choose_mask(agreed, before, self._dense, budget)
        undone = {row.mask for row in self._store.verdicts(run) if not row.accepted}
        if mask.digest in undone:
            log.warning("the same mask was undone before; nothing is removed")
            return before
        return mask

    # --- prune event -----------------------------------------------------------------------

    def _cut(
        self, learned: "_Learned", base: Base, after: Mask, rule: CutRule
    ) -> tuple[VisionTransformer, ModelSpec, Cut]:
        """What is left of the backbone, compensated as every farm will compensate it."""
        model, spec, moments = learned.model, learned.spec, learned.moments
        keep = after.keep_in(base.mask)
        pruned, pruned_spec = prune(model, spec, keep)
        compensated = pruned
        if moments is not None and rule.compensation != "none":
            compensated, _ = prune_compensated(model, spec, keep, moments, rule.compensation)
        cut = Cut.between(pruned, compensated, keep, base.digest)
        cut.compensate(pruned)
        return pruned, pruned_spec, cut

    def _keep_anchors(self, end: "_End") -> None:
        """Of what is left after a cut, where there are source images."""
        if self._source is not None:
            model, spec = end.network
            seed, coral = self._config.seed, self._config.train.dal == "coral"
            anchors = compute_anchors(model, self._source(spec), seed, coral, bf16_supported())
            self._models.save_anchors(end.mask.digest, anchors)


@dataclass(frozen=True, eq=False)
class _Learned:
    """A round's replies as one: the backbone with their update, and what they agree on.

    ``spared`` is that, less what other units can say instead, where a rule asks for it.
    """

    model: VisionTransformer
    spec: ModelSpec
    replies: Sequence[ReplyRow]
    trained: TrainableSet
    update: codec.Bytes
    lost: codec.Floats
    agreed: UnitScores | None
    spared: UnitScores | None
    scores: Sequence[ScoreRow]
    moments: Moments | None


@dataclass(frozen=True, eq=False)
class _End:
    """What a round ends with: a network under a mask, and what its update could not say."""

    network: tuple[VisionTransformer, ModelSpec]
    digest: str
    mask: Mask
    scores: Sequence[ScoreRow]
    lost: codec.Floats
