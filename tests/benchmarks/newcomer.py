"""A farm that comes late: does it lose by joining a backbone that others have pruned?

``make bench-newcomer`` needs the photographs and the weights beside the project. For each of five
species nine farms run four rounds without it, once dense and once down to half of the MACs by one
cut after the third, with what recovery.py calls patient; then the tenth joins with 20 images a
class. It fits its classifier (probe), and makes the backbone its own (adapted) as
``fieldfed-client adapt`` does: by three rounds alone, of the dense backbone, or of the newest that
the nine had before the cut, which then tells what is left. A run takes six minutes on two idle
cores, all of them an hour; two terminals share them out as those of bench-pruning do.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from client.adapt import adapt
from client.base import Base
from common import backbone, fit
from common.config import TrainConfig
from common.images import FarmFolder, Purpose, open_folder
from common.precision import bf16_supported
from common.spec import ModelSpec
from server.compare import paired_bootstrap
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.recovery import DENSE, PATIENT, RECIPES, plan_of

SPECIES = ("coffee", "grape", "potato", "rice", "seedlings")
"""Stated beforehand: near ones and distant ones, two on which defaults were chosen."""
SEED, ROUNDS, CUT_AFTER, RATIO = 0, 4, 3, 0.5
PER_CLASS, ADAPT_ROUNDS = 20, 3
PROBE, ADAPTED = "probe", "adapted"


def cell(root: Path, species: str, ratio: float) -> Cell:
    """Nine farms play, the tenth joins."""
    folder = root / f"{species}-{ratio:g}"
    others = [name for name in plants.farm_names() if name != species]
    if not (folder / "model.safetensors").is_file():
        plan = plan_of(DENSE if ratio == 1 else PATIENT, ratio)
        plants.play(
            *(TrainConfig(), ROUNDS, SEED),
            farms=others,
            plan=plan if ratio == 1 else plan.model_copy(update={"warmup": CUT_AFTER}),
            keep=folder,
            recovery=None if ratio == 1 else RECIPES[PATIENT].recovery,
        )
    return {"species": species, "ratio": ratio, "correct": plants.packed_by(join(folder, species))}


def join(folder: Path, species: str) -> dict[str, plants.Correct]:
    """What the newcomer gets right on its test part: at once, and with what it made its own."""
    config, _ = plants.farm_config(folder, species, SEED, PER_CLASS)
    images = open_folder(config.farm.data, per_class=PER_CLASS, seed=config.farm.seed)
    model, spec = backbone.load_backbone(folder / "model.safetensors")
    whole = backbone.load_backbone(folder / "dense.safetensors")
    base = Base(model, spec, backbone.digest(model, spec))
    fuller = None if whole[1] == spec else whole
    return {
        label: {species: _right(base, images, fuller, rounds)}
        for label, fuller, rounds in ((PROBE, None, 0), (ADAPTED, fuller, ADAPT_ROUNDS))
    }


def _right(
    base: Base,
    images: FarmFolder,
    fuller: tuple[VisionTransformer, ModelSpec] | None,
    rounds: int,
) -> plants.Flags:
    made = adapt(base, images, fuller, rounds=rounds, seed=SEED, autocast=bf16_supported())
    found = fit.extract(made.model, images.open_test(Purpose.REPORT), made.spec)
    return fit.evaluate(made.classifier, *found).correct


def row(species: str, dense: Mapping[str, Cell], pruned: Mapping[str, Cell]) -> Cell:
    """A species: accuracies, and what the pruned backbone costs the newcomer."""
    line: Cell = {"species": species}
    for label in (PROBE, ADAPTED):
        pair = [plants.unpacked(one[species]["correct"][label]) for one in (dense, pruned)]
        interval = paired_bootstrap(pair[1], pair[0])
        values = [float(one[species].mean()) for one in pair]
        line[label] = {"dense": values[0], "pruned": values[1], "change": interval._asdict()}
    # the figures of the acceptance: what the farm has once it has joined
    return line | {"dense": line[ADAPTED]["dense"], "pruned": line[ADAPTED]["pruned"]}


def main() -> None:
    """All cells, then the table."""
    plants.require()
    cells, root = Cells("newcomer"), Path("bench-work/newcomer")
    done: dict[float, dict[str, Cell]] = {1.0: {}, RATIO: {}}
    complete = True
    for species in SPECIES:
        for ratio, found in done.items():
            made = cells.run(f"{species} {ratio:g}", partial(cell, root, species, ratio))
            complete = complete and made is not None
            if made is not None:
                found[species] = made
    if not complete:
        unfinished("bench-newcomer")
    rows: Sequence[Cell] = [row(species, done[1.0], done[RATIO]) for species in SPECIES]
    for line in rows:
        print(json.dumps(line))
    print(f"figures: {cells.finish({'rows': rows}, (SEED,), 'make bench-newcomer')}")


if __name__ == "__main__":
    main()
