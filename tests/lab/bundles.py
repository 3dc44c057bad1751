"""What a device serves with, made by hand: a classifier that says the same of every image."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from client.served import About
from client.serving import Serving
from common.manifest import Manifest
from server.registry import Registry

CLASSES = ("black rot", "healthy", "scab")


def about(registry: Registry, version: int, threshold: float = 1.0) -> About:
    """What belongs to a classifier that is never sure."""
    manifest: Manifest = registry.manifest(version)
    return About(
        digest=registry.row(version).digest,
        manifest=manifest,
        classes=CLASSES,
        temperature=1.0,
        threshold=threshold,
        accuracy=0.9,
        f1=0.9,
        committed=datetime.now(UTC),
    )


def favouring(width: int, label: int, weight: float = 2.0) -> nn.Linear:
    """A classifier that says the same of every image."""
    classifier = nn.Linear(width, len(CLASSES))
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.zero_()
        classifier.bias[label] = weight
    return classifier


def serving_of(farm: Path) -> Serving:
    """What the device of a farm's folder serves with."""
    return Serving(farm / "state" / "serving")


def serve(serving: Serving, registry: Registry, version: int, classifier: nn.Linear) -> None:
    """Put a version in use on a device."""
    for digest in registry.manifest(version).weights:
        serving.objects.add(registry.objects.path(digest).read_bytes())
    serving.commit(about(registry, version), classifier)


def photographs_in(folder: Path) -> Path:
    """Four of them, an image that is none, and a file that is something else."""
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"img{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("rain")
    return folder
