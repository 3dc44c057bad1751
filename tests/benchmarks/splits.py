"""How a budget is split between heads and neurons: one cut at 64 % of the MACs by several splits.

Scores by ``taylor`` less what is redundant, made up for by least squares with moments of farms,
without training. ``SHARE`` is the default of [plan] heads_per_neurons; the others are against it.
"""

from collections.abc import Sequence

from common.budget import Budget
from common.surgery import Method
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell
from tests.benchmarks.oneshot import FARMS, FIXED, REFITTED, Bench, summary
from tests.benchmarks.pruning_table import difference, outcomes

METHOD: Method = "least_squares"
RATIO, SEED = 0.64, 1
SHARE = Budget(macs_kept=RATIO).heads_per_neurons
SHARES = (SHARE, 0.2, 0.4, 1.5, 3.0)


def split_cell(bench: Bench, share: float) -> Cell:
    """One split, on every farm's test part."""
    cut = bench.cut(FARMS, Budget(macs_kept=RATIO, heads_per_neurons=share), (METHOD,))
    judged = cut.judged[METHOD]
    print(f"split {share:g}, seed {SEED}: {summary(judged)}", flush=True)
    return {
        "criterion": FARMS,
        "heads_per_neurons": share,
        "ratio": RATIO,
        "seed": SEED,
        "heads_kept": cut.mask.heads_kept_ratio,
        "neurons_kept": cut.mask.neurons_kept_ratio,
        "correct": {METHOD: plants.packed_by(judged)},
    }


def split_rows(cells: Sequence[Cell]) -> list[Cell]:
    """Each split against the default one, with classifiers fixed and fitted anew."""
    (default,) = (cell for cell in cells if cell["heads_per_neurons"] == SHARE)
    kept = ("heads_per_neurons", "heads_kept", "neurons_kept")
    return [
        {
            **{key: cell[key] for key in kept},
            "macs_ratio": RATIO,
            "classifier": classifier,
            **difference(*(outcomes([one], METHOD, classifier) for one in (cell, default))),
        }
        for classifier in (FIXED, REFITTED)
        for cell in cells
        if cell is not default
    ]
