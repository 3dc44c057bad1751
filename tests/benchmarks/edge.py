"""What a model costs on a device, and what it is right about: tokens, linear attention, students.

``make bench-edge`` needs the photographs and the weights beside the project. ViT-S of the shared
weights at 140 px (10 x 10 patches), 40 images per class, the five development farms, two seeds,
whole test parts; differences are paired on the same images.

    backbones   runs of the product's own rounds in the lab, federated over the farms: three rounds
                from the shared weights, and from what those left for what is pruned
    students    local, 60 epochs at each farm from random weights and 30 from weights of its own,
                with the farm's dense backbone as teacher and without
    latency     one interleaved run, batch 1, in ONNX Runtime and torch, at one thread and at all
    parity      logits of torch and ONNX Runtime on test images
    MACs        counted from the specs at 140, 224, 336 and 672 px, nothing trained

On two cores backbones take two to ten minutes each, students nine with a teacher and five alone,
157 in all: call it again where two hours were too few, cells go by importance. Latency means
something on an idle machine alone: it is the last cell, and ``ONLY=speed`` measures it again.
Frontier cells have one seed.
"""

import json
import os
from collections.abc import Sequence
from functools import partial

from tests.benchmarks import plants
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.edge_parity import parity_cell
from tests.benchmarks.edge_runs import SIDE, VARIANTS, Scale, run, saved
from tests.benchmarks.edge_speed import speed_cell
from tests.benchmarks.edge_students import STUDENTS, lessons
from tests.benchmarks.edge_table import by_variant, students, table, targets

SIDES = (SIDE, 224, 336, 672)


def backbones(cells: Cells, scale: Scale) -> list[Cell | None]:
    """All runs: the first seed of what matters, the other seeds of it, then the frontier."""
    found = []
    main = [one for one in VARIANTS if not one.once]
    order = [(one, seed) for seed in scale.seeds for one in main]
    order += [(one, scale.seeds[0]) for one in VARIANTS if one.once]
    for variant, seed in order:
        work = partial(run, scale, variant.name, seed)
        found.append(cells.run(f"{variant.name}, seed {seed}", work))
    return found


def costs() -> Cell:
    """MACs of every variant that is not pruned, by the side of images."""
    plain = [one for one in VARIANTS if one.parent is None]
    return {"kind": "macs", "rows": [line for one in plain for line in saved(one, SIDES)]}


def speed(cells: Cells, scale: Scale, made: Sequence[Cell]) -> Cell | None:
    """Latency of what the targets speak of."""
    specs = {
        str(cell["model"]): str(cell["spec"])
        for cell in made
        if cell["kind"] == "backbone"
        and cell["seed"] == scale.seeds[0]
        and by_variant(cell["model"])
    }
    names = [name for name in STUDENTS if any(cell["model"] == name for cell in made)]
    return cells.run("speed", partial(speed_cell, scale, specs, names))


def result(made: Sequence[Cell], macs: Cell, same: Cell, timed: Cell) -> Cell:
    """All figures."""
    rows = table(made, timed)
    return {
        "rows": rows,
        "targets": targets(rows, macs["rows"]),
        "macs": macs["rows"],
        "students": students(made),
        "parity": same["rows"],
        "latency": timed["rows"],
        "commits": sorted({str(cell["commit"]) for cell in (*made, macs, same, timed)}),
    }


def play(scale: Scale, cells: Cells) -> Cell | None:
    """All cells, then all figures; None when the time was over before."""
    macs = cells.run("MACs", costs)
    runs = [*backbones(cells, scale), *lessons(cells, scale)]
    made = [one for one in runs if one]
    same = cells.run("parity", partial(parity_cell, scale))
    if len(made) < len(runs) or macs is None or same is None:
        return None
    timed = speed(cells, scale, made)
    return None if timed is None else result(made, macs, same, timed)


def main() -> None:
    """All cells, then the tables."""
    plants.require()
    scale, cells = Scale(), Cells("edge")
    if os.environ.get("ONLY") == "speed":
        cells.done.pop("speed", None)  # a later line of a cell stands for the earlier one
    figures = play(scale, cells)
    if figures is None:
        unfinished("bench-edge")
    for line in (*figures["rows"], *figures["targets"], *figures["students"]):
        print(json.dumps(line))
    print(f"figures: {cells.finish(figures, scale.seeds, 'make bench-edge')}")


if __name__ == "__main__":
    main()
