"""What tells photographs apart: a perceptual hash and the time of the shot.

The hash is the difference hash (dHash): the photograph is averaged down to 9 x 8 grey cells and
each of the 64 bits says whether a cell is brighter than its left neighbour. Two photographs whose
hashes differ in at most :data:`NEAR` bits count as the same one (a copy, a re-save, a resize, or
the next frame of a burst).
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.errors import StateError
from common.files import write_atomically

log = logging.getLogger(__name__)

NEAR = 2
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_CACHE_VERSION = 1
_CHUNK = 2_000_000  # pairs compared at once: 16 MB
_EXIF_IFD, _DATE_TIME_ORIGINAL, _SUBSECONDS = 0x8769, 0x9003, 0x9291
_TIME = re.compile(r"[12]\d{3}:\d{2}:\d{2} \d{2}:\d{2}:\d{2}")

Hashes = npt.NDArray[np.uint64]
Row = tuple[int, int, str | None, str | None]


@dataclass(frozen=True)
class Shot:
    """One photograph: its dHash (None: unreadable) and its EXIF capture time (None: not told)."""

    dhash: int | None
    taken: str | None


def difference_hash(image: Image.Image) -> int:
    """The 64-bit dHash of an image of any size and mode."""
    cells = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = np.asarray(cells, dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def has_near(hashes: Hashes, others: Hashes, distance: int = NEAR) -> npt.NDArray[np.bool_]:
    """Whether each of ``hashes`` (N,) lies within a Hamming distance of any of ``others`` (M,)."""
    found = np.zeros(len(hashes), dtype=np.bool_)
    rows = max(1, _CHUNK // max(1, len(others)))
    for start in range(0, len(hashes) if len(others) else 0, rows):
        bits = np.bitwise_count(hashes[start : start + rows, None] ^ others[None, :])
        found[start : start + rows] = (bits <= distance).any(axis=1)
    return found


def survey(root: Path, paths: Sequence[Path], cache: Path | None = None) -> list[Shot]:
    """Look at every photograph once: hash, capture time, whether it can be decoded.

    Args:
        root: folder that the cache names photographs relative to.
        paths: photographs below ``root``.
        cache: JSON file of earlier results by relative path, size and modification time. A
            damaged cache is computed anew, and one that cannot be written is done without.
    """
    known = _read_cache(cache)
    rows: dict[str, Row] = {}
    shots = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        row = _row(path, known.get(name))
        shots.append(Shot(None if row[2] is None else int(row[2], 16), row[3]))
        rows[name] = row
    if cache is not None and rows != known:
        _write_cache(cache, rows)
    return shots


def _row(path: Path, known: Row | None) -> Row:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1, None, None)
    if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
        return known
    shot = _look(path)
    dhash = None if shot.dhash is None else f"{shot.dhash:016x}"
    return (status.st_size, status.st_mtime_ns, dhash, shot.taken)


def _look(path: Path) -> Shot:
    try:
        with Image.open(path) as image:
            taken = _taken(image)
            image.draft("L", (36, 32))  # a JPEG decoder can skip detail that the hash averages out
            return Shot(difference_hash(image), taken)
    except UNREADABLE:
        return Shot(None, None)


def _taken(image: Image.Image) -> str | None:
    """EXIF DateTimeOriginal with sub-seconds, as text that sorts in time."""
    tags = image.getexif().get_ifd(_EXIF_IFD)
    text = str(tags.get(_DATE_TIME_ORIGINAL, "")).strip("\0 ")
    if not _TIME.fullmatch(text):
        return None
    return f"{text}.{str(tags.get(_SUBSECONDS, '')).strip(chr(0) + ' ')}"


def _read_cache(cache: Path | None) -> dict[str, Row]:
    if cache is None or not cache.is_file():
        return {}
    try:
        content = json.loads(cache.read_bytes())
        if content["version"] != _CACHE_VERSION:
            return {}
        return {str(name): _checked(row) for name, row in content["images"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("'%s' is damaged; every image is looked at again", cache)
        return {}


def _checked(row: list[object]) -> Row:
    size, modified, dhash, taken = row
    if not isinstance(size, int) or not isinstance(modified, int):
        raise TypeError("size and modification time must be integers")
    if dhash is not None and not 0 <= int(str(dhash), 16) < 1 << 64:
        raise ValueError("a hash has 64 bits")
    return (size, modified, None if dhash is None else str(dhash), str(taken) if taken else None)


def _write_cache(cache: Path, rows: dict[str, Row]) -> None:
    content = {"version": _CACHE_VERSION, "images": rows}
    try:
        write_atomically(cache, json.dumps(content).encode())
    except (StateError, OSError) as error:
        log.warning("image cache not kept: %s", error)
