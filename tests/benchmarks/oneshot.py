"""One cut without training: the farms' scores, the server's mask and compensation, and its price.

The steps are the product's own: ``client.criteria`` on each farm, ``server.consensus``,
``common.budget`` and ``common.surgery`` on the server. A cut is judged on every farm's whole test
part, with the classifier that was fitted to the dense checkpoint and with one fitted anew.
"""

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from client.criteria import Scoring, score
from client.scores import FarmScores
from common import backbone, fit, moments
from common.anchors import Anchors, compute_anchors
from common.budget import Budget, choose_mask
from common.codec import Bytes
from common.config import BackboneConfig, TrainConfig
from common.files import only_one
from common.images import FarmFolder, Part, Purpose, open_folder
from common.mask import Mask
from common.pixels import Pixels, load_image
from common.plan import Criterion, PlanConfig
from common.precision import bf16_supported
from common.scores import UnitScores
from common.spec import ModelSpec
from common.surgery import Method, Moments, collect_moments, prune_compensated
from server.consensus import Rule, consensus, farm_scores, median_tau
from server.pretrain import ANCHORS_FILE, SourceBatches, source_batches
from server.redundancy import irreplaceable
from tests.benchmarks import plants
from tests.benchmarks.plants import Flags

Judgement: TypeAlias = dict[str, dict[str, Flags]]
"""By classifier (fixed, refitted), then farm: which test images were classified correctly."""

WARM_UP = 3
FIXED, REFITTED = "fixed", "refitted"
TORCH_PRUNING = "torch-pruning"
PLAIN = "taylor, redundancy ignored"
FARMS = "taylor, moments of farms"
SPARING = ("taylor", "taha", FARMS)
"""Criteria whose scores count only what other units cannot say; the others are as published."""


def scored_by(name: str) -> Criterion:
    """The criterion of a row of the table; farms know nothing of its variants."""
    return "taylor" if name in (PLAIN, FARMS) else name  # type: ignore[return-value]


@dataclass(frozen=True)
class Checkpoint:
    """A dense backbone after warm-up rounds, and a folder for what belongs to it."""

    folder: Path
    seed: int

    @property
    def path(self) -> Path:
        """The backbone."""
        return self.folder / "dense.safetensors"

    @property
    def anchors(self) -> Path:
        """Of its heads, on the source species."""
        return self.folder / ANCHORS_FILE

    def make(self) -> None:
        """Warm up, unless that has been done; another call that is at it is waited for."""
        with only_one(self.folder / "making", seconds=3600):
            self._make()

    def _make(self) -> None:
        if self.path.is_file() and self.anchors.is_file():
            return
        fresh = self.folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        plants.play(TrainConfig(), WARM_UP, self.seed, keep=fresh)
        (fresh / ANCHORS_FILE).replace(self.anchors)
        (fresh / "model.safetensors").replace(self.path)


# --- on a farm, in a process of the pool -----------------------------------------------------


@dataclass(frozen=True)
class Decoded(Part):
    """A part whose images were decoded once; only what is not augmented comes from there."""

    pixels: Pixels

    @classmethod
    def of(cls, part: Part) -> "Decoded":
        pixels = np.stack([load_image(path, plants.SIDE) for path in part.paths])
        return cls(part.paths, part.labels, pixels)

    def _load(self, indices, side, seed):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        if seed is not None:
            return super()._load(indices, side, seed)
        chosen = list(map(int, indices))
        return self.pixels[chosen], chosen


@dataclass(frozen=True)
class _Images:
    fit: Part
    test: Part
    classes: int


@cache
def _images(checkpoint: Checkpoint, name: str, shots: int = plants.PER_CLASS) -> _Images:
    config, state = plants.farm_config(checkpoint.folder, name, checkpoint.seed, shots)
    state.mkdir(parents=True, exist_ok=True)
    folder: FarmFolder = open_folder(
        config.farm.data,
        per_class=config.farm.per_class,
        seed=config.farm.seed,
        cache=state / "images.json",
    )
    test = folder.open_test(Purpose.REPORT)
    return _Images(Decoded.of(folder.fit), Decoded.of(test), len(folder.classes))


@cache
def _classifier(checkpoint: Checkpoint, name: str, shots: int = plants.PER_CLASS) -> nn.Linear:
    """Fitted to the dense checkpoint."""
    model, spec = backbone.load_backbone(checkpoint.path)
    images = _images(checkpoint, name, shots)
    return fit.fit_classifier(*fit.extract(model, images.fit, spec), images.classes)


def score_farm(
    checkpoint: Checkpoint, name: str, criterion: Criterion, shots: int
) -> tuple[int, FarmScores]:
    """What a farm answers in a score round: images of its fit part, and its scores."""
    model, spec = backbone.load_backbone(checkpoint.path)
    part = _images(checkpoint, name, shots).fit
    scoring = Scoring(
        model=model,
        spec=spec,
        classifier=_classifier(checkpoint, name, shots),
        part=part,
        batch_size=TrainConfig().batch_size,
        anchors=Anchors.from_bytes(checkpoint.anchors.read_bytes()),
        seed=checkpoint.seed,
        autocast=bf16_supported(),
    )
    return len(part), score(criterion, scoring)


def moments_farm(checkpoint: Checkpoint, name: str) -> tuple[int, Bytes]:
    """Images of a farm's fit part, and what it sends of second moments on them."""
    model, spec = backbone.load_backbone(checkpoint.path)
    part = _images(checkpoint, name).fit
    with torch.inference_mode():
        batches = (images for images, _ in part.batches(spec, 32))
        found = collect_moments(model, batches, autocast=bf16_supported())
    return len(part), moments.pack(found, "all")


def gradient_farm(checkpoint: Checkpoint, name: str) -> tuple[int, dict[str, Tensor]]:
    """Images of a farm's fit part, and the gradient of their mean cross-entropy by parameter."""
    model, spec = backbone.load_backbone(checkpoint.path)
    part, classifier = _images(checkpoint, name).fit, _classifier(checkpoint, name)
    for images, labels in part.batches(spec, 32):
        loss = functional.cross_entropy(classifier(model(images)), labels, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
    found = {key: weight.grad for key, weight in model.named_parameters()}
    return len(part), {key: g / len(part) for key, g in found.items() if g is not None}


def judge_farm(checkpoint: Checkpoint, name: str, path: Path) -> dict[str, Flags]:
    """Which test images a backbone and the two classifiers get right."""
    model, spec = backbone.load_backbone(path)
    images = _images(checkpoint, name)
    fitted = fit.fit_classifier(*fit.extract(model, images.fit, spec), images.classes)
    features, labels = fit.extract(model, images.test, spec)
    classifiers = {FIXED: _classifier(checkpoint, name), REFITTED: fitted}
    return {
        label: fit.evaluate(classifier, features, labels).correct
        for label, classifier in classifiers.items()
    }


# --- on the server ---------------------------------------------------------------------------


def agree(
    sent: Sequence[tuple[int, FarmScores]],
    spec: ModelSpec,
    *,
    kappa: float,
    rule: Rule,
    tau: float = 1.0,
    exponent: float = 0.0,
) -> UnitScores:
    """The consensus of what farms sent, each with its number of images."""
    farms = [
        (
            images,
            farm_scores(
                scores.head_importance,
                scores.head_mmd2,
                scores.neuron_importance,
                tau=tau,
                exponent=exponent,
                spec=spec,
            ),
        )
        for images, scores in sent
    ]
    return consensus(farms, kappa=kappa, rule=rule)


@dataclass(frozen=True, eq=False)
class Cut:
    """A mask and what it kept."""

    mask: Mask
    judged: dict[Method, Judgement]


class Bench:
    """All that one-shot cuts of one checkpoint share.

    Args:
        checkpoint: made.
        farms: by name; they judge.
        pool: processes that farms work in.
        scorers: farms whose scores count, by default the same.
        shots: images per class by which they score.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        farms: Sequence[str],
        pool: ProcessPoolExecutor,
        scorers: Sequence[str] | None = None,
        shots: int = plants.PER_CLASS,
    ) -> None:
        self._checkpoint, self._farms, self._pool = checkpoint, list(farms), pool
        self._scorers, self._shots = list(scorers or farms), shots
        self._model, self.dense = backbone.load_backbone(checkpoint.path)
        self._scores: dict[Criterion, UnitScores] = {}
        self._spared: dict[str, UnitScores] = {}
        self._gradients: dict[str, Tensor] = {}
        self._moments: dict[bool, Moments] = {}

    def agreed(self, criterion: Criterion) -> UnitScores:
        """The consensus of all farms."""
        if criterion not in self._scores:
            work = [
                self._pool.submit(score_farm, self._checkpoint, name, criterion, self._shots)
                for name in self._scorers
            ]
            plan = PlanConfig(criterion=criterion)
            sent = [one.result() for one in work]
            self._scores[criterion] = agree(
                sent,
                self.dense,
                kappa=plan.kappa,
                rule=plan.consensus,
                tau=median_tau([scores.head_mmd2 for _, scores in sent]),
                exponent=plan.invariance_exponent,
            )
        return self._scores[criterion]

    def torch_pruning(self, budget: Budget) -> Mask:
        """What Torch-Pruning keeps, fed with the mean of the farms' gradients."""
        from tests.benchmarks.torchpruning import choose

        if not self._gradients:
            work = [
                self._pool.submit(gradient_farm, self._checkpoint, name) for name in self._farms
            ]
            sent = [one.result()[1] for one in work]
            self._gradients = {
                name: torch.stack([one[name] for one in sent]).mean(0) for name in sent[0]
            }
        return choose(self._model, self._gradients, self.dense, budget)

    def mask(self, criterion: str, budget: Budget) -> Mask:
        """By one of our criteria, or by Torch-Pruning."""
        if criterion == TORCH_PRUNING:
            return self.torch_pruning(budget)
        scores = self._counted(criterion)
        return choose_mask(scores, Mask.dense(self.dense), self.dense, budget)

    def _counted(self, criterion: str) -> UnitScores:
        """The scores that a mask goes by."""
        agreed = self.agreed(scored_by(criterion))
        if criterion not in SPARING:
            return agreed
        if criterion not in self._spared:
            self._spared[criterion] = self.spare(agreed, criterion == FARMS)
        return self._spared[criterion]

    def spare(self, scores: UnitScores, farms: bool = False) -> UnitScores:
        """Scores less what other units can say instead."""
        return irreplaceable(scores, self._model, self._second_moments(farms))

    def cut(self, criterion: str, budget: Budget, methods: Sequence[Method]) -> Cut:
        """Choose the mask of a budget, and judge it with each compensation."""
        mask, judged = self.mask(criterion, budget), {}
        folder = self._checkpoint.folder / f"cut-{os.getpid()}"
        folder.mkdir(exist_ok=True)
        for method in methods:
            judged[method] = self._judge(self.save_cut(mask, method, folder, criterion == FARMS))
        return Cut(mask, judged)

    def judge_dense(self) -> Judgement:
        """The checkpoint itself."""
        return self._judge(self._checkpoint.path)

    def save_cut(self, mask: Mask, method: Method, folder: Path, farms: bool = False) -> Path:
        """Cut the checkpoint, compensated, into a folder; by moments of farms too where asked."""
        keep = mask.keep_in(Mask.dense(self.dense))
        found = None if method == "none" else self._second_moments(farms)
        model, spec = prune_compensated(self._model, self.dense, keep, found, method)
        path = folder / "cut.safetensors"
        backbone.save_backbone(path, model, spec)
        return path

    def save_anchors(self, path: Path) -> None:
        """Compute the anchors of a backbone on the source species, and keep them beside it."""
        model, _ = backbone.load_backbone(path)
        seed = self._checkpoint.seed
        anchors = compute_anchors(model, self._source(), seed, autocast=bf16_supported())
        path.with_name(ANCHORS_FILE).write_bytes(anchors.to_bytes())

    def _source(self) -> SourceBatches:
        """Images of the source species, as the server takes them at a prune event."""
        count = BackboneConfig().anchor_images
        return source_batches(plants.source(), self.dense, count, self._checkpoint.seed)

    def _judge(self, path: Path) -> Judgement:
        work = {
            name: self._pool.submit(judge_farm, self._checkpoint, name, path)
            for name in self._farms
        }
        found = {name: one.result() for name, one in work.items()}
        return {label: {name: found[name][label] for name in found} for label in (FIXED, REFITTED)}

    def _second_moments(self, farms: bool = False) -> Moments:
        """Of the source images and, where asked, of the farms' too."""
        if farms not in self._moments:
            self._moments[farms] = self._with_farms() if farms else self._of_source()
        return self._moments[farms]

    def _of_source(self) -> Moments:
        with torch.inference_mode():
            return collect_moments(self._model, self._source(), autocast=bf16_supported())

    def _with_farms(self) -> Moments:
        work = [self._pool.submit(moments_farm, self._checkpoint, name) for name in self._farms]
        images, sent = zip(*(one.result() for one in work), strict=True)
        found = moments.with_farms(self._second_moments(), sent, self.dense, "all", images)
        assert found is not None
        return found


def summary(judged: Judgement) -> str:
    """Mean accuracy over farms by classifier, for a line of progress."""
    means = {
        label: round(float(np.mean([one.mean() for one in farms.values()])), 4)
        for label, farms in judged.items()
    }
    return json.dumps(means)
