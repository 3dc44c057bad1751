"""Criteria: the ways to score heads and neurons, one function each, all with one typed record.

| name        | a unit's score                                                   | it costs    |
|-------------|------------------------------------------------------------------|-------------|
| `taylor`    | mean of abs(dL/dg * g) over the farm's images (client/scores.py) | one pass    |
| `taha`      | the same, and the server multiplies heads by invariance^a        | one pass    |
| `l1gates`   | a gate learned on the farm under L1 pressure (client/gates.py)   | some passes |
| `magnitude` | the norm of its weights in the shared backbone                   | nothing     |
| `random`    | drawn anew in every round, the same on every farm                | nothing     |

To add one: write a function from :class:`Scoring` to :class:`FarmScores`, enter it in ``CRITERIA``
and its name in ``common.plan.Criterion``; consensus, mask, report and the tests of all criteria
take it from there. Farms of an older release cannot be asked for it: common/protocols.py says what
that needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from client import gates
from client.scores import FarmScores, normalised, score_units
from common.anchors import Anchors
from common.backbone import block_layers
from common.images import Part
from common.plan import Criterion
from common.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Scoring:
    """What a criterion may look at; it leaves all of it as found.

    ``seed`` is that of the run and the round, the same on every farm.
    """

    model: VisionTransformer
    spec: ModelSpec
    classifier: nn.Linear
    part: Part
    batch_size: int
    anchors: Anchors | None
    seed: int
    autocast: bool


def score(criterion: Criterion, scoring: Scoring) -> FarmScores:
    """Scores of every head and neuron of the backbone by a criterion.

    Raises:
        DataError: no image can be read.
        ModelError: the scores are not finite.
    """
    return CRITERIA[criterion](scoring)


def taylor(scoring: Scoring) -> FarmScores:
    """First-order importance per image, and each head's distance from the source."""
    batches = scoring.part.batches(scoring.spec, scoring.batch_size)
    return score_units(
        scoring.model, scoring.classifier, batches, scoring.anchors, autocast=scoring.autocast
    )


def l1gates(scoring: Scoring) -> FarmScores:
    """Learned importance gates (EffiSelecViT)."""
    learned = gates.learn(
        scoring.model,
        scoring.classifier,
        scoring.part,
        scoring.spec,
        batch_size=scoring.batch_size,
        seed=scoring.seed,
        autocast=scoring.autocast,
    )
    return _record([g[0] for g in learned.heads], [g[0] for g in learned.neurons])


def magnitude(scoring: Scoring) -> FarmScores:
    """L2 norm of all weights that go with a unit: rows into it and columns out of it."""
    heads, neurons = [], []
    with torch.no_grad():
        for block in block_layers(scoring.model):
            shape = block.attn.num_heads, block.attn.head_dim, block.attn.qkv.in_features
            rows = block.attn.qkv.weight.reshape(3, *shape).square().sum((0, 2, 3))
            columns = block.attn.proj.weight.T.reshape(shape).square().sum((1, 2))
            heads.append((rows + columns).sqrt())
            squares = block.fc1.weight.square().sum(1) + block.fc2.weight.square().sum(0)
            neurons.append(squares.sqrt())
    return _record(heads, neurons)


def draw(scoring: Scoring) -> FarmScores:
    """What any other criterion has to beat."""
    rng = np.random.default_rng(scoring.seed)
    spec = scoring.spec
    heads, neurons = (rng.random(sum(counts)) for counts in (spec.heads, spec.neurons))
    return _record([torch.from_numpy(heads)], [torch.from_numpy(neurons)])


def _record(heads: list[Tensor], neurons: list[Tensor]) -> FarmScores:
    """Scores of all blocks as a record without distances."""
    flat = normalised([block.double() for block in heads])
    return FarmScores(flat, np.zeros_like(flat), normalised([block.double() for block in neurons]))


CRITERIA: Mapping[Criterion, Callable[[Scoring], FarmScores]] = {
    "taylor": taylor,
    "taha": taylor,
    "l1gates": l1gates,
    "magnitude": magnitude,
    "random": draw,
}
