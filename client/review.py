"""What the device is not sure about, put before a person image by image.

An answer is a label (client/labels.py): the class that was guessed, another one, or a new one. What
is skipped is asked about again the next time; what is labelled already is not.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from client.infer import Guess, ranked
from client.labels import Labels
from client.serving import Bundle
from common.duplicates import UNREADABLE
from common.errors import QualityError
from common.pixels import load_image, normalise

log = logging.getLogger(__name__)

Ask = Callable[[Guess], str | None]
"""The class that a person says, or None to skip."""


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
    return Guess(image, *ranked(logits.numpy(), about.classes, about.threshold))


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
