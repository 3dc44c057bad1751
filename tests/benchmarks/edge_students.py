"""Small convolutional networks taught by a farm's own dense backbone, or by labels alone.

Local: no student is shared between farms. Teacher is the dense backbone of the same seed's run with
the classifier that the farm fits to it. With and without a teacher, a student has the same epochs,
images, augmentation and learning rates; the rate is the one of the grid with the best mean on the
decide parts in the first seed. The steps are the product's own (client/distil.py).
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from client.distil import DistilConfig, portable_student, teach
from client.portable import calibrated
from client.served import About
from client.serving import Bundle
from common import backbone, fit
from common.backbone import parameters
from common.cost import cost_of
from common.export import exported
from common.manifest import Manifest
from common.precision import bf16_supported
from common.student import Student
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell, Cells
from tests.benchmarks.edge_runs import MODEL, SIDE, Scale, farm_folder, folder_of, judged, run
from tests.benchmarks.plants import Flags
from tests.lab.versions import add_version, registry_in

LITE = plants.SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
STUDENTS: dict[str, Path | None] = {
    "mobilenetv3_small_100": None,
    "tf_efficientnet_lite0": LITE,
}
"""With the weights that they begin with; None: random."""


@dataclass(frozen=True)
class Lesson:
    """What a student is taught with."""

    student: str
    taught: bool
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its cell."""
        how = "taught" if self.taught else "alone"
        return f"{self.student} {how}, lr {self.lr:g}, seed {self.seed}"


def lessons(cells: Cells, scale: Scale) -> list[Cell | None]:
    """All of them: the grid in the first seed, then the best rate in the others."""
    found: list[Cell | None] = []
    for student, weights in STUDENTS.items():
        if weights is not None and not weights.is_file():
            print(f"no weights at '{weights}': {student} is left out", flush=True)
            continue
        for taught in (True, False):
            grid = [Lesson(student, taught, lr, scale.seeds[0]) for lr in scale.rates]
            first = [cells.run(one.name, partial(lesson, scale, one)) for one in grid]
            found += first
            done = [cell for cell in first if cell]
            if len(done) < len(grid):
                continue
            lr = best(done)
            for seed in scale.seeds[1:]:
                other = Lesson(student, taught, lr, seed)
                found.append(cells.run(other.name, partial(lesson, scale, other)))
    return found


def best(grid: list[Cell]) -> float:
    """The learning rate that was right most often on decide parts."""
    return float(max(grid, key=lambda cell: cell["decide"])["lr"])


def lesson(scale: Scale, about: Lesson) -> Cell:
    """One student at every farm, judged on whole test parts in fp32 and in 8 bits."""
    teacher = folder_of(scale, "dense", about.seed) / MODEL
    if not teacher.is_file():
        run(scale, "dense", about.seed)
    manifest = _manifest(teacher)
    with plants.workers() as pool:
        work = partial(_farm, scale, about, teacher, manifest)
        found = dict(zip(scale.farms, pool.map(work, scale.farms), strict=True))
    student = Student(about.student).eval()
    curve = np.mean([one.curve for one in found.values()], axis=0)
    return {
        "kind": "student",
        "model": about.student,
        "taught": about.taught,
        "lr": about.lr,
        "seed": about.seed,
        "curve": [round(float(share), 4) for share in curve],
        "macs": cost_of(exported(student, SIDE), SIDE).macs,
        "parameters": parameters(student),
        "decide": fmean(max(one.curve) for one in found.values()),
        "file_bytes": max(one.sizes[0] for one in found.values()),
        "correct": plants.packed_by({"model": {n: one.correct[0] for n, one in found.items()}}),
        "int8": {
            "file_bytes": max(one.sizes[1] for one in found.values()),
            "correct": plants.packed_by({"model": {n: one.correct[1] for n, one in found.items()}}),
        },
    }


def _manifest(path: Path) -> Manifest:
    """A version of a backbone, as a farm would serve with it; made once."""
    kept = path.with_name("manifest.json")
    if not kept.is_file():
        registry = registry_in(path.with_name("registry"))
        add_version(registry, *backbone.load_backbone(path))
        kept.write_text(registry.manifest(1).model_dump_json())
    return Manifest.model_validate_json(kept.read_text())


@dataclass(frozen=True, eq=False)
class _Learnt:
    """Decide accuracy by epoch; in fp32 and in 8 bits: bytes, and which test images were right."""

    curve: tuple[float, ...]
    sizes: tuple[int, int]
    correct: tuple[Flags, Flags]


def _farm(scale: Scale, about: Lesson, path: Path, manifest: Manifest, name: str) -> _Learnt:
    model, spec = backbone.load_backbone(path)
    folder = farm_folder(scale, name, about.seed)
    classifier = fit.fit_classifier(*fit.extract(model, folder.fit, spec), len(folder.classes))
    version = About(
        digest="0" * 64,
        manifest=manifest,
        classes=folder.classes,
        temperature=1.0,
        threshold=0.0,
        accuracy=0.0,
        f1=0.0,
        committed=datetime.now(UTC),
    )
    teacher = Bundle(version, model, classifier.requires_grad_(False))
    weight = 1.0 if about.taught else 0.0
    begun = STUDENTS[about.student]
    config = DistilConfig(
        student=about.student,
        weights=begun,
        epochs=scale.epochs[begun is not None],
        lr=about.lr,
        alpha=weight,
        beta=weight,
        seed=about.seed,
    )
    made = teach(teacher, folder, config, autocast=bf16_supported())
    plain = portable_student(made, teacher)
    pair = plain, calibrated(plain, folder.fit)
    sizes = [len(one.graph) + 4 * int(np.size(one.weight)) for one in pair]
    return _Learnt(
        made.curve,
        (sizes[0], sizes[1]),
        (judged(pair[0], folder), judged(pair[1], folder)),
    )
