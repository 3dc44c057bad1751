"""What ails a leaf: the classes of the drawn plants, painted on its tissue.

Number, size, place and strength vary down to hardly visible, so that classes overlap a little.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from server.leaves import Colour, Field, Tissue, blur, flat, halved, noise, tinted

Random = np.random.Generator

TOBACCO: Colour = (0.34, 0.20, 0.09)
ASH: Colour = (0.70, 0.64, 0.54)
YELLOW: Colour = (0.80, 0.74, 0.22)
ORANGE: Colour = (0.78, 0.36, 0.06)
FLOUR: Colour = (0.88, 0.90, 0.88)


def _scatter(
    rng: Random, cover: Field, count: int, radius: tuple[float, float], *, nests: int = 0
) -> Image.Image:
    """Ellipses of random size on the leaf at double size; gathered round ``nests`` when given.

    The radius is a share of the side.
    """
    side = len(cover)
    places_N2 = np.argwhere(cover > 0.9)[:, ::-1].astype(float)
    drawing = Image.new("L", (2 * side, 2 * side))
    if not len(places_N2):
        return drawing
    spots = places_N2[rng.integers(len(places_N2), size=count)]
    if nests:
        centres = places_N2[rng.integers(len(places_N2), size=nests)]
        spots = centres[rng.integers(nests, size=count)] + rng.normal(0, 0.075 * side, (count, 2))
    pen = ImageDraw.Draw(drawing)
    for (x, y), r, ratio in zip(
        2 * spots, 2 * side * rng.uniform(*radius, count), rng.uniform(0.65, 1, count), strict=True
    ):
        a, b = (r, r * ratio) if rng.random() < 0.5 else (r * ratio, r)
        pen.ellipse((x - a, y - b, x + a, y + b), fill=255)
    return drawing


def _patch(rng: Random, drawing: Image.Image, *, rough: float, soft: float) -> Field:
    """(S,S) alpha of drawn ellipses with a rough, soft edge."""
    solid = halved(drawing)
    ragged = blur(solid, soft) + rough * (noise(rng, len(solid), 12, 24, 48) - 0.5)
    return np.asarray(np.clip((ragged - 0.42) * 5, 0, 1), dtype=np.float32)


def _spots(rng: Random, skin: Field, on: Tissue) -> Field:
    """Leaf spot: small dark rings, often with a pale centre."""
    spot = halved(_scatter(rng, on.cover, int(rng.integers(3, 20)), (0.010, 0.030)))
    skin = tinted(skin, YELLOW, 0.35 * blur(spot, 2.5))
    skin = tinted(skin, TOBACCO, rng.uniform(0.6, 0.95) * spot)
    if rng.random() < 0.6:
        skin = tinted(skin, ASH, 0.8 * np.clip(3 * blur(spot, 1.3) - 2, 0, 1))
    return skin


def _blight(rng: Random, skin: Field, on: Tissue) -> Field:
    """Blight: one to three large, ragged, zoned blotches with a yellow halo."""
    drawing = _scatter(rng, on.cover, int(rng.integers(1, 4)), (0.05, 0.14))
    blotch = _patch(rng, drawing, rough=1.3, soft=3.5)
    halo = np.clip(2.2 * blur(blotch, 5.0), 0, 1)
    skin = tinted(skin, YELLOW, rng.uniform(0.35, 0.8) * halo)
    zones = 0.5 + 0.5 * np.sin(9 * blur(blotch, 4.0) + rng.uniform(0, 6))
    brown = tinted(flat(len(skin), TOBACCO), (0.55, 0.38, 0.2), zones)
    return tinted(skin, brown, rng.uniform(0.75, 0.98) * blotch)


def _rust(rng: Random, skin: Field, on: Tissue) -> Field:
    """Rust: many tiny orange pustules in nests."""
    count, nests = int(rng.integers(18, 130)), int(rng.integers(1, 6))
    pustules = halved(_scatter(rng, on.cover, count, (0.006, 0.013), nests=nests))
    skin = tinted(skin, YELLOW, np.clip(0.9 * blur(pustules, 3.0), 0, 0.5))
    shade = rng.uniform(0.75, 1.1)
    return tinted(skin, (ORANGE[0] * shade, ORANGE[1] * shade, ORANGE[2]), 0.92 * pustules)


def _mildew(rng: Random, skin: Field, on: Tissue) -> Field:
    """Powdery mildew: a white, mealy film in patches that lets the veins through."""
    film = _patch(
        rng, _scatter(rng, on.cover, int(rng.integers(2, 7)), (0.04, 0.12)), rough=0.9, soft=4.0
    )
    meal = 0.55 + 0.45 * noise(rng, len(film), 24, 48)
    return tinted(skin, FLOUR, rng.uniform(0.3, 0.8) * blur(film, 1.5) * meal)


def _mosaic(rng: Random, skin: Field, on: Tissue) -> Field:
    """Mosaic virus: pale and dark green fields along the veins."""
    cells = noise(rng, len(skin), int(rng.integers(9, 15)), 30) - 0.4 * blur(on.veins, 1.5)
    mottle = np.clip((cells - 0.42) * 3 + 0.5, 0, 1)
    strength = rng.uniform(0.25, 0.75)
    skin = tinted(skin, (0.62, 0.72, 0.26), strength * mottle)
    return tinted(skin, (0.06, 0.26, 0.09), 0.4 * strength * (1 - mottle))


def _chlorosis(rng: Random, skin: Field, on: Tissue) -> Field:
    """Chlorosis: yellow between veins that stay green, more on one part of the leaf."""
    between = np.clip(1 - 1.5 * blur(on.veins, 1.6), 0, 1)
    where = np.clip(1.6 * noise(rng, len(skin), 3, 5) + rng.uniform(-0.5, 0.1), 0, 1)
    return tinted(skin, (0.86, 0.82, 0.3), rng.uniform(0.45, 0.95) * between * where)


def _healthy(rng: Random, skin: Field, on: Tissue) -> Field:  # noqa: ARG001
    """Nothing but the blemishes that every leaf has."""
    return skin


LESIONS: dict[str, Callable[[Random, Field, Tissue], Field]] = {
    "healthy": _healthy,
    "spots": _spots,
    "blight": _blight,
    "rust": _rust,
    "mildew": _mildew,
    "mosaic": _mosaic,
    "chlorosis": _chlorosis,
}


def blemishes(rng: Random, skin: Field, on: Tissue) -> Field:
    """What every leaf has, sick or not: specks, dust, a scratch."""
    if rng.random() < 0.5:
        specks = _scatter(rng, on.cover, int(rng.integers(1, 5)), (0.006, 0.016))
        tone = TOBACCO if rng.random() < 0.6 else FLOUR
        skin = tinted(skin, tone, rng.uniform(0.3, 0.8) * halved(specks))
    if rng.random() < 0.25:
        skin = tinted(skin, ASH, 0.35 * noise(rng, len(skin), 5, 30) ** 2)
    return skin
