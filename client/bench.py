"""Models side by side: what they cost on this machine, and how often they are right.

Latency is that of one image, decoded and normalised beforehand, at one thread and at all of them;
models take turns (common/latency.py). Memory is that of a process of its own (client/footprint.py).
Images are those of a folder laid out as classes, CLASS/*.jpg, their names the model's own.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from client.footprint import peak_bytes
from client.infer import images_in
from client.subjects import Run, Subject
from common.duplicates import UNREADABLE
from common.errors import DataError
from common.latency import Latency, compared
from common.pixels import Floats, load_image, normalise

log = logging.getLogger(__name__)

Labelled = Sequence[tuple[Path, str]]
"""Images and the classes that they are of."""


@dataclass(frozen=True)
class Row:
    """What was measured of a model; ratios are those to the first one, None what was not told.

    ``threads`` are all that this machine has; latencies without "1thread" are those of them.
    """

    model: str
    engine: str
    precision: str
    image_size: int
    file_bytes: int
    macs: int | None
    parameters: int | None
    latency_ms_1thread_p50: float
    latency_ms_1thread_p95: float
    latency_ratio_1thread: float
    threads: int
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ratio: float
    peak_memory_bytes: int | None
    accuracy: float | None
    images: int


def measured(subjects: Sequence[Subject], images: Labelled, seconds: float) -> list[Row]:
    """Measure all of them.

    Args:
        subjects: the first is what the others are compared with.
        images: to be right about; none: no accuracy.
        seconds: of measuring latency, per model.

    Raises:
        ModelError: one of them cannot be run here.
        DataError: a class that a model does not know, or not one image can be read.
    """
    threads, half = _threads(), seconds * len(subjects) / 2
    one, every = (_latencies(subjects, count, half) for count in (1, threads))
    return [
        _row(name, subject, alone, together, images)
        for name, subject, alone, together in zip(
            _names(subjects), subjects, one, every, strict=True
        )
    ]


def _threads() -> int:
    """All that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _names(subjects: Sequence[Subject]) -> list[str]:
    """Names that tell the models apart: with the side of their images where they need it."""
    names = [one.name for one in subjects]
    return [
        f"{one.name} {one.image_size} px" if names.count(one.name) > 1 else one.name
        for one in subjects
    ]


def _latencies(subjects: Sequence[Subject], threads: int, seconds: float) -> list[Latency]:
    runs = [subject.ready(threads) for subject in subjects]
    empty = [np.zeros((1, 3, one.image_size, one.image_size), np.float32) for one in subjects]
    return compared([partial(run, x) for run, x in zip(runs, empty, strict=True)], seconds)


def _row(name: str, subject: Subject, alone: Latency, together: Latency, images: Labelled) -> Row:
    cost, judged = subject.cost(), bool(images and subject.classes)
    right, read = _right(subject, images) if judged else (0, 0)
    return Row(
        model=name,
        engine=subject.engine,
        precision=subject.precision,
        image_size=subject.image_size,
        file_bytes=subject.file_bytes,
        macs=cost.macs if cost else None,
        parameters=cost.parameters if cost else None,
        latency_ms_1thread_p50=1000 * alone.p50,
        latency_ms_1thread_p95=1000 * alone.p95,
        latency_ratio_1thread=alone.ratio,
        threads=_threads(),
        latency_ms_p50=1000 * together.p50,
        latency_ms_p95=1000 * together.p95,
        latency_ratio=together.ratio,
        peak_memory_bytes=peak_bytes(subject),
        accuracy=right / read if judged else None,
        images=read,
    )


# --- images --------------------------------------------------------------------------------------


def labelled(folder: Path) -> list[tuple[Path, str]]:
    """All images of CLASS/*.jpg; raises DataError where there is none."""
    classes = [one for one in sorted(folder.glob("*")) if one.is_dir()]
    found = [(image, one.name) for one in classes for image in images_in(one)]
    if not found:
        raise DataError(f"no images in '{folder}'; it takes a folder per class, CLASS/*.jpg")
    return found


def _right(subject: Subject, images: Labelled) -> tuple[int, int]:
    """How many images a model is right about, and how many could be read."""
    strange = sorted({name for _, name in images} - set(subject.classes))
    if strange:
        raise DataError(
            f"{subject.name} knows no class '{strange[0]}', only {', '.join(subject.classes)}; "
            "name the folders of --images so"
        )
    run, right, read = subject.ready(_threads()), 0, 0
    for path, name in images:
        try:
            said = _said(run, subject, path)
        except UNREADABLE as error:
            log.warning("'%s' cannot be read and is left out: %s", path, error)
            continue
        right, read = right + (said == name), read + 1
    if not read:
        raise DataError(f"not one of the {len(images)} images can be read")
    return right, read


def _said(run: Run, subject: Subject, path: Path) -> str:
    image: Floats = normalise(load_image(path, subject.image_size)[None], subject)
    return subject.classes[int(run(image)[0].argmax())]
