"""What a cut costs: criteria, compensation and classifier compared, without and with training.

``make bench-pruning`` needs the photographs and the weights beside the project. Ten farms, 40
images per class. For each seed: three rounds of warm-up, then that one checkpoint is cut to 70 ...
30 % of its MACs at once, and in events with rounds of recovery between them (recovery.py). All is
judged on every farm's whole test part; differences are paired on the same images. Two idle cores
need some five minutes for a warm-up, one for a cut, five for a run with recovery, eight where that
takes three epochs a round; call it again until it ends, or in two terminals at once with
``PROCESSES=1 OMP_NUM_THREADS=1``, which keeps both cores busy all the time. ``ONLY=oneshot``,
``recovery``, ``invariance`` or ``splits`` does one of the four.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from common.budget import Budget, choose_mask
from common.mask import Mask
from tests.benchmarks import plants
from tests.benchmarks import pruning_table as table
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.invariance import FEW, PAIR, UNSEEN, invariance_cell
from tests.benchmarks.oneshot import FIXED, REFITTED, Bench, Checkpoint, summary
from tests.benchmarks.pruning_table import CRITERIA, DEFAULT, METHODS
from tests.benchmarks.recovery import CASES, DENSE, EVENTS, recovery_cell
from tests.benchmarks.splits import SEED as SPLIT_SEED
from tests.benchmarks.splits import SHARES, split_cell, split_rows

SEEDS = (0, 1)
RATIOS = (0.5, 0.7, 0.3, 0.6, 0.4)
"""In the order of their cells: what matters most first."""


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


def cut_by(runs: Runs, share: float) -> Cell:
    """One split of the budget between heads and neurons."""
    return split_cell(runs.bench, share)


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


# --- all cells ---------------------------------------------------------------------------------


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


def invariance(cells: Cells, root: Path) -> list[Cell | None]:
    """Where the invariance of heads helps: farms that had no say, and scores by few images."""
    found = []
    with plants.workers() as pool:
        checkpoint = Checkpoint(root / f"seed{SEEDS[0]}", SEEDS[0])
        for case in (UNSEEN, FEW):
            for name in PAIR:
                work = partial(invariance_cell, checkpoint, pool, case, name)
                found.append(cells.run(f"invariance {case}, {name}, seed {SEEDS[0]}", work))
    return found


def splits(cells: Cells, root: Path) -> list[Cell | None]:
    """How the budget is best split between heads and neurons."""
    with plants.workers() as pool:
        runs = Runs(SPLIT_SEED, pool, root)
        return [cells.run(f"split {share:g}", partial(cut_by, runs, share)) for share in SHARES]


def main() -> None:
    """All cells, then the tables and the picture."""
    plants.require()
    cells, root = Cells("pruning"), Path("bench-work/pruning")
    only = os.environ.get("ONLY")
    dense, cuts, events = one_shot(cells, root) if only in (None, "oneshot") else ([], [], [])
    runs = recovery(cells, root) if only in (None, "recovery") else []
    cases = invariance(cells, root) if only in (None, "invariance") else []
    shares = splits(cells, root) if only in (None, "splits") else []
    parts = (dense, cuts, events, runs, cases, shares)
    if only is not None or any(None in part for part in parts):
        unfinished("bench-pruning")
    figures = result(*([one for one in part if one] for part in parts))
    table.show(figures["rows"])
    for name in ("comparisons", "recovered", "invariance", "splits", "prune_event_on_one_core"):
        for line in figures[name]:
            print(json.dumps({key: value for key, value in line.items() if key != "farms"}))
    table.picture(figures["rows"], Path("bench-output/pruning.svg"))
    print(f"figures: {cells.finish(figures, table.seeds(figures['rows']), 'make bench-pruning')}")


def result(
    dense: Sequence[Cell],
    cuts: Sequence[Cell],
    events: Sequence[Cell],
    runs: Sequence[Cell],
    cases: Sequence[Cell],
    shares: Sequence[Cell],
) -> Cell:
    """All figures."""
    every = (*dense, *cuts, *events, *runs, *cases, *shares)
    at_once = table.one_shot_rows(dense, cuts)
    (method,) = runs[0]["correct"]
    return {
        "rows": [*at_once, *table.recovery_rows(runs)],
        "comparisons": [
            *table.comparisons(cuts, METHODS, (FIXED, REFITTED)),
            *table.comparisons(runs, (method,), (REFITTED,)),
        ],
        "recovered": table.recovered(at_once),
        "invariance": table.invariance_rows(cuts, cases),
        "splits": split_rows(shares),
        "commits": sorted({str(cell["commit"]) for cell in every}),
        "prune_events": EVENTS,
        "prune_event_on_one_core": [
            {key: value for key, value in cell.items() if key not in ("cell", "commit", "seconds")}
            for cell in events
        ],
    }


if __name__ == "__main__":
    main()
