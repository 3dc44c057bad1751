"""Images that a person has labelled in the field: they feed training and judge what serves.

    labels.jsonl   a line per image: which file, which class, when, sha256

An image that is labelled is copied into the farm's image folder, under its class, so the next round
trains on it; a new class is a new folder. What was labelled since a version was put in use is its
test: it has not been fitted to these images.
"""

import contextlib
import json
import logging
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import AwareDatetime, ValidationError

from common.config import FarmConfig
from common.duplicates import UNREADABLE
from common.errors import DataError, DiskError
from common.files import append, sync
from common.images import Part
from common.messages import Digest
from common.objects import sha256_of
from common.pixels import load_image
from common.signing import Document

log = logging.getLogger(__name__)

_SIDE = 64


def labels_of(config: FarmConfig, state_dir: Path) -> "Labels":
    """The labels of a farm."""
    return Labels(state_dir / "labels.jsonl", config.farm.data)


class _Line(Document):
    file: str
    label: str
    when: AwareDatetime
    content: Digest | None = None


class Labels:
    """The labels of one farm.

    Args:
        path: of labels.jsonl.
        images: the farm's image folder.
    """

    def __init__(self, path: Path, images: Path) -> None:
        self._path = path
        self._contents: set[str | None] | None = None
        train = images / "train"
        self._root = train if train.is_dir() else images

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes there are, sorted."""
        found = (path.name for path in self._root.iterdir() if path.is_dir())
        return tuple(sorted(name for name in found if not name.startswith(".")))

    def add(
        self, image: Path, label: str, *, new: bool = False, now: datetime | None = None
    ) -> Path:
        """Copy an image under its class, and remember when; returns the copy.

        Args:
            image: to be copied.
            label: its class.
            new: whether the class may be one that there is not yet.
            now: the time.

        Raises:
            DataError: the image cannot be read, or there is no such class.
            DiskError: the disk is full; nothing was labelled.
        """
        try:
            load_image(image, _SIDE)
        except (*UNREADABLE, OSError) as error:
            raise DataError(f"'{image}' cannot be read as an image: {error}") from error
        if label not in self.classes and not new:
            raise DataError(
                f"no class '{label}'; there are {', '.join(self.classes)}; --new makes a new one"
            )
        if not label or label != Path(label).name or label.startswith("."):
            raise DataError(f"'{label}' cannot be the name of a folder, so of no class")
        now = now or datetime.now(UTC)
        copy = self._copy(image, label, now)
        file = str(copy.relative_to(self._root))
        line = _Line(file=file, label=label, when=now, content=sha256_of(copy))
        # a line of its own, also where a power cut has left half of one
        append(self._path, b"\n" + line.model_dump_json().encode())
        sync(self._path)
        self._contents = None
        return copy

    def has(self, image: Path) -> bool:
        """Whether this very image was labelled before, under whatever name."""
        if self._contents is None:
            self._contents = {line.content for line in self._lines()}
        return image.is_file() and sha256_of(image) in self._contents

    def _copy(self, image: Path, label: str, now: datetime) -> Path:
        folder = self._root / label
        copy = folder / f"field-{now:%Y%m%dT%H%M%S%f}{image.suffix.lower()}"
        half = copy.with_name(f".{copy.name}")
        try:
            folder.mkdir(exist_ok=True)
            shutil.copyfile(image, half)
            sync(half)
            half.replace(copy)
            # shots are put in the order in which they were taken
            os.utime(copy, (image.stat().st_atime, image.stat().st_mtime))
        except OSError as error:
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
            why = error.strerror or error
            raise DiskError(f"cannot copy '{image}' to '{folder}': {why}; make room") from error
        sync(folder)
        return copy

    def rename(self, old: str, new: str) -> None:
        """Give a class another name.

        What serves says the old one until the next version is put in use: the classifier is fitted
        anew each time.

        Raises:
            DataError: there is no such class, or one of the new name.
        """
        if old not in self.classes or new in self.classes or new != Path(new).name or not new:
            raise DataError(
                f"cannot rename '{old}' to '{new}'; there are {', '.join(self.classes)}"
            )
        (self._root / old).rename(self._root / new)
        sync(self._root)

    def since(self, moment: datetime, most: int) -> tuple[Part, tuple[str, ...]]:
        """Images labelled after a moment, the last ``most`` of them, and the classes they index."""
        classes = self.classes
        chosen = [
            (self._root / line.file, classes.index(line.label))
            for line in self._lines()
            if line.when > moment and line.label in classes and (self._root / line.file).is_file()
        ][-most:]
        labels = np.array([label for _, label in chosen], dtype=np.int64)
        return Part(tuple(path for path, _ in chosen), labels), classes

    def _lines(self) -> list[_Line]:
        """All lines; one that a power cut has cut off, or that is damaged, is left out."""
        if not self._path.is_file():
            return []
        found = []
        for text in self._path.read_bytes().split(b"\n"):
            if not text.strip():
                continue
            try:
                found.append(_Line.model_validate_json(text))
            except (ValidationError, json.JSONDecodeError):
                log.warning("a line of '%s' is damaged and is left out", self._path)
        return found
