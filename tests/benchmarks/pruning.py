"""What a cut costs: criteria, compensation and classifier compared, without and with training.

``make bench-pruning`` needs the photographs and the weights beside the project. Ten farms, 40
images per class. For each seed: three rounds of warm-up, then that one checkpoint is cut to 70 ...
30 % of its MACs at once, and in events with rounds of recovery between them (recovery.py). All is
judged on every farm's whole test part; differences are paired on the same images. Two idle cores
need some five minutes for a warm-up, one for a cut, ten for a run with recovery; call it again
until it ends, or in two terminals at once with ``PROCESSES=1 OMP_NUM_THREADS=1``, which keeps both
cores busy all the time. ``ONLY=oneshot`` or ``ONLY=recovery`` does one of the two.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

import torch

from common.budget import Budget, choose_mask
from common.mask import Mask
from common.plan import Criterion
from common.surgery import Method
from server.compare import paired_bootstrap, verdict
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.frontier import Curve, draw
from tests.benchmarks.oneshot import (
    FARMS,
    FIXED,
    PLAIN,
    REFITTED,
    TORCH_PRUNING,
    Bench,
    Checkpoint,
    summary,
)
from tests.benchmarks.plants import Flags, Seeds
from tests.benchmarks.recovery import CASES, EVENTS, recovery_cell

SEEDS = (0, 1)
RATIOS = (0.5, 0.7, 0.3, 0.6, 0.4)
"""In the order of their cells: what matters most first."""
CRITERIA: tuple[str, ...] = (*get_args(Criterion), FARMS, PLAIN, TORCH_PRUNING)
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT: Criterion = "taylor"
DENSE = "dense"


class Runs:
    """The checkpoint and the farms of one seed, made when the first cell needs them."""

    def __init__(self, seed: int, pool: ProcessPoolExecutor, root: Path) -> None:
        self.checkpoint = Checkpoint(root / f"seed{seed}", seed)
        self.pool = pool
        self._bench: Bench | None = None

    @property
    def bench(self) -> Bench:
        """With the checkpoint made."""
        if self._bench is None:
            self.checkpoint.make()
            self._bench = Bench(self.checkpoint, plants.farm_names(), self.pool)
        return self._bench


def dense_cell(runs: Runs, seed: int) -> Cell:
    """The checkpoint before any cut."""
    judged = runs.bench.judge_dense()
    print(f"{DENSE}, seed {seed}: {summary(judged)}", flush=True)
    return {"criterion": DENSE, "seed": seed, "correct": {"none": plants.packed_by(judged)}}


def cut_cell(runs: Runs, criterion: str, ratio: float, seed: int) -> Cell:
    """One mask with every compensation and both classifiers."""
    cut = runs.bench.cut(criterion, Budget(macs_kept=ratio), METHODS)
    for method, judged in cut.judged.items():
        print(f"{criterion} {ratio:g} {method}, seed {seed}: {summary(judged)}", flush=True)
    return {
        "criterion": criterion,
        "ratio": ratio,
        "seed": seed,
        "heads_kept": cut.mask.heads_kept_ratio,
        "neurons_kept": cut.mask.neurons_kept_ratio,
        "correct": {method: plants.packed_by(judged) for method, judged in cut.judged.items()},
    }


def event_cell(runs: Runs, seed: int) -> Cell:
    """What a prune event costs the server on one core: moments, mask, surgery, compensation.

    The anchors of what is left, which farms align to in the next round, are timed beside it.
    """
    scores = runs.bench.agreed(DEFAULT)
    fresh = Bench(runs.checkpoint, plants.farm_names(), runs.pool)  # has no moments yet
    folder = runs.checkpoint.folder / "event"
    folder.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        dense, budget = Mask.dense(fresh.dense), Budget(macs_kept=RATIOS[0])
        mask = choose_mask(fresh.spare(scores), dense, fresh.dense, budget)
        path = fresh.save_cut(mask, METHODS[-1], folder)
        took = {
            "wall_seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
        }
        begin = time.perf_counter()
        fresh.save_anchors(path)
        took["anchors_wall_seconds"] = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    return {"seed": seed, "ratio": RATIOS[0], **took}


# --- the table -------------------------------------------------------------------------------


def outcomes(cells: Sequence[Cell], method: str, classifier: str) -> dict[str, list[Flags]]:
    """By farm: which images were right, a vector per seed."""
    found: dict[str, list[Flags]] = {}
    for cell in sorted(cells, key=lambda one: int(one["seed"])):
        for farm, correct in plants.unpacked(cell["correct"][method][classifier]).items():
            found.setdefault(farm, []).append(correct)
    return found


def row(cells: Sequence[Cell], method: str, classifier: str, against: Seeds) -> Cell:
    """One line of the table: a criterion at a size, against the dense checkpoint."""
    found = outcomes(cells, method, classifier)
    seeds = plants.by_seed(found)
    interval = paired_bootstrap(found, against)
    return {
        "criterion": cells[0]["criterion"],
        "macs_ratio": cells[0].get("ratio", 1.0),
        "compensation": method,
        "classifier": classifier,
        "rounds_recovery": cells[0].get("rounds", 0),
        "accuracy": fmean(seeds),
        "accuracy_sd": stdev(seeds) if len(seeds) > 1 else None,
        "per_seed": seeds,
        "farms": plants.by_farm(found),
        "seeds": sorted(int(cell["seed"]) for cell in cells),
        "heads_kept": fmean(cell.get("heads_kept", 1.0) for cell in cells),
        "neurons_kept": fmean(cell.get("neurons_kept", 1.0) for cell in cells),
        "against_dense": {**interval._asdict(), "verdict": verdict(interval)},
    }


def rows(dense: Sequence[Cell], cuts: Sequence[Cell]) -> list[Cell]:
    """The whole table: by size, then by criterion."""
    found = []
    grouped: dict[tuple[float, str], list[Cell]] = {}
    for cell in cuts:
        grouped.setdefault((-cell["ratio"], cell["criterion"]), []).append(cell)
    for classifier in (FIXED, REFITTED):
        reference = outcomes(dense, "none", classifier)
        found.append(row(dense, "none", classifier, reference))
        for _, cells in sorted(grouped.items(), key=lambda item: item[0]):
            found += [row(cells, method, classifier, reference) for method in METHODS]
    return found


def comparisons(cuts: Sequence[Cell], ratio: float) -> list[Cell]:
    """The default criterion against every other one at a size, paired on the same images."""
    at = [cell for cell in cuts if cell["ratio"] == ratio]
    by_name = {name: [c for c in at if c["criterion"] == name] for name in CRITERIA}
    found = []
    for classifier in (FIXED, REFITTED):
        for method in METHODS:
            default = outcomes(by_name[DEFAULT], method, classifier)
            for name in CRITERIA:
                if name == DEFAULT:
                    continue
                other = outcomes(by_name[name], method, classifier)
                interval = paired_bootstrap(default, other)
                about = {"default": DEFAULT, "other": name, "macs_ratio": ratio}
                how = {"compensation": method, "classifier": classifier}
                found.append({**about, **how, **interval._asdict(), "verdict": verdict(interval)})
    return found


def recovered(table: Sequence[Cell]) -> list[Cell]:
    """Share of the accuracy lost without compensation that each compensation gives back."""
    dense = {r["classifier"]: r["accuracy"] for r in table if r["criterion"] == DENSE}
    key = ("criterion", "macs_ratio", "classifier")
    plain = {
        tuple(r[k] for k in key): r["accuracy"]
        for r in table
        if r["compensation"] == "none" and r["criterion"] != DENSE
    }
    found = []
    for r in table:
        before = plain.get(tuple(r[k] for k in key))
        if r["compensation"] == "none" or before is None:
            continue
        lost = dense[r["classifier"]] - before
        share = (r["accuracy"] - before) / lost if lost > 0 else None
        found.append({**{k: r[k] for k in (*key, "compensation")}, "share": share})
    return found


def recovery_rows(cells: Sequence[Cell]) -> list[Cell]:
    """Runs with recovery, each against the dense run of the same seeds and rounds."""
    by_case: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        by_case.setdefault((cell["criterion"], cell["ratio"]), []).append(cell)
    dense = {int(cell["seed"]): cell for cell in by_case[DENSE, 1.0]}
    found = []
    for same in by_case.values():
        seeds = sorted(int(cell["seed"]) for cell in same)
        (method,) = same[0]["correct"]
        against = outcomes([dense[seed] for seed in seeds], method, REFITTED)
        found.append(row(same, method, REFITTED, against))
    return found


def one_shot(
    cells: Cells, root: Path
) -> tuple[list[Cell | None], list[Cell | None], list[Cell | None]]:
    """The dense checkpoints, every cut of them, and what the server needs for one."""
    dense: list[Cell | None] = []
    cuts: list[Cell | None] = []
    events: list[Cell | None] = []
    with plants.workers() as pool:
        for seed in SEEDS:
            runs = Runs(seed, pool, root)
            dense.append(cells.run(f"dense, seed {seed}", partial(dense_cell, runs, seed)))
            for ratio in RATIOS:
                for name in CRITERIA:
                    work = partial(cut_cell, runs, name, ratio, seed)
                    cuts.append(cells.run(f"{name} {ratio:g}, seed {seed}", work))
            work = partial(event_cell, runs, seed)
            events.append(cells.run(f"prune event, seed {seed}", work))
    return dense, cuts, events


def recovery(cells: Cells, root: Path) -> list[Cell | None]:
    """Runs that prune in events with recovery between them."""
    found = []
    for name, ratio, seeds in CASES:
        for seed in seeds:
            work = partial(recovery_cell, root, name, ratio, seed)
            found.append(cells.run(f"recovery {name} {ratio:g}, seed {seed}", work))
    return found


def picture(table: Sequence[Cell], path: Path) -> None:
    """Accuracy against MACs with the default compensation and classifiers fitted anew."""
    best = [
        r
        for r in table
        if (r["compensation"], r["classifier"]) == (METHODS[-1], REFITTED)
        and not r["rounds_recovery"]
    ]
    curves: dict[str, Curve] = {
        name: [(r["macs_ratio"], r["accuracy"]) for r in best if r["criterion"] == name]
        for name in CRITERIA
    }
    (level,) = [
        r["accuracy"]
        for r in table
        if r["criterion"] == DENSE and r["classifier"] == REFITTED and not r["rounds_recovery"]
    ]
    draw(path, "Accuracy after one cut, no training, mean of ten farms", curves, level)


def main() -> None:
    """All cells, then the tables and the picture."""
    plants.require()
    cells, root = Cells("pruning"), Path("bench-work/pruning")
    only = os.environ.get("ONLY")
    dense, cuts, events = one_shot(cells, root) if only != "recovery" else ([], [], [])
    recovered_runs = recovery(cells, root) if only != "oneshot" else []
    if only is not None or None in (*dense, *cuts, *events, *recovered_runs):
        unfinished("bench-pruning")
    parts = (dense, cuts, events, recovered_runs)
    figures = result(*([one for one in part if one] for part in parts))
    for line in (*figures["rows"], *figures["comparisons"], *figures["recovered"]):
        print(json.dumps({key: value for key, value in line.items() if key != "farms"}))
    picture(figures["rows"], Path("bench-output/pruning.svg"))
    print(f"figures: {cells.finish(figures, SEEDS, 'make bench-pruning')}")


def result(
    dense: Sequence[Cell], cuts: Sequence[Cell], events: Sequence[Cell], runs: Sequence[Cell]
) -> Cell:
    """All figures."""
    table = rows(dense, cuts)
    return {
        "rows": [*table, *recovery_rows(runs)],
        "comparisons": [line for ratio in sorted(RATIOS) for line in comparisons(cuts, ratio)],
        "recovered": recovered(table),
        "commits": sorted({str(cell["commit"]) for cell in (*dense, *cuts, *events, *runs)}),
        "prune_events": EVENTS,
        "prune_event_on_one_core": [
            {key: value for key, value in cell.items() if key not in ("cell", "commit", "seconds")}
            for cell in events
        ],
    }


if __name__ == "__main__":
    main()
