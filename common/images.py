"""A farm's photographs: class folders, the three parts, and batches of prepared images.

Two layouts are read, with JPEG, PNG or WebP files::

    CLASS/*.jpg                              parts fit 60 %, decide 20 %, test 20 %
    train/CLASS/*.jpg + test/CLASS/*.jpg     fit 80 % and decide 20 % of train; test as given

Parts are cut in capture order (EXIF time when every image of a class tells it, else natural file
order), so that shots of one leaf stay together; near duplicates never straddle two parts. The test
part is for reporting alone and has to be asked for as such.

Shape legend: B batch, S image side in pixels.
"""

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.duplicates import UNREADABLE, Hashes, Shot, has_near, survey
from common.errors import DataError
from common.pixels import (
    Floats,
    Input,
    Pixels,
    draw_jitter,
    jitter,
    load_augmented,
    load_image,
    normalise,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
MIN_IMAGES = 3
FIT, DECIDE, TEST = 0, 1, 2

_LAYOUT = "CLASS/*.jpg, or train/CLASS/*.jpg and test/CLASS/*.jpg"


class Purpose(Enum):
    """What the test part is wanted for; only reporting may have it."""

    REPORT = "report"
    DECIDE = "decide"
    TRAIN = "train"


# --- a part -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Photographs of one part: ``paths`` and ``labels`` (N,) int64, class by class."""

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def batch_count(self, batch_size: int, *, train: bool = False, min_last: int = 8) -> int:
        """How many batches :meth:`batches` yields when every image can be read."""
        return len(_chunks(len(self), batch_size, min_last if train else 1))

    def batches(
        self,
        spec: Input,
        batch_size: int,
        *,
        train: bool = False,
        seed: int = 0,
        min_last: int = 8,
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """Yield images (B,3,S,S) float32 and labels (B,) int64, decoded as they are needed.

        In training the order, crops, flips and colours follow from ``seed`` alone (an image's crop
        does not depend on its batch), and a last batch below ``min_last`` joins the one before: the
        domain alignment loss needs a few samples. Otherwise the order is that of ``paths``. An
        image that cannot be read is named in a warning and left out.
        """
        import torch

        order = np.random.default_rng(seed).permutation(len(self)) if train else range(len(self))
        for start, stop in _chunks(len(self), batch_size, min_last if train else 1):
            loaded = self._load(order[start:stop], spec.image_size, seed if train else None)
            if loaded is not None:
                images, chosen = loaded
                labels = torch.from_numpy(self.labels[chosen])
                yield torch.from_numpy(normalise(images, spec)), labels

    def _load(
        self, indices: Sequence[int] | npt.NDArray[np.int64], side: int, seed: int | None
    ) -> tuple[Pixels | Floats, list[int]] | None:
        images: list[Pixels] = []
        chosen: list[int] = []
        factors: list[Floats] = []
        for index in map(int, indices):
            rng = None if seed is None else np.random.default_rng([seed, index])
            try:
                path = self.paths[index]
                image = load_image(path, side) if rng is None else load_augmented(path, side, rng)
            except UNREADABLE as error:
                log.warning("'%s' cannot be read and is skipped: %s", self.paths[index], error)
                continue
            images.append(image)
            chosen.append(index)
            if rng is not None:
                factors.append(draw_jitter(rng))
        if not images:
            return None
        stacked = np.stack(images)
        if seed is None:
            return stacked, chosen
        return jitter(stacked, np.stack(factors)), chosen


def _chunks(count: int, size: int, min_last: int) -> list[tuple[int, int]]:
    """Cut 0..count into (start, stop); a last chunk below ``min_last`` joins the one before."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] < min_last:
        starts.pop()
    return list(itertools.pairwise([*starts, count]))


# --- a farm's folder ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FarmFolder:
    """An opened image folder: class names as the farm gave them, sorted, and the three parts.

    ``skipped`` names the files that could not be read, relative to the folder.
    """

    classes: tuple[str, ...]
    fit: Part
    decide: Part
    skipped: tuple[str, ...]
    _test: Part = field(repr=False)

    def open_test(self, purpose: Purpose) -> Part:
        """The test part, for reporting alone; raises DataError for any other purpose."""
        if purpose is not Purpose.REPORT:
            raise DataError(
                f"the test part was asked for to {purpose.value}; it is opened by reporting alone, "
                "use the decide part"
            )
        return self._test


@dataclass
class _Listing:
    """Every image of a folder: path, label, whether it comes from a given test folder."""

    root: Path
    classes: tuple[str, ...]
    paths: list[Path]
    labels: npt.NDArray[np.int64]
    given_test: npt.NDArray[np.bool_]
    split: bool


def open_folder(
    path: Path, *, per_class: int | None = None, seed: int = 0, cache: Path | None = None
) -> FarmFolder:
    """Read an image folder and cut it into fit, decide and test.

    Args:
        path: ``CLASS/*.jpg``, or ``train/CLASS/*.jpg`` beside ``test/CLASS/*.jpg``.
        per_class: few-shot: this many training images per class (80 % fit, 20 % decide), drawn
            with ``seed``; smaller draws of a seed are contained in larger ones. Where the parts are
            cut does not depend on it, and the test part is never thinned.
        seed: of the few-shot draw.
        cache: JSON file that remembers hashes between starts.

    Raises:
        DataError: no folder, no classes, one class, an empty class or one with fewer than three
            images, test classes that training lacks, or nothing left beside duplicates.
    """
    listing = _list(path)
    shots = survey(path, listing.paths, cache)
    readable = np.array([shot.dhash is not None for shot in shots])
    skipped = tuple(
        image.relative_to(path).as_posix()
        for image, good in zip(listing.paths, readable, strict=True)
        if not good
    )
    for name in skipped:
        log.warning("'%s' in '%s' cannot be read and is skipped", name, path)
    order = _capture_order(listing, shots, readable)
    part_of = _assign(listing, order)
    _drop_duplicates(path, part_of, shots)
    _require_left(listing, part_of)
    if per_class is not None:
        _thin(part_of, order, per_class, seed)
    parts = [_part(listing, order, part_of, which) for which in (FIT, DECIDE, TEST)]
    log.info("'%s': %d fit, %d decide, %d test images", path, *map(len, parts))
    return FarmFolder(listing.classes, parts[FIT], parts[DECIDE], skipped, parts[TEST])


def count(path: Path) -> tuple[int, int]:
    """Classes and images of a folder, without opening one; raises DataError as open_folder does."""
    listing = _listed(path)
    return len(listing.classes), len(listing.paths)


def census(path: Path) -> dict[str, int]:
    """Training images of each class, counted as :func:`count` does; raises as it does."""
    listing = _listed(path)
    training = listing.labels[~listing.given_test]
    return {name: int((training == label).sum()) for label, name in enumerate(listing.classes)}


def _listed(path: Path) -> _Listing:
    try:
        return _list(path)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _list(root: Path) -> _Listing:
    if not root.is_dir():
        raise DataError(f"no image folder at '{root}'; give a folder of {_LAYOUT}")
    train, test = _subfolders(root / "train"), _subfolders(root / "test")
    if bool(train) != bool(test):
        missing = "test" if train else "train"
        raise DataError(f"'{root}' has no {missing}/CLASS folders; it takes {_LAYOUT}")
    folders = train or _subfolders(root)
    classes = tuple(folder.name for folder in folders)
    _require_classes(root, classes, tuple(folder.name for folder in test))
    paths: list[Path] = []
    labels: list[int] = []
    given: list[bool] = []
    for is_test, group in ((False, folders), (True, test)):
        for folder in group:
            found = _images(folder)
            paths += found
            labels += [classes.index(folder.name)] * len(found)
            given += [is_test] * len(found)
    return _Listing(root, classes, paths, np.array(labels, np.int64), np.array(given), bool(train))


def _require_classes(root: Path, classes: tuple[str, ...], test: tuple[str, ...]) -> None:
    if not classes:
        raise DataError(f"'{root}' has no class folders; it takes {_LAYOUT}")
    if len(classes) == 1:
        raise DataError(
            f"'{root}' has only one class ('{classes[0]}'); a classifier needs two, "
            "for example one folder of healthy leaves"
        )
    if foreign := sorted(set(test) - set(classes)):
        raise DataError(
            f"'{root}/test' has classes that '{root}/train' lacks: {', '.join(foreign)}; "
            "name the folders alike or add training images"
        )
    if test and (unseen := sorted(set(classes) - set(test))):
        log.warning("'%s/test' lacks classes: %s; they are not reported", root, ", ".join(unseen))


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")]
    return sorted(found, key=lambda item: item.name)


def _images(folder: Path) -> list[Path]:
    """Images of a folder in natural order: IMG_9 before IMG_10."""
    found = [
        item
        for item in folder.iterdir()
        if item.suffix.lower() in SUFFIXES and not item.name.startswith(".") and item.is_file()
    ]
    if not found:
        raise DataError(f"class folder '{folder}' holds no image (.jpg, .png, .webp); add some")
    return sorted(found, key=lambda item: (_natural(item.name), item.name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    pieces = re.findall(r"\d+|\D+", name.lower())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces]


# --- the three parts ----------------------------------------------------------------------------


def _capture_order(
    listing: _Listing, shots: list[Shot], readable: npt.NDArray[np.bool_]
) -> dict[tuple[int, bool], list[int]]:
    """Readable image indices of every (class, from the test folder), in capture order."""
    order = {}
    for label, name in enumerate(listing.classes):
        for given in (False, True) if listing.split else (False,):
            mine = (listing.labels == label) & (listing.given_test == given) & readable
            members = np.flatnonzero(mine).tolist()
            if not given and len(members) < MIN_IMAGES:
                raise DataError(
                    f"class '{name}' in '{listing.root}' has {len(members)} readable images; "
                    f"it needs at least {MIN_IMAGES}, add more or remove the folder"
                )
            if all(shots[index].taken for index in members):
                members.sort(key=lambda index: str(shots[index].taken))
            order[label, given] = members
    return order


def _assign(listing: _Listing, order: dict[tuple[int, bool], list[int]]) -> npt.NDArray[np.int64]:
    """Which part every image belongs to, -1 for none."""
    part_of = np.full(len(listing.paths), -1)
    for (_, given), members in order.items():
        if given:
            part_of[members] = TEST
            continue
        training = len(members)
        if not listing.split:
            training -= max(1, round(0.2 * len(members)))
            part_of[members[training:]] = TEST
        decide = max(1, round((0.2 if listing.split else 0.25) * training))
        part_of[members[: training - decide]] = FIT
        part_of[members[training - decide : training]] = DECIDE
    return part_of


def _drop_duplicates(root: Path, part_of: npt.NDArray[np.int64], shots: list[Shot]) -> None:
    """Take training images like a test image, and decide images like a fit image, out."""
    hashes: Hashes = np.array([shot.dhash or 0 for shot in shots], dtype=np.uint64)
    for taken_from, compared, names in (
        (FIT, TEST, "fit images like a test image"),
        (DECIDE, TEST, "decide images like a test image"),
        (DECIDE, FIT, "decide images like a fit image"),
    ):
        members = np.flatnonzero(part_of == taken_from)
        like = members[has_near(hashes[members], hashes[part_of == compared])]
        part_of[like] = -1
        if len(like):
            log.info("'%s': %d %s left out as (near) duplicates", root, len(like), names)


def _require_left(listing: _Listing, part_of: npt.NDArray[np.int64]) -> None:
    for label, name in enumerate(listing.classes):
        mine = part_of[listing.labels == label]
        if FIT not in mine:
            raise DataError(
                f"every training image of class '{name}' in '{listing.root}' is a (near) duplicate "
                "of a test image; add photographs of other leaves"
            )
        if DECIDE not in mine:
            log.warning("class '%s' of '%s' has no decide image left", name, listing.root)
    for which, title in ((DECIDE, "decide"), (TEST, "test")):
        if which not in part_of:
            raise DataError(
                f"'{listing.root}' has no {title} image left beside (near) duplicates; "
                "add photographs of other leaves"
            )


def _thin(
    part_of: npt.NDArray[np.int64],
    order: dict[tuple[int, bool], list[int]],
    per_class: int,
    seed: int,
) -> None:
    """Keep ``per_class`` training images of every class, drawn within fit and within decide."""
    if per_class < 2:
        raise DataError(f"per_class is {per_class}; a class needs at least 2 training images")
    fit = min(per_class - 1, max(1, round(0.8 * per_class)))
    for (label, given), members in order.items():
        for which, wanted in ((FIT, fit), (DECIDE, per_class - fit)):
            mine = [index for index in members if part_of[index] == which]
            if given or len(mine) <= wanted:
                continue
            drawn = np.random.default_rng([seed, label, which]).permutation(len(mine))
            part_of[[mine[k] for k in drawn[wanted:]]] = -1


def _part(
    listing: _Listing,
    order: dict[tuple[int, bool], list[int]],
    part_of: npt.NDArray[np.int64],
    which: int,
) -> Part:
    chosen = [i for members in order.values() for i in members if part_of[i] == which]
    return Part(tuple(listing.paths[i] for i in chosen), listing.labels[chosen])
