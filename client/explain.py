"""What a version says of a photograph, and which parts of the leaf that is made of, as a picture.

Parts that count less are darker (common/rollout.py): a tint would hide the colours that a disease
is told by. Beside the photograph there is a panel for each version.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from client.device import Device
from client.infer import Guess, ranked
from client.serving import Bundle
from client.shadow import try_out
from common.backbone import load_backbone, macs
from common.errors import DataError, StateError
from common.files import write_atomically
from common.pixels import Floats, load_image, normalise
from common.rollout import patch_shares
from common.spec import ModelSpec

PREVIOUS = "previous"
SIDE, MARGIN, LINES = 420, 16, 76
DARKEST = 0.15
"""Of its light, what the patch keeps that counts least."""
FULL = 0.95
"""Of the patches, how many count less than one that keeps all its light: one alone may tower."""


@dataclass(frozen=True, eq=False)
class Looker:
    """A backbone and a classifier that are asked what they see."""

    name: str
    model: VisionTransformer
    spec: ModelSpec
    classifier: nn.Linear
    classes: tuple[str, ...]
    temperature: float
    threshold: float

    @classmethod
    def of(cls, bundle: Bundle, name: str = "") -> "Looker":
        """What a device serves with."""
        about = bundle.about
        return cls(
            f"{name} version {about.manifest.counter}".strip(),
            bundle.model,
            about.manifest.spec,
            bundle.classifier,
            about.classes,
            about.temperature,
            about.threshold,
        )


@dataclass(frozen=True, eq=False)
class View:
    """What one of them says of an image; ``shares`` (h,w) are those of the patches, of sum 1."""

    name: str
    guess: Guess
    shares: Floats
    macs: int

    def words(self) -> str:
        """In two lines, for people."""
        label, share = self.guess.ranked[0]
        sure = "" if self.guess.sure else " (not sure)"
        return f"{label} {share:.2f}{sure}\n{self.name}, {self.macs / 1e9:.2f} GMACs"


def look(looker: Looker, image: Path) -> View:
    """Ask one.

    Raises:
        DataError: the file is not a readable image.
        QualityError: what it says is no number.
    """
    spec = looker.spec
    pixels = torch.from_numpy(normalise(_decoded(image, spec.image_size)[None], spec))
    with torch.inference_mode():
        logits: Tensor = looker.classifier(looker.model(pixels))[0] / looker.temperature
    guess = Guess(image, *ranked(logits.numpy(), looker.classes, looker.threshold))
    shares: Floats = patch_shares(looker.model, pixels)[0].numpy()
    return View(looker.name, guess, shares, macs(spec))


def _decoded(image: Path, side: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    try:
        return load_image(image, side)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"'{image}' cannot be read as an image: {error}") from error


def other(against: str, device: Device) -> Looker:
    """What a name stands for: "previous", a farm's folder, or a backbone's file.

    A backbone has no classifier; one is fitted to it on this farm's images, and calibrated.

    Raises:
        StateError: there is no version before this one, or the other farm serves with nothing.
        ModelError, ConfigError, DataError: a file or folder that is none of these.
    """
    if against == PREVIOUS:
        bundle = device.serving.previous()
        if bundle is None:
            raise StateError("no version was in use before; compare with a backbone's file instead")
        return Looker.of(bundle)
    path = Path(against)
    if path.is_dir():
        return Looker.of(Device.of(path).serving.in_use(), path.name)
    model, spec = load_backbone(path)
    folder = device.images()
    found = try_out(model, spec, folder)
    return Looker(
        path.name, model, spec, found.classifier, folder.classes, found.temperature, found.threshold
    )


# --- the picture ---------------------------------------------------------------------------------


def darkened(photograph: Image.Image, shares: Floats) -> Image.Image:
    """The photograph, each part as bright as it counts; a twentieth of it keeps all its light."""
    low, high = shares.min(), np.quantile(shares, FULL)
    scaled = (shares - low) / (high - low) if high > low else np.ones_like(shares)
    patches = Image.fromarray(scaled.clip(0, 1).astype(np.float32))
    light = patches.resize(photograph.size, Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(light), 0, 1)[..., None]
    kept = np.asarray(photograph) * (DARKEST + (1 - DARKEST) * share)
    return Image.fromarray(kept.round().astype(np.uint8))


def draw(path: Path, image: Path, views: Sequence[View]) -> None:
    """Write photograph and panels side by side as PNG, atomically.

    Raises:
        DataError: the file is not a readable image.
        DiskError: the picture cannot be written.
    """
    photograph = Image.fromarray(_decoded(image, SIDE))
    panels = [(photograph, image.name)]
    panels += [(darkened(photograph, view.shares), view.words()) for view in views]
    width = MARGIN + len(panels) * (SIDE + MARGIN)
    sheet = Image.new("RGB", (width, SIDE + MARGIN + LINES), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (panel, words) in enumerate(panels):
        left = MARGIN + number * (SIDE + MARGIN)
        sheet.paste(panel, (left, MARGIN))
        pen.multiline_text((left, SIDE + MARGIN + 8), words, fill="black", font_size=20)
    body = BytesIO()
    sheet.save(body, "PNG")
    write_atomically(path, body.getvalue())
