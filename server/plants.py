"""Draws a small multi-species plant data set, so that the whole story can be played without data.

Species differ in leaf shape, venation, colour and scenery, as domains do; classes differ in
lesions, whose number, size and place vary down to hardly visible ones. Light, angle, tilt, bend,
blemishes and noise are the nuisance. The same arguments give the same bytes on the same machine.
"""

import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from common.errors import ConfigError, DataError
from common.files import write_atomically
from server.leaves import (
    Colour,
    Field,
    Leaf,
    Tissue,
    blade,
    blur,
    compound,
    flat,
    grass,
    noise,
    place,
    radial,
    tinted,
)
from server.lesions import LESIONS, blemishes

Random = np.random.Generator

MARKER = "drawn.json"
VERSION = 1

# --- scenery -----------------------------------------------------------------------------------


def _ramp(field: Field, low: Colour, high: Colour) -> Field:
    return tinted(flat(len(field), low), high, field)


def _table(rng: Random, side: int) -> Field:
    grain = 0.75 * noise(rng, side, 2) + 0.25 * noise(rng, side, 48, 96)
    return _ramp(grain, (0.52, 0.50, 0.54), (0.76, 0.74, 0.77))


def _soil(rng: Random, side: int) -> Field:
    crumbs = np.clip((noise(rng, side, 6, 12, 24, 48, 96) - 0.5) * 2.6 + 0.5, 0, 1)
    return _ramp(crumbs, (0.13, 0.08, 0.05), (0.50, 0.37, 0.26))


def _sky(rng: Random, side: int) -> Field:
    fall = np.linspace(0, 1, side, dtype=np.float32)[:, None] * np.ones(side, np.float32)
    clouds = np.clip((noise(rng, side, 3, 6, 12) - 0.45) * 2.5, 0, 1) * rng.uniform(0.3, 1)
    return tinted(_ramp(fall, (0.42, 0.62, 0.86), (0.80, 0.89, 0.95)), (0.97, 0.97, 0.98), clouds)


def _canopy(rng: Random, side: int) -> Field:
    leaves = noise(rng, side, 4, 8, 14)
    green = _ramp(np.clip((leaves - 0.5) * 2.4 + 0.4, 0, 1), (0.05, 0.11, 0.05), (0.42, 0.52, 0.22))
    sparks = blur((noise(rng, side, 18) > 0.86).astype(np.float32), 2.2)
    return tinted(green, (0.93, 0.95, 0.78), np.clip(1.4 * sparks, 0, 0.8))


def _gravel(rng: Random, side: int) -> Field:
    image = Image.new("RGB", (side, side), (74, 62, 50))
    pen = ImageDraw.Draw(image)
    for x, y, r, light, warm in rng.random((230, 5)).tolist():
        radius = side * (0.018 + 0.04 * r)
        grey = 95 + 120 * light
        fill = (round(grey), round(grey * (0.93 - 0.1 * warm)), round(grey * (0.86 - 0.28 * warm)))
        cx, cy, flat = x * side, y * side, 0.7 + 0.3 * warm
        box = (cx - radius, cy - radius * flat, cx + radius, cy + radius * flat)
        pen.ellipse(box, fill=fill, outline=(70, 58, 47))
    stones = np.asarray(image, dtype=np.float32) / 255
    return np.asarray(stones * (0.85 + 0.3 * noise(rng, side, 32, 64))[..., None])


def _straw(rng: Random, side: int) -> Field:
    image = Image.new("RGB", (side, side), (92, 70, 40))
    pen = ImageDraw.Draw(image)
    for x, y, angle, long, light in rng.random((150, 5)).tolist():
        reach = side * (0.12 + 0.25 * long)
        dx, dy = reach * np.cos(np.pi * angle), reach * np.sin(np.pi * angle)
        tone = 120 + 110 * light
        fill = (round(tone), round(tone * 0.86), round(tone * 0.56))
        ends = (x * side - dx, y * side - dy, x * side + dx, y * side + dy)
        pen.line(ends, fill=fill, width=max(1, side // 56))
    return np.asarray(image, dtype=np.float32) / 255


# --- species -----------------------------------------------------------------------------------


class Species(NamedTuple):
    """How a species grows, where it is photographed, and what ails it."""

    name: str
    leaf: Callable[[Random], Leaf]
    length: float
    green: Colour
    scenery: Callable[[Random, int], Field]
    labels: tuple[str, ...]


def _strawberry(rng: Random) -> Leaf:
    return compound(
        rng, lambda: blade(rng, width=0.40, belly=0.75, taper=0.4, teeth=8, tooth=0.2), pairs=1
    )


SOURCE = Species(
    "sunflower",
    lambda rng: blade(rng, width=0.36, belly=0.5, taper=0.85, teeth=11, tooth=0.1),
    0.86,
    (0.24, 0.44, 0.17),
    _table,
    tuple(LESIONS),
)
FARMS = (
    Species(
        "vine",
        lambda rng: radial(
            rng,
            lobes=((0.0, 0.66, 0.42), (1.05, 0.58, 0.36), (2.15, 0.42, 0.42)),
            core=0.26,
            teeth=17,
            tooth=0.09,
        ),
        0.86,
        (0.30, 0.48, 0.16),
        _canopy,
        ("healthy", "spots", "blight", "mildew"),
    ),
    Species(
        "wheat",
        lambda rng: grass(rng, width=0.15),
        1.75,
        (0.36, 0.53, 0.20),
        _soil,
        ("healthy", "rust", "chlorosis"),
    ),
    Species(
        "bean",
        lambda rng: radial(rng, lobes=((0.0, 0.70, 0.30), (2.3, 0.54, 0.60)), core=0.42, notch=0.5),
        0.86,
        (0.22, 0.50, 0.20),
        _gravel,
        ("healthy", "spots", "rust", "mosaic"),
    ),
    Species(
        "strawberry",
        _strawberry,
        0.88,
        (0.17, 0.42, 0.19),
        _straw,
        ("healthy", "blight", "mildew"),
    ),
    Species(
        "willow",
        lambda rng: blade(rng, width=0.11, belly=0.8, taper=0.9, teeth=22, tooth=0.08, pairs=11),
        1.0,
        (0.38, 0.52, 0.28),
        _sky,
        ("healthy", "rust", "spots"),
    ),
    Species(
        "oak",
        lambda rng: blade(rng, width=0.34, belly=0.95, taper=0.5, lobes=5, lobe=0.42, pairs=5),
        0.9,
        (0.27, 0.41, 0.15),
        _table,
        ("healthy", "mildew", "chlorosis", "blight"),
    ),
)


# --- one photograph ----------------------------------------------------------------------------


def draw_leaf(rng: Random, species: Species, label: str, side: int) -> Image.Image:
    """One photograph of ``side`` pixels: scenery, shadow, leaf, lesions, light, noise."""
    tissue = place(species.leaf(rng), rng, side, length=species.length)
    skin = blemishes(rng, _skin(rng, species.green, tissue), tissue)
    skin = LESIONS[label](rng, skin, tissue)
    skin = skin * _relief(rng, tissue)[..., None]
    scene = species.scenery(rng, side) * rng.uniform(0.75, 1.1)
    shift = tuple(int(step) for step in rng.integers(-side // 24, side // 24 + 1, size=2))
    shadow = np.roll(blur(tissue.cover, side / 40), shift, axis=(0, 1))
    scene = scene * (1 - rng.uniform(0.2, 0.6) * shadow)[..., None]
    return _photographed(rng, tinted(scene, skin, tissue.cover))


def _skin(rng: Random, green: Colour, tissue: Tissue) -> Field:
    """Tissue colour: the species' green, older parts yellower, veins paler."""
    side = len(tissue.cover)
    tint = np.asarray(green, np.float32) * rng.normal(1, 0.07, 3) * rng.uniform(0.85, 1.2)
    skin = flat(side, tint)
    skin = tinted(skin, (0.52, 0.56, 0.2), rng.uniform(0, 0.45) * noise(rng, side, 3, 6))
    skin = skin * (0.86 + 0.28 * noise(rng, side, 24))[..., None]
    pale = 0.6 * tint + 0.4 * np.asarray((0.80, 0.86, 0.55), np.float32)
    return tinted(skin, pale, rng.uniform(0.35, 0.75) * tissue.veins)


def _relief(rng: Random, tissue: Tissue) -> Field:
    """(S,S) light: bulges between the veins, and two halves that face the sun differently."""
    height = 0.9 * blur(tissue.cover, 4.0) - 0.55 * blur(tissue.veins, 1.4)
    down, right = np.gradient(height)
    sun = rng.uniform(0, 2 * np.pi)
    slope = np.cos(sun) * right + np.sin(sun) * down
    fold = rng.uniform(-0.12, 0.12) * np.tanh(40 * tissue.across)
    return np.asarray(np.clip(1 + 1.5 * slope + fold, 0.45, 1.6), np.float32)


def _photographed(rng: Random, scene: Field) -> Image.Image:
    """Uneven light, exposure, white balance and sensor noise."""
    side = len(scene)
    light = rng.uniform(0.8, 1.2) * (0.8 + 0.4 * noise(rng, side, 2))
    balance = rng.normal(1, 0.04, 3).astype(np.float32)
    grain = rng.uniform(0.01, 0.035) * rng.standard_normal((side, side, 3), dtype=np.float32)
    exposed = scene * (light[..., None] * balance) + grain
    return Image.fromarray((np.clip(exposed, 0, 1) * 255).astype(np.uint8))


# --- the data set ------------------------------------------------------------------------------


def draw_dataset(
    out: Path,
    *,
    seed: int,
    farms: int = 4,
    train_per_class: int = 40,
    test_per_class: int = 20,
    source_per_class: int = 80,
    side: int = 96,
) -> None:
    """Write ``out/{source,farms}/SPECIES/{train,test}/CLASS/NNN.jpg``; a no-op when it is there.

    The images are drawn beside ``out`` and moved there whole, with a marker file that names the
    arguments: an interrupted draw is drawn again, other arguments replace the data set.

    Args:
        out: folder; replaced only when it is empty or was drawn here.
        seed: of everything.
        farms: farms, each with its own species and label set.
        train_per_class: training images of each class of a farm.
        test_per_class: test images of each class, farms and source.
        source_per_class: training images of each class of the source species.
        side: pixels.

    Raises:
        ConfigError: a number is out of range.
        DataError: ``out`` holds something else.
    """
    if not 1 <= farms <= len(FARMS):
        raise ConfigError(f"{farms} farms cannot be drawn; there are species for 1 to {len(FARMS)}")
    if min(train_per_class, test_per_class, source_per_class) < 1 or not 32 <= side <= 512:
        raise ConfigError("a drawn data set needs images in every class and a side of 32 to 512 px")
    marker = json.dumps(
        {
            "version": VERSION,
            "seed": seed,
            "farms": farms,
            "train_per_class": train_per_class,
            "test_per_class": test_per_class,
            "source_per_class": source_per_class,
            "side": side,
        },
        indent=2,
    )
    if (out / MARKER).is_file() and (out / MARKER).read_text() == marker:
        return
    fresh, old = out.with_name(f".{out.name}.drawing"), out.with_name(f".{out.name}.old")
    if out.exists() and not (out / MARKER).is_file() and any(out.iterdir()):
        raise DataError(f"'{out}' holds something that was not drawn here; give another folder")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    _draw_species(fresh / "source", SOURCE, seed, 0, source_per_class, test_per_class, side)
    for number, species in enumerate(FARMS[:farms], start=1):
        _draw_species(fresh / "farms", species, seed, number, train_per_class, test_per_class, side)
    write_atomically(fresh / MARKER, marker.encode())
    if out.exists():
        out.replace(old)
    fresh.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def _draw_species(
    folder: Path, species: Species, seed: int, number: int, train: int, test: int, side: int
) -> None:
    for part, count in (("train", train), ("test", test)):
        for label in species.labels:
            where = folder / species.name / part / label
            where.mkdir(parents=True)
            for image in range(count):
                key = [seed, number, part == "test", list(LESIONS).index(label), image]
                photograph = draw_leaf(np.random.default_rng(key), species, label, side)
                body = BytesIO()
                photograph.save(body, "JPEG", quality=90)
                (where / f"{image:03d}.jpg").write_bytes(body.getvalue())
