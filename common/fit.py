"""Features, the classifier fitted to them, evaluation, and the epoch loop.

Every accuracy in this project is that of one solver, :func:`fit_classifier`, on the features of a
backbone; being convex, it has one answer and needs no seed.

Shape legend: N images, C feature width, K classes, B batch.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config import TrainConfig
from common.errors import DataError, QualityError
from common.images import Part
from common.pixels import Input
from common.precision import bfloat16

# Chosen on the decide parts of the development species (apple, grape, mango, pepper_bell, potato):
# accuracy is flat from 1e-4 to 1e-2 and falls above; of the flat range the largest, because a
# classifier that is less sure of its training images leaves more gradient to align and score by.
DEFAULT_L2 = 1e-2
CLIP_NORM = 1.0
WARM_UP_STEPS = 5


# --- features and classifier --------------------------------------------------------------------


def extract(
    model: nn.Module, part: Part, spec: Input, *, batch_size: int = 64, autocast: bool = False
) -> tuple[Tensor, Tensor]:
    """Features (N,C) float32 and labels (N,) int64 of a part, without augmentation, on the CPU.

    Args:
        model: backbone without classifier.
        part: images that cannot be read are left out of both tensors.
        spec: names image side, mean and standard deviation.
        batch_size: images in memory at once.
        autocast: run the forward pass in bfloat16.

    Raises:
        DataError: not one image could be read.
    """
    device = next(model.parameters()).device
    features, labels = [], []
    with _mode(model, training=False), torch.inference_mode():
        for images, target in part.batches(spec, batch_size):
            with bfloat16(device, autocast):
                features.append(model(images.to(device)).float().cpu())
            labels.append(target)
    if not features:
        where = f" (first: '{part.paths[0]}')" if part.paths else ""
        raise DataError(f"none of the {len(part)} images could be read{where}")
    return torch.cat(features), torch.cat(labels)


def fit_classifier(
    features: Tensor, labels: Tensor, classes: int, l2: float = DEFAULT_L2
) -> nn.Linear:
    """Multinomial logistic regression: the best linear classifier of these features.

    Minimises mean cross-entropy + (l2/2)*||W||^2 over standardised features by L-BFGS in float64,
    from zero, to a gradient of 1e-6; the standardisation is folded into the weights. Convex, hence
    the same whatever the seed or the order of images.

    Args:
        features: (N,C), any float type.
        labels: (N,) int64 below ``classes``; a class may be absent.
        classes: K.
        l2: weight of the penalty on W; the bias is free.

    Returns:
        A float32 layer (C) -> (K).

    Raises:
        QualityError: features that are not finite.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        x_NC = features.detach().cpu().double()
        if not bool(torch.isfinite(x_NC).all()):
            raise QualityError("the backbone yields features that are not finite; restore it")
        mean, std = x_NC.mean(0), x_NC.std(0, correction=0)
        std = torch.where(std > 1e-8 * (1 + mean.abs()), std, 1.0)
        weight_KC, bias_K = _solve((x_NC - mean) / std, labels.detach().cpu().clone(), classes, l2)
        linear = zero_classifier(features.shape[1], classes)
    with torch.no_grad():
        folded = weight_KC / std
        linear.weight.copy_(folded)
        linear.bias.copy_(bias_K - folded @ mean)
    return linear


def zero_classifier(width: int, classes: int) -> nn.Linear:
    """A classifier (C) -> (K) that knows nothing; making it draws no random numbers."""
    with torch.device("meta"):
        linear = nn.Linear(width, classes)
    linear = linear.to_empty(device="cpu")
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _solve(features: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        solver.zero_grad()
        loss = functional.cross_entropy(functional.linear(features, weight, bias), labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Share of images classified correctly, macro-F1, and which were correct, (N,) bool."""

    accuracy: float
    f1: float
    correct: npt.NDArray[np.bool_]


@torch.no_grad()
def evaluate(classifier: nn.Linear, features: Tensor, labels: Tensor) -> Evaluation:
    """Judge a classifier on features (N,C) and labels (N,); F1 is averaged over classes present."""
    return evaluate_logits(classifier(features.to(classifier.weight)), labels)


def evaluate_logits(logits: Tensor, labels: Tensor) -> Evaluation:
    """Judge logits (N,K) by labels (N,); F1 is averaged over classes present."""
    predicted = logits.argmax(1).cpu().numpy()
    truth = labels.cpu().numpy()
    correct = predicted == truth
    scores = []
    for label in np.unique(truth):
        hits = np.count_nonzero(correct & (truth == label))
        named = np.count_nonzero(predicted == label) + np.count_nonzero(truth == label)
        scores.append(2 * hits / named)
    return Evaluation(float(correct.mean()), float(np.mean(scores)), correct)


# --- the epoch loop -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One optimiser step: counted from 0 over the call, of ``steps`` in all."""

    number: int
    steps: int
    loss: float
    penalty: float


@dataclass(frozen=True)
class TrainingLog:
    """Means over the images of the last epoch; ``loss`` is the whole objective, with penalty."""

    loss: float
    penalty: float
    steps: int
    seconds: float


def train_epochs(
    model: nn.Module,
    classifier: nn.Linear,
    part: Part,
    spec: Input,
    config: TrainConfig,
    *,
    trainable: Sequence[str],
    seed: int,
    autocast: bool = False,
    penalty: Callable[[], Tensor] | None = None,
    epochs: int,
    max_steps: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> TrainingLog:
    """Train parts of a backbone and its classifier in place, by cross-entropy plus a penalty.

    AdamW (backbone and classifier have their own rate; only matrices decay), a short linear warm-up
    and a cosine to zero over the call, gradient norm clipped at 1. The same seed gives the same
    result on the same machine and thread count.

    Args:
        model: backbone without classifier; ``requires_grad`` flags and mode are restored.
        classifier: trained along, (C) -> (K).
        part: images, augmented by ``seed`` and epoch.
        spec: of the model.
        config: rates, batch size, decay, label smoothing.
        trainable: names of the backbone parameters to train.
        seed: of order and augmentation.
        autocast: forward in bfloat16; weights, losses and steps stay float32.
        penalty: called after every forward pass, its scalar is added to the loss.
        epochs: passes over the part.
        max_steps: ends earlier; the rates follow their course over these steps.
        on_step: told about every step.

    Raises:
        QualityError: the loss is no longer finite.
        DataError: the part is empty, or none of its images could be read.
    """
    started = time.monotonic()
    total = epochs * part.batch_count(config.batch_size, train=True)
    total = total if max_steps is None else min(total, max_steps)
    loop = _Loop(model, classifier, config, autocast, penalty)
    sums, number = np.zeros(3), 0
    with _only_trainable(model, trainable) as chosen, _mode(model, training=True):
        optimiser = _optimiser(chosen, classifier, config)
        for epoch in range(epochs):
            if number >= total:
                break
            sums = np.zeros(3)
            epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            batches = part.batches(spec, config.batch_size, train=True, seed=epoch_seed)
            for images, labels in itertools.islice(batches, total - number):
                _set_rate(optimiser, number, total)
                loss, extra = loop.step(images, labels, optimiser, number)
                sums += np.array([loss, extra, 1.0]) * len(labels)
                if on_step is not None:
                    on_step(Step(number, total, loss, extra))
                number += 1
        optimiser.zero_grad()
    if sums[2] == 0:
        raise DataError(f"no image to train on: the part lists {len(part)}, none could be read")
    seconds = time.monotonic() - started
    return TrainingLog(float(sums[0] / sums[2]), float(sums[1] / sums[2]), number, seconds)


@dataclass
class _Loop:
    model: nn.Module
    classifier: nn.Linear
    config: TrainConfig
    autocast: bool
    penalty: Callable[[], Tensor] | None

    def step(
        self, images: Tensor, labels: Tensor, optimiser: torch.optim.Optimizer, number: int
    ) -> tuple[float, float]:
        """One step; returns objective and penalty."""
        device = self.classifier.weight.device
        with bfloat16(device, self.autocast):
            features = self.model(images.to(device))
        loss = functional.cross_entropy(
            self.classifier(features.float()),
            labels.to(device),
            label_smoothing=self.config.label_smoothing,
        )
        extra = self.penalty() if self.penalty is not None else None
        objective = loss if extra is None else loss + extra
        value = float(objective.detach())
        if not math.isfinite(value):
            raise QualityError(
                f"training diverged: the loss is {value} at step {number}; lower [train] lr "
                f"(now {self.config.backbone_lr:g}) or dal_weight (now {self.config.dal_weight:g})"
            )
        optimiser.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        optimiser.step()
        return value, 0.0 if extra is None else float(extra.detach())


def _optimiser(
    chosen: list[nn.Parameter], classifier: nn.Linear, config: TrainConfig
) -> torch.optim.AdamW:
    groups = []
    rates = config.backbone_lr, config.classifier_lr
    for parameters, lr in zip((chosen, list(classifier.parameters())), rates, strict=True):
        for decays in (True, False):
            members = [weight for weight in parameters if (weight.ndim > 1) == decays]
            if members:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": members, "lr": lr, "peak": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _set_rate(optimiser: torch.optim.Optimizer, number: int, total: int) -> None:
    """Linear warm-up over at most five steps, then half a cosine towards zero."""
    warm_up = min(WARM_UP_STEPS, max(1, total // 4))
    share = (number + 1) / warm_up
    if number >= warm_up:
        share = 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(1, total - warm_up)))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share


@contextmanager
def _only_trainable(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    parameters = dict(model.named_parameters())
    before = {name: weight.requires_grad for name, weight in parameters.items()}
    wanted = set(names)
    try:
        for name, weight in parameters.items():
            weight.requires_grad_(name in wanted)
        yield [parameters[name] for name in names]
    finally:
        for name, weight in parameters.items():
            weight.requires_grad_(before[name])
            weight.grad = None


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
