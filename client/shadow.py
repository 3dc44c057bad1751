"""A version on trial: is it as good as what serves, on this farm's own images?

The farm fits its classifier to the version's features of the fit part, and both are judged on the
decide part; nobody else sees a figure of it. Temperature and threshold are chosen there as well:

    temperature   makes confidences honest (Guo et al., 2017): max softmax(logits / T), with the T
                  that minimises the cross-entropy
    threshold     the device says "not sure" below it: the lowest confidence from which on the
                  images that are left are right as often as ``SURE`` says
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from client.serving import Bundle
from common import fit
from common.images import FarmFolder, Part
from common.spec import ModelSpec

SURE = 0.95
MAX_DROP = 0.02
"""Of macro-F1 that a version may lose and still be taken: on few images one of them is more."""
TEMPERATURES = torch.logspace(-1.5, 1.5, 121, base=10)
_LATENCY_IMAGES = 10


@dataclass(frozen=True)
class Judged:
    """How a bundle does on some images."""

    accuracy: float
    f1: float


@dataclass(frozen=True, eq=False)
class Trial:
    """A version with the classifier that this farm fitted to it."""

    classifier: nn.Linear
    temperature: float
    threshold: float
    judged: Judged
    latency_seconds: float


def try_out(model: VisionTransformer, spec: ModelSpec, folder: FarmFolder) -> Trial:
    """Fit, judge and calibrate; raises DataError where no image can be read."""
    classifier = fit.fit_classifier(*fit.extract(model, folder.fit, spec), len(folder.classes))
    features, labels = fit.extract(model, folder.decide, spec)
    found = fit.evaluate(classifier, features, labels)
    with torch.inference_mode():
        logits = classifier(features)
    temperature = best_temperature(logits, labels)
    return Trial(
        classifier,
        temperature,
        sure_from(logits / temperature, labels),
        Judged(found.accuracy, found.f1),
        latency(model, spec),
    )


def judge(bundle: Bundle, part: Part, classes: Sequence[str]) -> Judged:
    """How a bundle does on a part whose labels index ``classes``.

    A class that the bundle does not know counts as wrong, as it is in the field.
    """
    features, labels = fit.extract(bundle.model, part, bundle.about.manifest.spec)
    known = bundle.about.classes
    # the bundle's class k is class place[k] of the folder, or one that nothing is labelled as
    place = [
        classes.index(name) if name in classes else len(classes) + number
        for number, name in enumerate(known)
    ]
    with torch.inference_mode():
        named = torch.full((len(features), len(classes) + len(known)), -torch.inf)
        named[:, place] = bundle.classifier(features)
    found = fit.evaluate_logits(named, labels)
    return Judged(found.accuracy, found.f1)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature, of a fixed ladder, with the least cross-entropy of (N,K) logits.

    A handful of images that are all right would ask for one that is always sure; the ladder ends.
    """
    losses = [float(functional.cross_entropy(logits / t, labels)) for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def sure_from(logits: Tensor, labels: Tensor, sure: float = SURE) -> float:
    """The lowest confidence from which on ``sure`` of the images are right; 1 where there is none.

    Args:
        logits: (N,K), divided by the temperature.
        labels: (N,).
        sure: share of right answers among those given.
    """
    confidence, predicted = logits.softmax(1).max(1)
    order = confidence.argsort(descending=True, stable=True)
    right = (predicted == labels)[order].double().cumsum(0)
    share = right / torch.arange(1, len(order) + 1)
    good = (share >= sure).nonzero()
    return float(confidence[order][int(good[-1])]) if len(good) else 1.0


def latency(model: VisionTransformer, spec: ModelSpec) -> float:
    """Seconds that one image takes, the median of a few."""
    image = torch.zeros(1, 3, spec.image_size, spec.image_size)
    seconds = []
    with torch.inference_mode():
        for _ in range(_LATENCY_IMAGES):
            begin = time.perf_counter()
            model(image)
            seconds.append(time.perf_counter() - begin)
    return median(seconds)
