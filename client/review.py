"""What the device is not sure about, put before a person image by image.

An answer is a label (client/labels.py): the class that was guessed, another one, or a new one. What
is skipped is asked about again the next time; what is labelled already is not.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from client.labels import Labels
from client.serving import Bundle
from common.duplicates import UNREADABLE
from common.errors import QualityError
from common.images import SUFFIXES
from common.pixels import load_image, normalise

log = logging.getLogger(__name__)

SHOWN = 3

Ask = Callable[["Guess"], "str | None"]
"""The class that a person says, or None to skip."""


@dataclass(frozen=True)
class Guess:
    """What a bundle says of an image: the likeliest classes with their probability."""

    image: Path
    ranked: tuple[tuple[str, float], ...]
    sure: bool

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.ranked[0][0]


@torch.inference_mode()
def guess(bundle: Bundle, image: Path) -> Guess:
    """What a bundle says of an image.

    Raises:
        OSError, SyntaxError, ValueError: the file is not a readable image.
        QualityError: the bundle cannot be run, or what it says is no number.
    """
    about = bundle.about
    spec = about.manifest.spec
    pixels = torch.from_numpy(normalise(load_image(image, spec.image_size)[None], spec))
    try:
        logits = bundle.classifier(bundle.model(pixels))[0] / about.temperature
    except RuntimeError as error:
        raise QualityError(f"it cannot be run: {str(error)[:200]}") from error
    if not torch.isfinite(logits).all():
        raise QualityError("what it says of an image is no number")
    probability, place = logits.softmax(0).sort(descending=True)
    ranked = tuple(
        (about.classes[int(k)], float(p)) for p, k in zip(probability, place, strict=True)
    )
    return Guess(image, ranked[:SHOWN], float(probability[0]) >= about.threshold)


def images_in(path: Path) -> list[Path]:
    """An image, or all images below a folder, in order of their names."""
    if not path.is_dir():
        return [path]
    return sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)


def unsure(bundle: Bundle, images: Iterable[Path]) -> Iterator[Guess]:
    """What the bundle is not sure about; an image that cannot be read is left out.

    Raises:
        QualityError: as :func:`guess` does.
    """
    for image in images:
        try:
            found = guess(bundle, image)
        except UNREADABLE as error:
            log.warning("'%s' cannot be read as an image: %s", image, error)
            continue
        if not found.sure:
            yield found


def review(bundle: Bundle, labels: Labels, images: Sequence[Path], ask: Ask) -> int:
    """Ask about every image that is neither sure nor labelled; returns how many were labelled.

    Raises:
        QualityError: as :func:`guess` does.
        DiskError: the disk is full; what was labelled before is kept.
    """
    labelled = 0
    for found in unsure(bundle, [one for one in images if not labels.has(one)]):
        said = ask(found)
        if said is not None:
            labels.add(found.image, said, new=True)
            labelled += 1
    return labelled
