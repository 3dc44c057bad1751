"""Where invariance helps: heads by ``taha`` and by ``taylor``, cut once, for farms that had no say.

Half of the MACs go, made up for by least squares, without training. ``unseen``: five species score,
the other five are judged, and the other way round. ``few``: all score by ten images per class. What
it does for distant species is in the ordinary cuts, farm by farm.
"""

from concurrent.futures import ProcessPoolExecutor
from typing import TypeAlias

from common.budget import Budget
from common.surgery import Method
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell
from tests.benchmarks.oneshot import FIXED, REFITTED, Bench, Checkpoint, Judgement, summary

METHOD: Method = "least_squares"
RATIO = 0.5
PAIR = ("taylor", "taha")
DEVELOPMENT = ("apple", "grape", "mango", "pepper_bell", "potato")
FEW_SHOTS = 10
UNSEEN, FEW = "unseen", "few"

Group: TypeAlias = tuple[list[str], list[str], int]
"""Who scores, who is judged, and the images per class by which is scored."""


def groups(case: str) -> list[Group]:
    """Whose scores cut what is judged by whom; every farm is judged once."""
    farms = plants.farm_names()
    if case == FEW:
        return [(farms, farms, FEW_SHOTS)]
    seen = [name for name in farms if name in DEVELOPMENT]
    rest = [name for name in farms if name not in DEVELOPMENT]
    return [(seen, rest, plants.PER_CLASS), (rest, seen, plants.PER_CLASS)]


def invariance_cell(
    checkpoint: Checkpoint, pool: ProcessPoolExecutor, case: str, criterion: str
) -> Cell:
    """One criterion in one case, on every farm's test part."""
    checkpoint.make()
    judged: Judgement = {FIXED: {}, REFITTED: {}}
    for scorers, judges, shots in groups(case):
        bench = Bench(checkpoint, judges, pool, scorers, shots)
        found = bench.cut(criterion, Budget(macs_kept=RATIO), (METHOD,)).judged[METHOD]
        for classifier, farms in judged.items():
            farms |= found[classifier]
    print(f"{criterion}, {case}, seed {checkpoint.seed}: {summary(judged)}", flush=True)
    return {
        "case": case,
        "criterion": criterion,
        "ratio": RATIO,
        "seed": checkpoint.seed,
        "correct": {METHOD: plants.packed_by(judged)},
    }
