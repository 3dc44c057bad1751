"""What a round costs on a farm's link, and what it teaches: settings of update coding compared.

``make bench-bytes`` needs the photographs and the weights beside the project. Ten farms, 40 images
per class. Accuracy is that of six rounds in the lab (the product's own rounds and farms, two at a
time), on the whole test parts, in two seeds; differences are paired on the same images. The default
and what it is measured against, full fp32, have twenty rounds too. Six rounds take 6 to 12 minutes
on two idle cores, all about five hours: call it again until it ends. Bytes are those of real
processes (wire.py); ``ONLY=wire`` or ``ONLY=accuracy`` does one of the two.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TypeAlias

import torch

from common import backbone
from common.config import TrainConfig
from server.compare import Interval, paired_bootstrap, verdict
from tests.benchmarks import plants, wire
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.plants import Flags
from tests.system.slowlink import RURAL

Outcomes: TypeAlias = dict[str, dict[str, list[Flags]]]

ROUNDS, SEASON, SEEDS = 6, 20, (0, 1)
DEFAULT, FEDAVG = "lora r=1 4 bit", "full fp32 (FedAvg)"
SETTINGS = {
    DEFAULT: TrainConfig(),
    "bias 4 bit": TrainConfig(trainable="bias"),
    "bias int8": TrainConfig(trainable="bias", update_bits=8),
    "bias fp32": TrainConfig(trainable="bias", update_bits=32),
    FEDAVG: TrainConfig(trainable="full", update_bits=32),
    "lora r=8 int8": TrainConfig(trainable="lora", rank=8, update_bits=8),
    "full top 1 % int8": TrainConfig(trainable="full", top=0.01, update_bits=8),
    "full int8": TrainConfig(trainable="full", update_bits=8),
}
WIRE_FARMS = ("apple", "coffee", "rice")
"""A farm's bytes do not depend on how many others there are, but for polls while it waits."""
EXTRA = {
    "season": {"rounds": SEASON, "idle_seconds": 100.0},
    "prune event": {"rounds": 3, "prune_heads": 0.4, "prune_events": 1, "warmup": 1},
    "rural link": {"rounds": 2, "conditions": RURAL},
}
BASELINES = {"probe": "frozen probe", "local": "local only"}


def accuracy_cell(
    setting: str, seed: int, rounds: int, baselines: bool, local_rounds: int = 0
) -> Cell:
    """One run, the frozen probe and training alone beside it where asked for."""
    alone = rounds if baselines else local_rounds
    judged = plants.play(SETTINGS[setting], rounds, seed, probe=baselines, local_rounds=alone)
    accuracy = {
        label: {farm: float(correct.mean()) for farm, correct in farms.items()}
        for label, farms in judged.reports.items()
    }
    return {
        "setting": setting,
        "seed": seed,
        "rounds": rounds,
        "farms": accuracy,
        "correct": judged.packed(),
    }


def alone_cell() -> Cell:
    """Training alone for as many rounds as a season has; what the run shares does not count."""
    cell = accuracy_cell(DEFAULT, SEEDS[0], 1, baselines=False, local_rounds=SEASON)
    for part in ("farms", "correct"):
        del cell[part]["model"]
    return cell | {"rounds": SEASON}


def wire_cell(setting: str) -> Cell:
    """Three real rounds with a setting, or one of the extra runs of the default."""
    options = EXTRA.get(setting, {"rounds": 3})
    train = SETTINGS.get(setting, SETTINGS[DEFAULT])
    measured = wire.measure(train, farms=WIRE_FARMS, **options)  # type: ignore[arg-type]
    return {"setting": setting, "wire": vars(measured)}


def table(learned: Sequence[Cell], wired: Sequence[Cell], rounds: int = ROUNDS) -> list[Cell]:
    """One row per setting and baseline, the best first, each against it and training alone."""
    outcomes: Outcomes = {}
    for cell in sorted(learned, key=lambda one: int(one["seed"])):
        for label, farms in cell["correct"].items():
            name = BASELINES.get(label) or str(cell["setting"])
            for farm, correct in plants.unpacked(farms).items():
                outcomes.setdefault(name, {}).setdefault(farm, []).append(correct)
    costs = {str(cell["setting"]): ordinary(cell["wire"]["rounds"]) for cell in wired}
    rows = [
        _row(name, farms, rounds, *costs.get(name, (0.0, 0.0))) for name, farms in outcomes.items()
    ]
    rows.sort(key=lambda row: -float(row["mean_accuracy"]))
    best, alone = outcomes[rows[0]["setting"]], outcomes[BASELINES["local"]]
    for row in rows:
        for name, other in (("best", best), ("alone", alone)):
            interval = paired_bootstrap(outcomes[row["setting"]], other)
            row[f"against_{name}"] = {**interval._asdict(), "verdict": _words(interval)}
    return rows


def ordinary(rounds: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Bytes up and down of a round; before the first there is no step to be sent down."""
    return fmean(one["up"] for one in rounds), fmean(one["down"] for one in rounds[1:])


def _row(name: str, farms: dict[str, list[Flags]], rounds: int, up: float, down: float) -> Cell:
    means = plants.by_seed(farms)
    return {
        "setting": name,
        "rounds": rounds,
        "up_bytes_per_round": round(up),
        "down_bytes_per_round": round(down),
        "total_bytes": round(rounds * (up + down)),
        "mean_accuracy": fmean(means),
        "per_seed": means,
        "farms": plants.by_farm(farms),
        "seeds": list(SEEDS[: len(means)]),
    }


def _words(interval: Interval) -> str:
    return "the same" if interval == Interval(0, 0, 0) else verdict(interval)


def season(rounds: Sequence[dict[str, float]], idle: dict[str, float]) -> Cell:
    """What a farm that holds the first backbone pays for a season."""
    up, down = (sum(one[way] for one in rounds) for way in ("up", "down"))
    return {"rounds": len(rounds), "up": up, "down": down, "total": up + down, "idle_100_s": idle}


def rural(measured: Cell) -> Cell:
    """A round on a bad link beside the least that FedAvg in fp32 would take there."""
    with torch.device("meta"):
        numbers = backbone.parameters(backbone.build(backbone.dense_spec(plants.NAME, plants.SIDE)))
    rate = RURAL.bits_per_second or 1.0
    return {
        "rounds": measured["rounds"],
        "resets": measured["resets"],
        "conditions": vars(RURAL),
        "fedavg_fp32_seconds": 2 * 4 * numbers * 8 / rate,
    }


def main() -> None:
    """All cells, then the table."""
    plants.require()
    cells, only = Cells("bytes"), os.environ.get("ONLY")
    wired: list[Cell | None] = []
    learned: list[Cell | None] = []
    if only != "accuracy":
        names = dict.fromkeys((DEFAULT, *EXTRA, *SETTINGS))  # what matters most first
        wired = [cells.run(f"wire: {name}", partial(wire_cell, name)) for name in names]
    if only != "wire":
        for seed in SEEDS:
            for setting in SETTINGS:
                work = partial(accuracy_cell, setting, seed, ROUNDS, setting == DEFAULT)
                learned.append(cells.run(f"{setting}, seed {seed}", work))
        for setting in (DEFAULT, FEDAVG):
            work = partial(accuracy_cell, setting, SEEDS[0], SEASON, False)
            learned.append(cells.run(f"{setting}, seed {SEEDS[0]}, {SEASON} rounds", work))
        learned.append(cells.run(f"alone, seed {SEEDS[0]}, {SEASON} rounds", alone_cell))
    if only is not None or None in (*wired, *learned):
        unfinished("bench-bytes")
    figures = result([one for one in learned if one], [one for one in wired if one])
    for row in figures["rows"]:
        print(json.dumps({key: value for key, value in row.items() if key != "farms"}))
    print(f"figures: {cells.finish(figures, SEEDS, 'make bench-bytes')}")


def result(learned: Sequence[Cell], wired: Sequence[Cell]) -> Cell:
    """All figures."""
    by_name = {str(cell["setting"]): cell["wire"] for cell in wired}
    lengths = {
        count: [c for c in learned if c.get("rounds", ROUNDS) == count]
        for count in (ROUNDS, SEASON)
    }
    return {
        "rows": [row for count in (ROUNDS, SEASON) for row in table(lengths[count], wired, count)],
        "season": season(by_name["season"]["rounds"], by_name["season"]["idle"]),
        "prune_event": by_name["prune event"]["rounds"],
        "rural_link": rural(by_name["rural link"]),
        "commits": sorted({str(cell["commit"]) for cell in (*learned, *wired)}),
    }


if __name__ == "__main__":
    main()
