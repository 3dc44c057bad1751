"""From an image file to the numbers a backbone takes; numpy and PIL only.

Inference-only devices without torch prepare images with this same code.

Shape legend: B batch, S image side in pixels, C colour channels.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from common.spec import Triple

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_ORIENTATION = 0x0112
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_JITTER = 0.15


def load_image(path: Path, side: int) -> Pixels:
    """Decode, scale the shorter side to ``side`` and crop the centre: (S,S,3) uint8.

    Raises:
        OSError, SyntaxError, ValueError: the file is not a readable image.
    """
    image = _decode(path, side)
    width, height = image.size
    edge = min(width, height)
    return _cut(image, side, (width - edge) / 2, (height - edge) / 2, edge, edge)


class Colours(Protocol):
    """Mean and deviation of the colours that a network was made for, 0..1; a spec has them."""

    @property
    def mean(self) -> Triple: ...  # noqa: D102

    @property
    def std(self) -> Triple: ...  # noqa: D102


class Input(Colours, Protocol):
    """What a network takes: square images of a side, in such colours."""

    @property
    def image_size(self) -> int: ...  # noqa: D102


def normalise(pixels: Pixels | Floats, spec: Colours) -> Floats:
    """Pixels 0..255 (...,S,S,3) to what the backbone expects, (...,3,S,S) float32."""
    mean = np.array(spec.mean, dtype=np.float32) * 255
    std = np.array(spec.std, dtype=np.float32) * 255
    scaled = (pixels.astype(np.float32) - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def load_augmented(path: Path, side: int, rng: np.random.Generator) -> Pixels:
    """A random crop of 60 to 100 % of the area, flipped both ways at random: (S,S,3) uint8."""
    area, aspect = rng.uniform(0.6, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    x, y, mirror, turn = rng.random(4)
    image = _decode(path, side)
    full_width, full_height = image.size
    width = min(full_width, np.sqrt(full_width * full_height * area * aspect))
    height = min(full_height, np.sqrt(full_width * full_height * area / aspect))
    cut = _cut(image, side, x * (full_width - width), y * (full_height - height), width, height)
    return cut[:: 1 if turn < 0.5 else -1, :: 1 if mirror < 0.5 else -1]


def _decode(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))  # twice the side: the resize still antialiases
        turned: Image.Image = image
        if image.getexif().get(_ORIENTATION, 1) != 1:
            turned = ImageOps.exif_transpose(image)
        if turned.mode == "P":  # a palette may hold transparency, which RGB alone cannot take
            turned = turned.convert("RGBA")
        return turned.convert("RGB")


def _cut(
    image: Image.Image, side: int, left: float, top: float, width: float, height: float
) -> Pixels:
    box = (left, top, left + width, top + height)
    scaled = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return np.asarray(scaled)


def draw_jitter(rng: np.random.Generator) -> Floats:
    """Factors of brightness, contrast and saturation (3,) around 1."""
    return rng.uniform(1 - _JITTER, 1 + _JITTER, size=3).astype(np.float32)


def jitter(pixels: Pixels, factors: Floats) -> Floats:
    """Change the colours of (B,S,S,C) by factors (B,3), mildly; values stay within 0..255."""
    brightness, contrast, saturation = factors.T[:, :, None, None, None]
    images_BSSC: Floats = pixels.astype(np.float32) * brightness
    mean = (images_BSSC @ _GREY).mean(axis=(1, 2))[:, None, None, None]
    images_BSSC = mean + (images_BSSC - mean) * contrast
    grey = (images_BSSC @ _GREY)[..., None]
    coloured: Floats = np.clip(grey + (images_BSSC - grey) * saturation, 0, 255)
    return coloured
