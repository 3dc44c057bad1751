"""Pruned in several events with rounds of recovery between them, from a dense checkpoint.

The runs are the product's own, with the guard told to let every cut pass: what is compared is what
the cuts cost.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from common.budget import Budget
from common.config import RecoveryConfig, TrainConfig
from common.mask import Mask
from common.plan import PlanConfig
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell
from tests.benchmarks.oneshot import (
    FARMS,
    REFITTED,
    SPARING,
    TORCH_PRUNING,
    Bench,
    Checkpoint,
    scored_by,
)

ROUNDS, EVENTS = 6, 2
"""The default of a run: events end rounds 1 and 3; three rounds of recovery follow the last."""
DENSE, DENSE_PATIENT = "dense", "dense, rank 16, three epochs"
TWICE, TAUGHT = "taylor, taught", "taylor, taught, one cut"
LATE, PATIENT = "taylor, taught, one late cut", "taylor, taught three epochs, one cut"
LONG = "taylor, taught five epochs, one cut"
DISTILLED = "taylor, distilled, cut after round 4"
FACTORED = "taylor, distilled by factors, cut after round 4"
FULL, FULL_AT_ONCE = "taylor, all weights taught", "taylor, all weights taught, one cut"


class Recipe(NamedTuple):
    """How farms recover that are told what the backbone said before; they send moments, too."""

    recovery: RecoveryConfig
    cuts: int = 1
    first: int = 1
    """The round that ends with the first cut."""


_FACTORS = RecoveryConfig(rank=16, self_distil=3.0)
_WEIGHTS = RecoveryConfig(trainable="full", self_distil=3.0)
RECIPES: Mapping[str, Recipe] = {
    PATIENT: Recipe(RecoveryConfig(rank=16, epochs=3, self_distil=3.0)),
    LONG: Recipe(RecoveryConfig(rank=16, epochs=5, self_distil=3.0)),
    # the teacher's say so loud that labels hardly count
    DISTILLED: Recipe(
        RecoveryConfig(trainable="full", lr=1e-4, epochs=3, self_distil=30.0), first=4
    ),
    FACTORED: Recipe(RecoveryConfig(rank=16, epochs=3, self_distil=30.0), first=4),
    TAUGHT: Recipe(_FACTORS),
    TWICE: Recipe(_FACTORS, cuts=EVENTS),
    LATE: Recipe(_FACTORS, first=3),
    FULL: Recipe(_WEIGHTS, cuts=EVENTS),
    FULL_AT_ONCE: Recipe(_WEIGHTS),
}
"""By the name of their rows; those of one epoch were run when moments counted by images."""

Case: TypeAlias = tuple[str, float, Sequence[int]]
CASES: tuple[Case, ...] = (
    (DENSE, 1.0, (0, 1, 2)),
    (DENSE_PATIENT, 1.0, (1,)),
    (DISTILLED, 0.64, (1,)),
    (FACTORED, 0.64, (1,)),
    (PATIENT, 0.64, (1, 0, 2)),
    (LONG, 0.64, (1, 0)),
    (TAUGHT, 0.5, (1,)),
    (TAUGHT, 0.64, (1,)),
    (TAUGHT, 0.5, (0,)),
    (TAUGHT, 0.64, (0,)),
    (TAUGHT, 0.5, (2,)),
    (TAUGHT, 0.64, (2,)),
    ("taylor", 0.5, (0, 1)),
    (TORCH_PRUNING, 0.5, (0, 1)),
    ("l1gates", 0.5, (0, 1)),
    ("magnitude", 0.5, (0, 1)),
    ("random", 0.5, (0, 1)),
    (PATIENT, 0.5, (1,)),
    (PATIENT, 0.4, (0,)),
    (PATIENT, 0.3, (0,)),
    ("taylor", 0.64, (0,)),
    (FARMS, 0.5, (0,)),
    (TWICE, 0.5, (0, 1)),
    (FULL, 0.5, (0, 1)),
    (FULL, 0.64, (0, 1, 2)),
    (FULL_AT_ONCE, 0.5, (0,)),
    (LATE, 0.64, (0, 1)),
)
"""In the order of their cells: what is to be learned from first, and last what was tried, too."""


def plan_of(name: str, ratio: float) -> PlanConfig:
    """The schedule that leaves this share of the MACs; a dense one cuts nothing."""
    plan = PlanConfig(rounds=ROUNDS, prune_events=EVENTS, warmup=1, max_drop_ratio=1.0)
    if name in (DENSE, DENSE_PATIENT):
        return plan
    recipe = RECIPES.get(name)
    changes = {
        "criterion": "taylor" if recipe else scored_by(name),
        "redundancy": recipe is not None or name in SPARING,
        "moments": "farms" if recipe or name == FARMS else "source",
        "prune_events": recipe.cuts if recipe else EVENTS,
        "warmup": recipe.first if recipe else plan.warmup,
        "prune_macs": round(1 - ratio, 6),
    }
    return PlanConfig.model_validate(plan.model_dump() | changes)


def train_of(name: str) -> TrainConfig:
    """How farms train before a cut; where there is none, as the patient do after theirs."""
    return TrainConfig(rank=16, epochs=3) if name == DENSE_PATIENT else TrainConfig()


def recovery_of(name: str) -> RecoveryConfig | None:
    """How farms train after a cut; None: as before it."""
    return RECIPES[name].recovery if name in RECIPES else None


def recovery_cell(root: Path, name: str, ratio: float, seed: int) -> Cell:
    """One run from the seed's checkpoint to its end, judged on the whole test parts."""
    checkpoint = Checkpoint(root / f"seed{seed}", seed)
    checkpoint.make()
    if name == TORCH_PRUNING:
        judged, mask = _cut_at_once(checkpoint, ratio)
    else:
        plan = plan_of(name, ratio)
        judged = plants.play(
            train_of(name),
            ROUNDS,
            seed,
            plan=plan,
            base=checkpoint.path,
            recovery=recovery_of(name),
        )
        mask = judged.mask
    return {
        "criterion": name,
        "ratio": ratio,
        "seed": seed,
        "rounds": ROUNDS,
        "heads_kept": mask.heads_kept_ratio,
        "neurons_kept": mask.neurons_kept_ratio,
        # what a run reports is judged with classifiers fitted anew
        "correct": {PlanConfig().compensation: {REFITTED: judged.packed()["model"]}},
    }


def _cut_at_once(checkpoint: Checkpoint, ratio: float) -> tuple[plants.Judged, Mask]:
    """Torch-Pruning's mask and our compensation before the first round; all rounds are recovery."""
    with plants.workers() as pool:
        bench = Bench(checkpoint, plants.farm_names(), pool)
        mask = bench.torch_pruning(Budget(macs_kept=ratio))
        folder = checkpoint.folder / "recovery"
        folder.mkdir(exist_ok=True)
        base = bench.save_cut(mask, PlanConfig().compensation, folder)
        bench.save_anchors(base)
    plan = plan_of(DENSE, 1.0)
    return plants.play(TrainConfig(), ROUNDS, checkpoint.seed, plan=plan, base=base), mask
