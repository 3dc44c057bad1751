"""Drawing one leaf: outline, venation, lesions, background and light.

Geometry is drawn with pillow at twice the size and halved, which smooths every edge; tissue,
lesions and light are arrays. All randomness comes from one generator per image.

Shape legend: S side of the image in pixels, P points of a polyline.
Leaf coordinates: the petiole ends at (0, 0), the tip lies at (0, 1), x runs across the midrib.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Field: TypeAlias = npt.NDArray[np.floating[Any]]
"""(S,S) of one quantity, or (S,S,3) of colour, mostly 0 to 1."""
Colour: TypeAlias = tuple[float, float, float]
Points: TypeAlias = npt.NDArray[np.float64]
"""(P,2) positions, x before y."""


class Leaf(NamedTuple):
    """A leaf as geometry, in leaf coordinates."""

    outlines: tuple[Points, ...]
    veins: tuple[tuple[Points, float], ...]
    """Polyline, and thickness as a share of the leaf's length."""
    stem: float | None = 0.0
    """Height at which the petiole begins; None for a leaf without one."""


class Tissue(NamedTuple):
    """A leaf on the canvas."""

    cover: Field
    """(S,S): 1 on the leaf, 0 beside it."""
    veins: Field
    """(S,S): 1 on a vein."""
    across: Field
    """(S,S): signed distance from the midrib's line, as a share of the side."""


# --- outlines ----------------------------------------------------------------------------------


def blade(
    rng: np.random.Generator,
    *,
    width: float,
    belly: float,
    taper: float,
    teeth: int = 0,
    tooth: float = 0.0,
    lobes: int = 0,
    lobe: float = 0.0,
    pairs: int = 7,
) -> Leaf:
    """A simple leaf along its midrib: ovate, lanceolate, toothed or pinnately lobed.

    Half the width at t is ``width * t^belly * (1-t)^taper``, scaled to its largest value, with
    ``teeth`` saw teeth of depth ``tooth`` and ``lobes`` round lobes of depth ``lobe``.
    """
    t_P = np.linspace(0, 1, 120)
    peak = belly / (belly + taper)
    wave_P = 1 - lobe * (0.5 + 0.5 * np.cos(2 * np.pi * (lobes * t_P + 0.1)))
    half_P = width * t_P**belly * (1 - t_P) ** taper / (peak**belly * (1 - peak) ** taper) * wave_P

    def edge(side: int) -> Points:
        saw_P = 1 - tooth * ((teeth * t_P + rng.uniform()) % 1.0)
        slow_P = 1 + 0.06 * np.sin(2 * np.pi * (rng.uniform(1, 2) * t_P + rng.uniform()))
        return np.stack([side * half_P * saw_P * slow_P, t_P], axis=1)

    outline = np.concatenate([edge(-1), edge(1)[::-1]])
    veins = [(np.array([[0.0, 0.0], [0.0, 0.97]]), 0.022)]
    for start in np.linspace(0.06, 0.82, pairs):
        for side in (-1, 1):
            begin = start + rng.uniform(-0.02, 0.02)
            end = min(begin + (0.16 + 0.5 * width) * (1 - 0.6 * begin), 0.98)
            reach = float(np.interp(end, t_P, half_P)) * 0.93
            bow = np.array([[0, begin], [0.55 * reach, 0.62 * end + 0.38 * begin], [reach, end]])
            veins.append((bow * [side, 1], 0.011))
    return Leaf((outline,), tuple(veins))


def radial(
    rng: np.random.Generator,
    *,
    lobes: tuple[tuple[float, float, float], ...],
    core: float,
    teeth: int = 0,
    tooth: float = 0.0,
    notch: float = 0.35,
) -> Leaf:
    """A leaf around its petiole: heart-shaped or palmate.

    The radius at angle a from the tip is ``core`` plus a bump for each lobe (angle, length,
    breadth); ``notch`` is the breadth of the gap above the petiole.
    """
    angle_P = np.linspace(-np.pi, np.pi, 240)
    radius_P = np.full_like(angle_P, core)
    for centre, length, breadth in lobes:
        for side in (-1, 1) if centre else (1,):
            drift, stretch = rng.normal(0, 0.05), rng.uniform(0.9, 1.08)
            bump_P = np.exp(-(((angle_P - side * centre - drift) / breadth) ** 2))
            radius_P += (length - core) * stretch * bump_P
    radius_P *= 1 - tooth * np.abs((teeth * angle_P / np.pi + rng.uniform()) % 1.0 - 0.5) * 2
    radius_P *= np.clip((np.pi - np.abs(angle_P)) / notch, 0, 1) ** 0.6
    outline = np.stack([np.sin(angle_P), np.cos(angle_P)], axis=1) * radius_P[:, None]
    veins = []
    for centre, _, _ in lobes:
        for side in (-1, 1) if centre else (1,):
            reach = float(np.interp(side * centre, angle_P, radius_P)) * 0.93
            veins.extend(_fan(side * centre, reach))
    petiole = np.array([0, 0.35])
    raised = tuple((line + petiole, width) for line, width in veins)
    return Leaf((outline + petiole,), raised, stem=0.35)


def _fan(angle: float, reach: float) -> list[tuple[Points, float]]:
    """A main vein from the petiole at an angle, with side veins."""
    ahead = np.array([np.sin(angle), np.cos(angle)])
    aside = np.array([np.cos(angle), -np.sin(angle)])
    veins = [(np.stack([0 * ahead, reach * ahead]), 0.02)]
    for start in (0.25, 0.42, 0.58, 0.72):
        for side in (-1, 1):
            span = 0.42 * reach * (1.05 - start)
            begin = start * reach * ahead
            veins.append((np.stack([begin, begin + span * (ahead + side * aside)]), 0.01))
    return veins


def grass(rng: np.random.Generator, *, width: float) -> Leaf:
    """A long blade with parallel veins that runs beyond the canvas at both ends."""
    t_P = np.linspace(0, 1, 40)
    half_P = width * (1 - 0.55 * t_P) * np.clip(12 * (1 - t_P), 0, 1)
    bow_P = rng.uniform(-0.25, 0.25) * (t_P - 0.5) ** 2 * 2
    lines = {
        share: np.stack([bow_P + share * half_P, t_P], axis=1)
        for share in (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
    }
    veins = tuple((line, 0.012 if share == 0 else 0.005) for share, line in lines.items())
    return Leaf((np.concatenate([lines[-1.0], lines[1.0][::-1]]),), veins[1:-1], stem=None)


def compound(rng: np.random.Generator, leaflet: Callable[[], Leaf], *, pairs: int) -> Leaf:
    """Leaflets on a stalk: one at the end and ``pairs`` along it; with one pair, trifoliate."""
    spread, size = (1.75, 0.58) if pairs == 1 else (1.15, 0.36)
    places = [(0.0, 0.42 if pairs == 1 else 0.66, size)]
    for height in [0.4] if pairs == 1 else np.linspace(0.08, 0.62, pairs):
        for side in (-1, 1):
            angle = side * (spread + rng.normal(0, 0.12))
            places.append((angle, float(height), size * rng.uniform(0.85, 1.02)))
    outlines: list[Points] = []
    veins: list[tuple[Points, float]] = [(np.array([[0.0, 0.0], [0.0, 0.7]]), 0.022)]
    for angle, height, scale in places:
        part = leaflet()
        outlines.extend(_turned(line, angle) * scale + [0, height] for line in part.outlines)
        veins.extend((_turned(v, angle) * scale + [0, height], w * 0.7) for v, w in part.veins)
    return Leaf(tuple(outlines), tuple(veins))


def _turned(points: Points, angle: float) -> Points:
    cos, sin = np.cos(angle), np.sin(angle)
    turned: Points = points @ np.array([[cos, -sin], [sin, cos]])
    return turned


# --- canvas ------------------------------------------------------------------------------------


def place(leaf: Leaf, rng: np.random.Generator, side: int, *, length: float) -> Tissue:
    """Put a leaf on the canvas at a random angle, size, place, tilt and bend.

    ``length`` is the usual length of the leaf as a share of the side.
    """
    angle = rng.uniform(-np.pi, np.pi)
    scale = length * rng.uniform(0.82, 1.12) * side
    tilt, bend = rng.uniform(0.78, 1.0), rng.normal(0, 0.09)
    centre = side * (0.5 + rng.uniform(-0.07, 0.07, size=2))

    def to_canvas(points: Points) -> Points:
        x_P, y_P = points[:, 0], points[:, 1] - 0.5
        bent = np.stack([(x_P + 2 * bend * y_P**2) * tilt, -y_P], axis=1)
        return _turned(bent * scale, angle) + centre

    cover, veins = Image.new("L", (2 * side, 2 * side)), Image.new("L", (2 * side, 2 * side))
    surface, lines = ImageDraw.Draw(cover), ImageDraw.Draw(veins)
    for outline in leaf.outlines:
        surface.polygon((2 * to_canvas(outline)).ravel().tolist(), fill=255)
    ends = np.cumsum([len(line) for line, _ in leaf.veins])[:-1]
    paths = np.split(2 * to_canvas(np.concatenate([line for line, _ in leaf.veins])), ends)
    for path, (_, width) in zip(paths, leaf.veins, strict=True):
        lines.line(path.ravel().tolist(), fill=255, width=max(1, round(2 * width * scale)))
    if leaf.stem is not None:
        stalk = (2 * to_canvas(np.array([[0.0, leaf.stem - 0.35], [0.0, leaf.stem]]))).ravel()
        for pen in (surface, lines):
            pen.line(stalk.tolist(), fill=255, width=max(1, side // 24))
    y_SS, x_SS = np.mgrid[:side, :side].astype(np.float32)
    across = ((x_SS - centre[0]) * np.cos(angle) - (y_SS - centre[1]) * np.sin(angle)) / side
    return Tissue(halved(cover), halved(veins), across.astype(np.float32))


def halved(drawing: Image.Image) -> Field:
    """(S,S) between 0 and 1 from a grey drawing of twice the size."""
    return np.asarray(drawing.reduce(2), dtype=np.float32) / 255


def blur(field: Field, radius: float) -> Field:
    """Gaussian blur of an (S,S) field between 0 and 1."""
    image = Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def noise(rng: np.random.Generator, side: int, *cells: int) -> Field:
    """(S,S) smooth noise between 0 and 1: octaves of the given cells per side, halving in size."""
    total, weight = np.zeros((side, side), np.float32), 0.0
    for octave, count in enumerate(cells):
        grid = Image.fromarray(rng.random((count, count), dtype=np.float32))
        smooth = grid.resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) * 0.5**octave
        weight += 0.5**octave
    mixed: Field = np.clip(total / weight, 0, 1)
    return mixed


def tinted(base: Field, colour: Field | Colour, alpha: Field) -> Field:
    """(S,S,3) with a colour laid over it, (S,S) alpha."""
    laid: Field = np.asarray(colour, np.float32) - base
    laid *= alpha[..., None]
    laid += base
    return laid


def flat(side: int, colour: Colour | Field) -> Field:
    """(S,S,3) of one colour."""
    field: Field = np.broadcast_to(np.asarray(colour, np.float32), (side, side, 3))
    return field
