"""Local alignment: a farm trains its copy of the backbone on its own species.

    loss = cross-entropy + lambda * DAL + (mu/2) * ||w - w_global||^2 + self-distillation

DAL pulls what every attention head produces towards what it produced on the source species
(common/anchors.py); the proximal term is FedProx (Li et al., 2020) over the trained weights only;
self-distillation follows a cut (client/teacher.py).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from client.teacher import Teacher, teaching
from common.anchors import Anchors, domain_alignment_loss
from common.codec import Floats
from common.config import TrainConfig
from common.fit import train_epochs
from common.heads import tap_heads
from common.images import Part
from common.spec import ModelSpec
from common.trainable import TrainableSet, factors, trainable_set


@dataclass(frozen=True, eq=False)
class Aligned:
    """What local training changed.

    ``delta``: trained minus start, float32 (n,), laid out as ``trained`` says
    (common/trainable.py). ``loss`` is the mean objective of the last epoch, ``dal`` its mean
    domain alignment loss before weighting (0 when it is off; being unbiased, the MMD may be
    slightly negative).
    """

    trained: TrainableSet
    delta: Floats
    loss: float
    dal: float
    steps: int
    seconds: float


def align(
    model: VisionTransformer,
    classifier: nn.Linear,
    part: Part,
    spec: ModelSpec,
    config: TrainConfig,
    anchors: Anchors | None,
    *,
    seed: int,
    autocast: bool,
    epochs: int | None = None,
    max_steps: int | None = None,
    teacher: Teacher | None = None,
) -> Aligned:
    """Train ``config.trainable`` of a backbone, and its classifier, on a farm's fit part.

    Args:
        model: left trained, factors of ``lora`` merged; the caller owns it.
        classifier: private (C) -> (K); left trained along.
        part: the fit part.
        spec: of the model.
        config: rates, epochs, lambda (``dal_weight``), mu (``proximal``).
        anchors: of the source species for this very mask; ``None`` turns DAL off.
        seed: of order and augmentation; the same seed gives the same delta.
        autocast: forward in bfloat16.
        epochs: instead of ``config.epochs``.
        max_steps: ends earlier.
        teacher: of self-distillation (``self_distil``); None: none.

    Raises:
        QualityError: the loss is no longer finite.
        DataError: none of the images can be read.
    """
    chosen = trainable_set(model, config.trainable, config.rank)
    names = chosen.layout.names
    passes = config.epochs if epochs is None else epochs
    use_dal = anchors is not None and config.dal_weight > 0
    with ExitStack() as stack:
        if chosen.rank:
            stack.enter_context(factors(model, chosen.rank))
        parameters = dict(model.named_parameters())
        start = {name: parameters[name].detach().clone() for name in names}
        heads = stack.enter_context(tap_heads(model)) if use_dal else []
        penalty = _Penalty(config, heads, anchors if use_dal else None, parameters, start)
        if teacher is not None and config.self_distil > 0:
            penalty.taught = stack.enter_context(
                teaching(
                    model,
                    classifier,
                    teacher,
                    weight=config.self_distil,
                    temperature=config.self_distil_temperature,
                    autocast=autocast,
                )
            )
        log = train_epochs(
            model,
            classifier,
            part,
            spec,
            config,
            trainable=names,
            seed=seed,
            autocast=autocast,
            penalty=penalty if penalty.counts else None,
            epochs=passes,
            max_steps=max_steps,
        )
        changes = {name: parameters[name].detach() - start[name] for name in names}
    delta = chosen.layout.flatten(changes)
    chosen.merge(model, delta)
    last = penalty.seen[-max(1, log.steps // passes) :]
    dal = float(torch.stack(last).mean()) if last else 0.0
    return Aligned(chosen, delta, log.loss, dal, log.steps, log.seconds)


class _Penalty:
    """lambda * DAL + (mu/2) * ||w - w_global||^2 + ``taught`` of the last forward pass."""

    def __init__(
        self,
        config: TrainConfig,
        heads: list[Tensor],
        anchors: Anchors | None,
        parameters: dict[str, nn.Parameter],
        start: dict[str, Tensor],
    ) -> None:
        self._config = config
        self._heads = heads
        self._anchors = anchors
        self._pairs = [(parameters[name], start[name]) for name in start]
        self.seen: list[Tensor] = []
        self.taught: Callable[[], Tensor] | None = None

    @property
    def counts(self) -> bool:
        """Whether there is anything to add."""
        some = self._anchors is not None or self.taught is not None
        return some or self._config.proximal > 0

    def __call__(self) -> Tensor:
        total = torch.zeros(())
        # unreadable images may leave a single one in a batch, which has no variance
        if self._anchors is not None and len(self._heads[0]) > 1:
            dal = domain_alignment_loss(self._heads, self._anchors, kind=self._config.dal)
            self.seen.append(dal.detach())
            total = total + self._config.dal_weight * dal
        if self._config.proximal > 0:
            moved = torch.stack([(now - before).square().sum() for now, before in self._pairs])
            total = total + self._config.proximal / 2 * moved.sum()
        if self.taught is not None:
            total = total + self.taught()
        return total
