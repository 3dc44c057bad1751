"""Stage 1: the backbone that a network starts from, and the anchors that describe it.

Weights come from a file, the model hub or chance, and may be trained on the source species. One
species alone over-specialises a backbone, so the trained weights can be interpolated with their
start (WiSE-FT, Wortsman et al., 2022): ``interpolation`` * trained + (1 - ``interpolation``) *
start.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.anchors import compute_anchors
from common.backbone import (
    dense_spec,
    digest,
    load_pretrained,
    save_backbone,
)
from common.config import BackboneConfig, ServerConfig
from common.errors import ConfigError
from common.files import write_atomically
from common.fit import (
    Step,
    evaluate,
    extract,
    fit_classifier,
    train_epochs,
    zero_classifier,
)
from common.images import FarmFolder, Part, open_folder
from common.pixels import Input
from common.precision import bf16_supported
from common.sampling import with_tokens
from common.spec import ModelSpec
from common.trainable import trainable_names

log = logging.getLogger(__name__)

BASE_FILE = "base.safetensors"
ANCHORS_FILE = "anchors.safetensors"

OnProgress = Callable[[str, float], None]
"""Told what is being done and which share of it is, 0 to 1."""


@dataclass(frozen=True)
class Pretrained:
    """Where stage 1 left the backbone; without source images there are no anchors.

    ``source_accuracy`` is that of a refitted classifier on the decide part of the source species.
    """

    spec: ModelSpec
    digest: str
    base: Path
    anchors: Path | None
    source_accuracy: float | None
    seconds: float


class SourceBatches:
    """Batches (B,3,S,S) of source images; iterating again yields the same again.

    The images are drawn by seed from the fit and decide parts and come shuffled, so that a first
    batch already holds many classes.
    """

    def __init__(self, folder: FarmFolder, spec: Input, count: int, seed: int) -> None:
        paths = folder.fit.paths + folder.decide.paths
        labels = np.concatenate([folder.fit.labels, folder.decide.labels])
        drawn = np.random.default_rng(seed).permutation(len(paths))[:count]
        self._part = Part(tuple(paths[index] for index in drawn), labels[drawn])
        self._spec = spec

    def __len__(self) -> int:
        return self._part.batch_count(32)

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self._part.batches(self._spec, 32):
            yield images


def source_batches(folder: Path | FarmFolder, spec: Input, count: int, seed: int) -> SourceBatches:
    """Up to ``count`` source images for anchors and second moments, the same for every spec.

    Raises:
        DataError: the folder cannot be used.
    """
    opened = folder if isinstance(folder, FarmFolder) else open_folder(folder)
    return SourceBatches(opened, spec, count, seed)


def shape_of(settings: BackboneConfig) -> ModelSpec:
    """The spec of the first base: dense, with the attention and the tokens that are set.

    Raises:
        ModelError: an unknown backbone.
        ConfigError: no such blocks, or no number of tokens is so cheap.
    """
    spec = dense_spec(settings.name, settings.image_size, settings.options)
    try:
        linear = spec.model_copy(update={"linear_blocks": settings.linear_blocks})
        spec = ModelSpec.model_validate(linear.model_dump())
    except ValidationError as error:
        raise ConfigError(f"[backbone] linear_blocks: {error.errors()[0]['msg']}") from error
    if settings.token_macs is None:
        return spec
    return with_tokens(spec, settings.token_macs, merge=settings.merge_tokens)


def pretrain(config: ServerConfig, out: Path, on_progress: OnProgress | None = None) -> Pretrained:
    """Make the first base of a network and write it, with its anchors, below ``out``.

    Args:
        config: ``backbone`` says where weights and source images are, how long to train and how
            far to interpolate; ``train`` gives batch size and decay; ``seed`` decides the rest.
        out: folder; ``base.safetensors`` and ``anchors.safetensors`` are replaced atomically.
        on_progress: told about every step.

    Raises:
        ConfigError: training epochs without source images.
        ModelError: an unknown backbone, or weights that do not match it.
        DataError: the source folder cannot be used.
        QualityError: training diverged.
    """
    started = time.monotonic()
    tell = on_progress or (lambda _what, _share: None)
    settings = config.backbone
    if settings.epochs and settings.source is None:
        raise ConfigError(
            f"[backbone] epochs = {settings.epochs} needs source images; "
            "set [backbone] source to their folder, or epochs to 0"
        )
    spec = shape_of(settings)
    model = _first_weights(spec, settings, config.seed)
    folder = open_folder(settings.source) if settings.source is not None else None
    if folder is not None and settings.epochs:
        _train_on_source(model, spec, folder, config, tell)
    out.mkdir(parents=True, exist_ok=True)
    base = out / BASE_FILE
    save_backbone(base, model, spec)
    anchors, accuracy = None, None
    if folder is not None:
        anchors = out / ANCHORS_FILE
        tell("anchors", 0.0)
        write_atomically(anchors, _anchors(model, spec, folder, config))
        accuracy = _source_accuracy(model, spec, folder)
        tell("anchors", 1.0)
    seconds = time.monotonic() - started
    return Pretrained(spec, digest(model, spec), base, anchors, accuracy, seconds)


def _first_weights(spec: ModelSpec, settings: BackboneConfig, seed: int) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_pretrained(spec, settings.weights)


def _train_on_source(
    model: VisionTransformer,
    spec: ModelSpec,
    folder: FarmFolder,
    config: ServerConfig,
    tell: OnProgress,
) -> None:
    """Train the whole backbone on the source classes, then interpolate with the start."""
    settings = config.backbone
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = config.train.model_copy(update={"trainable": "full", "lr": settings.lr})
    autocast = bf16_supported()
    training = train_epochs(
        model,
        _first_classifier(model, spec, folder, settings.weights is not None, autocast),
        folder.fit,
        spec,
        rates,
        trainable=trainable_names(model, "full"),
        seed=config.seed,
        autocast=autocast,
        epochs=settings.epochs,
        on_step=lambda step: tell("training", _share(step)),
    )
    log.info("source training: loss %.3f after %d steps", training.loss, training.steps)
    interpolate(model, start, settings.interpolation)


def _first_classifier(
    model: VisionTransformer, spec: ModelSpec, folder: FarmFolder, fitted: bool, autocast: bool
) -> nn.Linear:
    """Fitted to good features it spares them (LP-FT, Kumar et al., 2022); random features get 0."""
    classes = len(folder.classes)
    if fitted:
        return fit_classifier(*extract(model, folder.fit, spec, autocast=autocast), classes)
    return zero_classifier(spec.width, classes)


def _share(step: Step) -> float:
    return (step.number + 1) / step.steps


def interpolate(model: VisionTransformer, start: dict[str, Tensor], share: float) -> None:
    """Set every floating tensor to start + share * (trained - start), in place, in float32."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and share < 1:
                tensor.copy_(torch.lerp(start[name], tensor, share))


def _anchors(
    model: VisionTransformer, spec: ModelSpec, folder: FarmFolder, config: ServerConfig
) -> bytes:
    batches = source_batches(folder, spec, config.backbone.anchor_images, config.seed)
    coral = config.train.dal == "coral"
    anchors = compute_anchors(model, batches, config.seed, coral, autocast=bf16_supported())
    return anchors.to_bytes()


def _source_accuracy(model: VisionTransformer, spec: ModelSpec, folder: FarmFolder) -> float:
    seen = partial(extract, model, spec=spec, autocast=bf16_supported())
    classifier = fit_classifier(*seen(folder.fit), len(folder.classes))
    accuracy = evaluate(classifier, *seen(folder.decide)).accuracy
    log.info("source species: decide accuracy %.3f", accuracy)
    return accuracy
