"""What a round costs on a farm's link, and what it teaches: settings of update coding compared.

``make bench-bytes`` needs the photographs and the weights beside the project. Ten farms, 40 images
per class. Accuracy is that of six rounds in the lab (the product's own rounds and farms, two at a
time), on the whole test parts, in two seeds; differences are paired on the same images. One run
takes 6 to 12 minutes on two idle cores, all of them about three hours: call it again until it ends.
"""

import json
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import numpy as np

from common.config import TrainConfig
from server.compare import Interval, paired_bootstrap, verdict
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell, Cells, unfinished

ROUNDS, SEEDS = 6, (0, 1)
DEFAULT = "bias int8"
SETTINGS = {
    DEFAULT: TrainConfig(),
    "bias fp32": TrainConfig(update_bits=32),
    "bias 4 bit": TrainConfig(update_bits=4),
    "full fp32 (FedAvg)": TrainConfig(trainable="full", update_bits=32),
    "lora r=8 int8": TrainConfig(trainable="lora", rank=8),
    "full top 1 % int8": TrainConfig(trainable="full", top=0.01),
    "full int8": TrainConfig(trainable="full"),
}
BASELINES = {"probe": "frozen probe", "local": "local only"}


def accuracy_cell(setting: str, seed: int) -> Cell:
    """One run; with the default setting also the two baselines."""
    first = setting == DEFAULT
    judged = plants.play(
        SETTINGS[setting], ROUNDS, seed, probe=first, local_rounds=ROUNDS if first else 0
    )
    accuracy = {
        label: {farm: float(correct.mean()) for farm, correct in farms.items()}
        for label, farms in judged.reports.items()
    }
    return {"setting": setting, "seed": seed, "farms": accuracy, "correct": judged.packed()}


def table(cells: Sequence[Cell]) -> list[Cell]:
    """One row per setting and baseline, the best first, each against the best."""
    outcomes: dict[str, dict[str, list[np.ndarray[tuple[int], np.dtype[np.bool_]]]]] = {}
    for cell in sorted(cells, key=lambda one: int(one["seed"])):
        for label, farms in cell["correct"].items():
            name = BASELINES.get(label) or str(cell["setting"])
            for farm, correct in plants.unpacked(farms).items():
                outcomes.setdefault(name, {}).setdefault(farm, []).append(correct)
    rows: list[Cell] = []
    for name, farms in outcomes.items():
        per_farm = {farm: [float(one.mean()) for one in seeds] for farm, seeds in farms.items()}
        seeds = len(next(iter(per_farm.values())))
        means = [fmean(values[index] for values in per_farm.values()) for index in range(seeds)]
        rows.append(
            {
                "setting": name,
                "mean_accuracy": fmean(means),
                "per_seed": means,
                "farms": per_farm,
                "seeds": list(SEEDS[:seeds]),
            }
        )
    rows.sort(key=lambda row: -float(row["mean_accuracy"]))
    best = outcomes[rows[0]["setting"]]
    for row in rows:
        interval = paired_bootstrap(outcomes[row["setting"]], best)
        row["against_best"] = {**interval._asdict(), "verdict": _words(interval)}
    return rows


def _words(interval: Interval) -> str:
    return "the best" if interval == Interval(0, 0, 0) else verdict(interval)


def main() -> None:
    """All cells, then the table."""
    plants.require()
    cells, done = Cells("bytes"), []
    for seed in SEEDS:
        for setting in SETTINGS:
            work = partial(accuracy_cell, setting, seed)
            done.append(cells.run(f"{setting}, seed {seed}", work))
    finished = [cell for cell in done if cell is not None]
    if len(finished) < len(done):
        unfinished("bench-bytes")
        return
    rows = table(finished)
    for row in rows:
        shown = {key: row[key] for key in ("setting", "mean_accuracy", "against_best")}
        print(json.dumps(shown))
    print(f"figures: {cells.finish({'rows': rows}, SEEDS, 'make bench-bytes')}")


if __name__ == "__main__":
    main()
