"""Importance gates learned under L1 pressure (EffiSelecViT), on heads and MLP neurons.

Every unit's output is multiplied by a gate g, 1 at first. The backbone and the classifier stand
still; the gates follow

    cross-entropy + pressure * (mean |g| over heads + mean |g| over neurons)

so a unit keeps its gate as far as the farm's images hold it up. What is left of |g| is the score.
The published code stops at multiplying by 0 or 1; here the scores of many farms are averaged, and
the mask that follows removes units physically (common/budget.py, common/surgery.py), with an exact
count, at least one head per block, and every tie broken the same way everywhere.
"""

import itertools

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from client.scores import without_gradients
from common.errors import DataError
from common.heads import Gates, evaluation_mode, gate_units
from common.images import Part
from common.precision import bfloat16
from common.spec import ModelSpec

EPOCHS = 3
LEARNING_RATE = 0.02
PRESSURE = 1.0


def learn(
    model: VisionTransformer,
    classifier: nn.Linear,
    part: Part,
    spec: ModelSpec,
    *,
    batch_size: int,
    seed: int,
    autocast: bool = False,
    pressure: float = PRESSURE,
    epochs: int = EPOCHS,
) -> Gates:
    """Gates (1,H) and (1,M) of every block after some passes over a part; not negative.

    Args:
        model: the backbone, left as found.
        classifier: fitted to the backbone, left as found.
        part: images, augmented.
        spec: of the model.
        batch_size: images per step.
        seed: of order and augmentation.
        autocast: forward in bfloat16.
        pressure: weight of the mean gate.
        epochs: passes over the part.

    Raises:
        DataError: none of the images can be read.
    """
    gates = Gates.ones(model, requires_grad=True)
    learned = [*gates.heads, *gates.neurons]
    optimiser = torch.optim.Adam(learned, lr=LEARNING_RATE)
    device = next(model.parameters()).device
    steps = 0
    with evaluation_mode(model, classifier), without_gradients(model, classifier):
        for images, labels in itertools.chain.from_iterable(
            part.batches(spec, batch_size, train=True, seed=seed + epoch) for epoch in range(epochs)
        ):
            with (
                torch.enable_grad(),
                bfloat16(device, autocast),
                gate_units(model, gates),
            ):
                logits = classifier(model(images.to(device)))
            loss = functional.cross_entropy(logits.float(), labels.to(device))
            loss = loss + pressure * (_mean(gates.heads) + _mean(gates.neurons))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            steps += 1
    if not steps:
        raise DataError("no images to learn gates on; check the farm's image folder")
    return Gates(*([g.detach().abs() for g in kind] for kind in (gates.heads, gates.neurons)))


def _mean(gates: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gates]).abs().mean()
