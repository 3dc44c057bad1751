"""A farm makes the shared backbone its own: for a newcomer, whose species had no say in the cuts.

A fuller backbone, one of before a cut, is trained for some rounds on this farm alone; then what is
left of the shared one is told, in closed form, what that one says of this farm's images
(common/reconstruction.py). So few images are learned from where there is room for it, and no
gradient touches what the cuts have left. A farm that was there keeps such a backbone; another gets
one from the server's operator. What comes of it stays on the farm: it is no base of the network's
rounds.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from client.align import align
from client.base import Base
from client.state import FarmState
from client.teacher import is_whole
from common import backbone, fit
from common.config import TrainConfig
from common.errors import StateError
from common.images import FarmFolder
from common.reconstruction import reconstruct
from common.spec import ModelSpec

log = logging.getLogger(__name__)

ROUNDS = 3
BATCH = 32
_HAND_OVER = (
    "have the server's operator write one with 'fieldfed-server mask export --dense "
    "dense.safetensors', and give it with --dense dense.safetensors"
)


@dataclass(frozen=True, eq=False)
class Adapted:
    """A backbone that is this farm's own, its classifier, and how often both are right.

    ``shared`` and ``accuracy`` are shares of the decide part, before and after.
    """

    model: VisionTransformer
    spec: ModelSpec
    classifier: nn.Linear
    shared: float
    accuracy: float


def adapt(
    base: Base,
    folder: FarmFolder,
    fuller: tuple[VisionTransformer, ModelSpec] | None,
    *,
    rounds: int = ROUNDS,
    train: TrainConfig | None = None,
    seed: int = 0,
    autocast: bool = False,
) -> Adapted:
    """Fit a backbone to a farm's fit part; ``base`` and ``fuller`` stay as they are.

    Args:
        base: what the network has; a backbone.
        folder: the farm's images.
        fuller: learns, and tells ``base``; None: ``base`` itself learns, for nothing of it was cut.
        rounds: of training, as long as the network's.
        train: how a round trains; None: the defaults.
        seed: of order and augmentation.
        autocast: train in bfloat16.

    Raises:
        ModelError: ``base`` is a student, or ``fuller`` another network.
        DataError: no image can be read.
        QualityError: training diverged.
    """
    shared, spec = base.transformer()
    classifier, before = _judged("as all share it", shared, spec, folder)
    learner, its_spec = (shared, spec) if fuller is None else fuller
    learner, after = copy.deepcopy(learner), before
    if fuller is not None:
        classifier, _ = _judged("what is to tell it", learner, its_spec, folder)
    for number in range(1, rounds + 1):
        align(
            *(learner, classifier, folder.fit, its_spec, train or TrainConfig(), None),
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            autocast=autocast,
        )
        classifier, after = _judged(f"round {number} of {rounds}", learner, its_spec, folder)
    if fuller is None:
        return Adapted(learner, spec, classifier, before, after)
    model = copy.deepcopy(shared)
    batches = (images for images, _ in folder.fit.batches(spec, BATCH))
    reconstruct(model, spec, learner, its_spec, batches)
    classifier, after = _judged("told so", model, spec, folder)
    return Adapted(model, spec, classifier, before, after)


def fuller_than(
    base: Base, state: FarmState, dense: Path | None
) -> tuple[VisionTransformer, ModelSpec] | None:
    """The backbone with most heads and neurons that is at hand; None where ``base`` lost none.

    Args:
        base: of the network.
        state: of the farm, which keeps what was before the last cut.
        dense: a file instead.

    Raises:
        ModelError: the file cannot be read.
        StateError: none at hand is fuller than ``base``; says what to do.
    """
    _, spec = base.transformer()
    if is_whole(spec):
        return None
    if dense is not None:
        held = backbone.load_backbone(dense)
        if backbone.macs(held[1]) <= backbone.macs(spec):
            raise StateError(
                f"'{dense}' has no more heads and neurons than what is here; {_HAND_OVER}"
            )
        return held
    found = [state.load_backbone(digest, touch=False) for digest in state.backbones()]
    at_hand = [one for one in found if one is not None and _same_network(one[1], spec)]
    best = max(at_hand, key=lambda one: backbone.macs(one[1]), default=None)
    if best is None or backbone.macs(best[1]) <= backbone.macs(spec):
        raise StateError(f"no backbone of before a cut is on this device: {_HAND_OVER}")
    return best


def _same_network(one: ModelSpec, other: ModelSpec) -> bool:
    kinds = [(spec.name, spec.image_size, spec.options) for spec in (one, other)]
    return kinds[0] == kinds[1]


def _judged(
    step: str, model: VisionTransformer, spec: ModelSpec, folder: FarmFolder
) -> tuple[nn.Linear, float]:
    """A classifier that fits the backbone, and the share of the decide part they get right."""
    classifier = fit.fit_classifier(*fit.extract(model, folder.fit, spec), len(folder.classes))
    accuracy = fit.evaluate(classifier, *fit.extract(model, folder.decide, spec)).accuracy
    log.info("%s: right about %.3f of the decide part", step, accuracy)
    return classifier, accuracy
