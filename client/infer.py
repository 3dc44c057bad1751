"""Classify photographs on a device that has ONNX Runtime and no torch.

Confidences are calibrated: softmax(logits / T), with the temperature that the trainer found on the
decide part; below the threshold the device says that it is not sure.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import QualityError
from common.images import SUFFIXES
from common.pixels import Floats, load_image, normalise
from common.portable import PortableBundle
from common.runtime import Runtime

SHOWN = 3


@dataclass(frozen=True)
class Guess:
    """What a bundle says of an image: the likeliest classes with their probability."""

    image: Path
    ranked: tuple[tuple[str, float], ...]
    sure: bool
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.ranked[0][0]

    def fields(self) -> dict[str, Any]:
        """As JSON has it; ``class`` is null where the device is not sure."""
        ranked = [{"class": name, "probability": round(share, 4)} for name, share in self.ranked]
        return {
            "image": str(self.image),
            "class": self.label if self.sure else None,
            "likely": ranked,
            "seconds": round(self.seconds, 4),
        }

    def words(self) -> str:
        """In a line, for people."""
        likely = ", ".join(f"{name} {share:.2f}" for name, share in self.ranked)
        return likely if self.sure else f"not sure ({likely})"


def ranked(
    logits: Floats, classes: tuple[str, ...], threshold: float
) -> tuple[tuple[tuple[str, float], ...], bool]:
    """Likeliest classes with their probability, and whether the first is sure.

    Args:
        logits: (K,), divided by the temperature.
        classes: their names.
        threshold: below it nothing is sure.

    Raises:
        QualityError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise QualityError("what it says of an image is no number")
    shares = np.exp(logits - logits.max(), dtype=np.float64)
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    best = tuple((classes[k], float(shares[k])) for k in order[:SHOWN])
    return best, best[0][1] >= threshold


class Classifier:
    """A bundle that is ready to classify.

    Args:
        bundle: as the farm's trainer wrote it.
        threads: 0: as many as there are cores.

    Raises:
        ModelError: ONNX Runtime cannot run it here.
    """

    def __init__(self, bundle: PortableBundle, threads: int = 0) -> None:
        self._bundle, self._runtime = bundle, Runtime(bundle.graph, threads=threads)
        self.about = bundle.about

    def classify(self, image: Path) -> Guess:
        """What the bundle says of an image.

        Raises:
            OSError, SyntaxError, ValueError: the file is not a readable image.
            ModelError, QualityError: the bundle cannot be run, or says what is no number.
        """
        begin = time.perf_counter()
        pixels = normalise(load_image(image, self.about.image_size)[None], self.about)
        best, sure = ranked(self.logits(pixels)[0], self.about.classes, self.about.threshold)
        return Guess(image, best, sure, time.perf_counter() - begin)

    def logits(self, images: Floats) -> Floats:
        """Images (N,3,S,S), normalised -> logits (N,K), divided by the temperature.

        Raises:
            ModelError: the bundle cannot be run.
        """
        features_NC = self._runtime.features(images)
        logits_NK: Floats = features_NC @ self._bundle.weight.T + self._bundle.bias
        return logits_NK / np.float32(self.about.temperature)


def images_in(path: Path) -> list[Path]:
    """An image, or all images below a folder, in order of their names."""
    if not path.is_dir():
        return [path]
    found = (one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
    return sorted(one for one in found if not one.name.startswith("."))


def failed(image: Path, error: BaseException) -> dict[str, Any]:
    """What is said of an image that cannot be read, as JSON has it."""
    return {"image": str(image), "error": f"cannot be read as an image: {error}"}
