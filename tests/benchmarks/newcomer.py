"""A farm that comes late: does it lose by joining a backbone that others have pruned?

``make bench-newcomer`` needs the photographs and the weights beside the project. For each of five
species nine farms run four rounds without it, once dense and once down to half of the MACs by one
cut, with what recovery.py calls taught; then the tenth joins with 20 images a class, fits its
classifier (probe), and adapts for three rounds of its own. A run takes about four minutes on two
idle cores, all of them forty; two terminals share them out as those of bench-pruning do.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from client.farm import Farm
from common import backbone
from common.compress import compress
from common.config import TrainConfig
from common.mask import Mask
from common.messages import EvaluateReply, EvaluateRequest
from server.compare import paired_bootstrap
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.recovery import TAUGHT, plan_of, recovery_of

SPECIES = ("coffee", "grape", "potato", "rice", "seedlings")
"""Stated beforehand: near ones and distant ones, two on which defaults were chosen."""
SEED, ROUNDS, RATIO = 0, 4, 0.5
PER_CLASS, ADAPT_ROUNDS = 20, 3
PROBE, ADAPTED = "probe", "adapted"


def cell(root: Path, species: str, ratio: float) -> Cell:
    """Nine farms play, the tenth joins."""
    folder = root / f"{species}-{ratio:g}"
    others = [name for name in plants.farm_names() if name != species]
    path = folder / "model.safetensors"
    if not path.is_file():
        name = "dense" if ratio == 1 else TAUGHT
        plants.play(
            *(TrainConfig(), ROUNDS, SEED),
            farms=others,
            plan=plan_of(name, ratio),
            keep=folder,
            recovery=recovery_of(name),
        )
    reports = join(path, folder, species)
    return {"species": species, "ratio": ratio, "correct": plants.packed_by(reports)}


def join(path: Path, folder: Path, species: str) -> dict[str, plants.Correct]:
    """What the newcomer gets right on its test part: at once, and after rounds of its own."""
    model, spec = backbone.load_backbone(path)
    body = np.frombuffer(backbone.pack(model, spec), np.uint8)
    config, state = plants.farm_config(folder, species, SEED, PER_CLASS)
    farm = Farm.open(config, state)
    found: dict[str, plants.Correct] = {}
    for label, rounds in ((PROBE, 0), (ADAPTED, ADAPT_ROUNDS)):
        request = EvaluateRequest(
            run=1,
            round=0,
            attempt=1,
            seed=SEED,
            base=backbone.digest(model, spec),
            mask=Mask.dense(spec).digest,
            body_kind="full",
            body=compress(body),
            label=label,
            local_rounds=rounds,
            train=TrainConfig(),
        )
        reply = farm.handle(request)
        if not isinstance(reply, EvaluateReply):
            raise SystemExit(f"{species}: {reply}")
        report = json.loads((state / "reports" / f"{label}.json").read_text())
        found[label] = {species: np.array(report["correct"], dtype=np.bool_)}
    return found


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
