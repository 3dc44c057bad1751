"""What a farm says about every head and neuron: how much it matters here, how far it has moved.

Importance is first-order Taylor (Molchanov et al., "Importance Estimation for Neural Network
Pruning", 2019; Michel et al., 2019) taken per image, so that images which pull a unit in opposite
directions do not cancel: E |dL/dg * g| at gates g = 1. Heads and neurons come from the same single
backward pass. Beside it stands the squared MMD of each head to the source's anchors.

Shapes: B images, C channels of a feature vector, K classes, U heads, V neurons of all blocks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.anchors import Anchors, Statistics, pooled_mmd2, tap_features
from common.errors import DataError, ModelError
from common.heads import Gates, evaluation_mode, gate_units, tap_heads
from common.precision import bfloat16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FarmScores:
    """Scores of one farm, float32, in block order.

    ``head_importance`` (U,) and ``neuron_importance`` (V,) each sum to 1; ``head_mmd2`` (U,) is
    unbiased, so it may be slightly negative.
    """

    head_importance: Floats
    head_mmd2: Floats
    neuron_importance: Floats


def score_units(
    model: VisionTransformer,
    classifier: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    anchors: Anchors | None,
    *,
    autocast: bool = False,
) -> FarmScores:
    """Score every unit on a farm's images with one forward and one backward pass of each.

    Args:
        model: the backbone, (B,3,S,S) -> (B,C). It and the classifier are left as found.
        classifier: (B,C) -> (B,K), fitted to the backbone.
        batches: images (B,3,S,S) and labels (B,); results do not depend on how they are cut.
        anchors: of the same backbone; without them ``head_mmd2`` is zero.
        autocast: forward in bfloat16; sums stay in full precision.

    Raises:
        DataError: no images, or one image only where anchors are given.
        ModelError: the scores are not finite.
        ProtocolError: the anchors describe other heads.
    """
    device = next(model.parameters()).device
    totals: list[Tensor] = []
    statistics, images_seen = Statistics(), 0
    with evaluation_mode(model, classifier), without_gradients(model, classifier):
        for images, labels in batches:
            with bfloat16(device, autocast):
                importance, taps = _score_batch(
                    model, classifier, images.to(device), labels.to(device)
                )
            totals = list(map(torch.add, totals, importance)) if totals else importance
            images_seen += len(images)
            if anchors is not None:
                statistics.add(tap_features(taps, anchors))
    if images_seen == 0:
        raise DataError("no images to score heads and neurons on; check the farm's image folder")
    depth = len(totals) // 2
    heads, neurons = normalised(totals[:depth]), normalised(totals[depth:])
    mmd2 = np.zeros_like(heads)
    if anchors is not None:
        mmd2 = pooled_mmd2(statistics, anchors).float().cpu().numpy()
    return FarmScores(heads, mmd2, neurons)


def _score_batch(
    model: VisionTransformer, classifier: nn.Module, images: Tensor, labels: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Importance summed over the batch, heads then neurons per block in float64; and the taps."""
    gates = Gates.ones(model, len(images), requires_grad=True)
    with torch.enable_grad(), gate_units(model, gates), tap_heads(model) as taps:
        # Summed, not averaged: each row of the gradient is then its own image's.
        loss = functional.cross_entropy(classifier(model(images)).float(), labels, reduction="sum")
        at = [*gates.heads, *gates.neurons]
        gradients = torch.autograd.grad(loss, at)
    return (
        [(d * g).detach().abs().double().sum(0) for d, g in zip(gradients, at, strict=True)],
        [z.detach() for z in taps],
    )


@contextmanager
def without_gradients(*modules: nn.Module) -> Iterator[None]:
    """Only the gates need a graph; without weights in it, it is smaller."""
    found = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        for parameter, _ in found:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in found:
            parameter.requires_grad_(flag)


def normalised(blocks: list[Tensor]) -> Floats:
    """Blocks joined and divided by their sum; all equal where nothing has any influence.

    Raises:
        ModelError: they are not finite.
    """
    flat = torch.cat(blocks)
    total = flat.sum()
    if not torch.isfinite(total):
        raise ModelError(
            "importance scores are not finite: the backbone or the classifier has diverged on this "
            "farm; start the round again from the shared backbone"
        )
    share = flat / total if total > 0 else torch.full_like(flat, 1 / len(flat))
    return share.float().cpu().numpy()
