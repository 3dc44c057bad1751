"""Does the shared backbone lack heads that this farm needs? A newcomer had no say when they went.

A head that is gone can be scored only in a backbone that still has it: one of before a cut, which a
farm that was there keeps (client/state.py), or the server's ``base.safetensors``, which an operator
hands over. It is scored as for a prune event, on this farm's own fit images with its own classifier
fitted to that backbone; nothing leaves the farm.

A head that is gone is *needed* where this farm alone, asked to keep as many of the heads as were
kept, would have kept it, and it is worth more to the farm than the mean head. That is said of each
head by itself: what other heads learned to say in its place since then shows in accuracy alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from client.base import Base, classifier_of
from client.criteria import Scoring, score
from client.state import FarmState
from common import backbone
from common.errors import ConfigError, StateError
from common.images import FarmFolder
from common.mask import Mask
from common.plan import Criterion
from common.removals import Removals, RemovedHead
from common.spec import ModelSpec

BATCH = 16


@dataclass(frozen=True)
class Needed:
    """A head that is gone and that this farm would have kept.

    ``score`` is over that of the mean head, ``rank`` from 1, both this farm's own.
    """

    block: int
    head: int
    score: float
    rank: int
    together: RemovedHead


@dataclass(frozen=True)
class Needs:
    """What was found: ``heads`` were scored in backbone ``base``, ``kept`` of them are left.

    ``judged`` is how many of the heads that are gone could be scored; ``unjudged`` how many were
    gone from that backbone, too. ``agreement`` is the share of this farm's own score that is left.
    """

    base: str
    criterion: Criterion
    heads: int
    kept: int
    judged: int
    unjudged: int
    agreement: float
    needed: tuple[Needed, ...]

    def words(self) -> str:
        """For people."""
        lines = [f"{self._count()} that this farm needs gone, of {self.judged} that were judged"]
        lines += [
            f"  block {one.block} head {one.head}: {one.score:.2f} times the mean head and "
            f"{one.rank} of {self.heads} to this farm; {_together(one.together)}"
            for one in self.needed
        ]
        lines.append(
            f"{100 * self.agreement:.0f} % of what the heads are worth to this farm is left in "
            f"{self.kept} of {self.heads} ({self.criterion}, in backbone {self.base[:12]})"
        )
        if self.unjudged:
            lines.append(
                f"{self.unjudged} more were gone from that backbone, too: they can be judged in "
                "the server's base.safetensors only, given with --dense"
            )
        if self.needed:
            lines.append(
                "tell the server's operator; what it costs shows 'fieldfed-client evaluate'"
            )
        return "\n".join(lines)

    def as_json(self) -> str:
        """For programs."""
        parts = asdict(self) | {"needed": [asdict(one) | _dumped(one) for one in self.needed]}
        return json.dumps(parts, indent=2, sort_keys=True)

    def _count(self) -> str:
        count = len(self.needed)
        return "no head" if not count else "one head" if count == 1 else f"{count} heads"


def _dumped(one: Needed) -> dict[str, object]:
    return {"together": one.together.model_dump(exclude={"block", "head"})}


def _together(head: RemovedHead) -> str:
    gone = f"removed after round {head.round}"
    if head.rank is None:
        return f"{gone}, when nobody had scored it"
    return f"{head.rank} of {head.heads} to all farms together, {gone}"


def needs(
    removals: Removals, folder: FarmFolder, state: FarmState, dense: Path | None = None
) -> Needs:
    """Compare what this farm would have kept with what was kept.

    Args:
        removals: what was removed.
        folder: this farm's images.
        state: holds backbones and classifiers of this farm.
        dense: a backbone of before the cuts; None: the one on this device that has most heads.

    Raises:
        StateError: no backbone at hand has a head that is gone; says what to do.
        ConfigError: ``dense`` is no backbone of that run from before a cut.
        ModelError, DataError: a file or the images cannot be read.
    """
    digest, model, spec = _backbone(removals, state, dense)
    mask = removals.carried()[digest]
    criterion: Criterion = "l1gates" if removals.criterion == "l1gates" else "taylor"
    scoring = Scoring(
        model=model,
        spec=spec,
        classifier=classifier_of(state, folder, Base(model, spec, digest)),
        part=folder.fit,
        batch_size=BATCH,
        anchors=None,
        seed=0,
        autocast=False,
    )
    importance = score(criterion, scoring).head_importance
    return compared(removals, mask, importance.tolist(), digest, criterion)


def compared(
    removals: Removals, mask: Mask, worth: Sequence[float], base: str, criterion: Criterion
) -> Needs:
    """What is needed, from the worth of every head of ``mask``, block behind block."""
    now, values = removals.kept, np.array(worth, dtype=np.float64)
    units = [(block, head) for block, kept in enumerate(mask.heads) for head in kept]
    left = np.array([head in now.heads[block] for block, head in units])
    over_mean = values / values.mean() if values.sum() > 0 else np.ones_like(values)
    order = np.argsort(-values, kind="stable")
    ranks = np.empty(len(units), dtype=np.int64)
    ranks[order] = np.arange(1, len(units) + 1)
    told = {(one.block, one.head): one for one in removals.removed}
    found = [
        Needed(block, head, float(over_mean[at]), int(ranks[at]), told[block, head])
        for at, (block, head) in ((at, units[at]) for at in order.tolist())
        if not left[at] and ranks[at] <= left.sum() and over_mean[at] > 1
    ]
    judged = int((~left).sum())
    return Needs(
        base=base,
        criterion=criterion,
        heads=len(units),
        kept=int(left.sum()),
        judged=judged,
        unjudged=len(removals.removed) - judged,
        agreement=float(over_mean[left].sum() / over_mean.sum()),
        needed=tuple(found),
    )


def _backbone(
    removals: Removals, state: FarmState, dense: Path | None
) -> tuple[str, VisionTransformer, ModelSpec]:
    carried = removals.carried()
    if dense is not None:
        model, spec = backbone.load_backbone(dense)
        digest = backbone.digest(model, spec)
        if digest not in carried:
            raise ConfigError(
                f"'{dense}' is not what run {removals.run} of network {removals.network} had "
                "before a cut; take base.safetensors from that server's folder"
            )
        return digest, model, spec
    here = [digest for digest in state.held() if digest in carried]
    for digest in sorted(here, key=lambda one: -sum(map(len, carried[one].heads))):
        held = state.load_backbone(digest, touch=False)
        if held is not None:
            return digest, *held
    raise StateError(
        "no backbone on this device still has the heads that are gone, so they cannot be scored: "
        "have the server's operator hand over base.safetensors from the server's folder, and give "
        "it with --dense base.safetensors"
    )
