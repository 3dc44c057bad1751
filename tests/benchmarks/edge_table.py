"""The table of bench-edge, and what it says of the targets; from cells alone."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from server.compare import paired_bootstrap, verdict
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell
from tests.benchmarks.edge_runs import BOTH, LONGER, PRUNED, SIDE, SMALLEST, TOKENS, VARIANTS, named
from tests.benchmarks.edge_speed import FP32, INT8, TORCH
from tests.benchmarks.edge_students import best
from tests.benchmarks.plants import Flags

MODEL, PROBE = "model", "probe"

Correct = dict[int, dict[str, Flags]]
"""By seed and farm."""


def correct(cells: Sequence[Cell], label: str = MODEL, *, int8: bool = False) -> Correct:
    """Which test images were right."""
    return {
        int(cell["seed"]): plants.unpacked((cell["int8"] if int8 else cell)["correct"][label])
        for cell in sorted(cells, key=lambda one: int(one["seed"]))
        if not int8 or "int8" in cell
    }


def difference(found: Correct, against: Correct, **bounds: float) -> Cell:
    """Paired, on the seeds that both have, with what it means; bounds are those of ``verdict``."""
    seeds = sorted(set(found) & set(against))
    sides = [
        {farm: [one[seed][farm] for seed in seeds] for farm in one[seeds[0]]}
        for one in (found, against)
    ]
    interval = paired_bootstrap(*sides)
    return {**interval._asdict(), "verdict": verdict(interval, **bounds)}


def accuracy(found: Correct) -> float:
    """Mean over farms and seeds."""
    return fmean(float(flags.mean()) for farms in found.values() for flags in farms.values())


def row(
    model: str, found: Correct, against: Correct, about: Mapping[str, Any], speed: Cell | None
) -> Cell:
    """One line of the table; latency is None where it was not measured."""
    measured = speed or {}
    return {
        "model": model,
        "image_size": SIDE,
        "macs": about["macs"],
        "params": about["parameters"],
        "file_bytes": measured.get("file_bytes", about.get("file_bytes")),
        "latency_ms_1thread_p50": measured.get("latency_ms_1thread_p50"),
        "latency_ms_1thread_p95": measured.get("latency_ms_1thread_p95"),
        "latency_ratio_to_dense_torch": measured.get("latency_ratio_1thread"),
        "peak_memory_bytes": measured.get("peak_memory_bytes"),
        "accuracy": accuracy(found),
        "against_dense": difference(found, against),
        "seeds": sorted(found),
    }


def speeds(cell: Cell) -> dict[str, Cell]:
    """Rows of latency by model and precision."""
    return {str(one["model"]): one for one in cell["rows"]}


def table(cells: Sequence[Cell], speed: Cell) -> list[Cell]:
    """Backbones in torch, ONNX Runtime and 8 bits, before and after training, then students."""
    fast = speeds(speed)
    by_model: dict[tuple[str, str, bool | None, float | None], list[Cell]] = {}
    for cell in cells:
        key = (cell["kind"], cell["model"], cell.get("taught"), cell.get("lr"))
        by_model.setdefault(key, []).append(cell)
    backbones = {key[1]: same for key, same in by_model.items() if key[0] == "backbone"}
    dense, found = correct(backbones["dense"]), []
    first = row("dense torch", dense, dense, backbones["dense"][0], fast[f"dense {TORCH}"])
    found.append(first)
    for variant in VARIANTS:
        same = backbones[variant.name]
        against, size = correct(backbones[variant.against]), fast.get(f"{variant.name} {FP32}")
        found.append(row(f"{variant.name} {FP32}", correct(same), against, same[0], size))
        if variant.parent is None:
            shelf, plain = (correct(one, PROBE) for one in (same, backbones["dense"]))
            found.append(row(f"{variant.name} untrained", shelf, plain, same[0], size))
        if variant.int8:
            small, size = correct(same, int8=True), fast.get(f"{variant.name} {INT8}")
            found.append(row(f"{variant.name} {INT8}", small, against, same[0], size))
    for (kind, name, taught, lr), same in by_model.items():
        if kind == "student":
            words = f"{name} {'taught' if taught else 'alone'} lr {lr:g}"
            for precision in (FP32, INT8):
                right, size = correct(same, int8=precision == INT8), fast.get(f"{name} {precision}")
                found.append(row(f"{words} {precision}", right, dense, same[0], size))
    return found


def students(cells: Sequence[Cell]) -> list[Cell]:
    """What a teacher gives a student: each at its best rate, paired on the same images."""
    made = [cell for cell in cells if cell["kind"] == "student"]
    teacher = correct([cell for cell in cells if cell["model"] == "dense"])
    found = []
    for name in sorted({str(cell["model"]) for cell in made}):
        taught, alone = (_at_best_rate(made, name, how) for how in (True, False))
        sides = {"taught": taught, "alone": alone}
        right = correct(taught)
        compared = {
            "gain_by_teacher": difference(right, correct(alone), floor=0.0),  # a gain, or none
            "against_teacher": difference(right, teacher),
            "int8_against_fp32": difference(correct(taught, int8=True), right, margin=0.01),
        }
        found.append(
            {
                "student": name,
                "lr_taught": taught[0]["lr"],
                "lr_alone": alone[0]["lr"],
                "int8_file_bytes": taught[0]["int8"]["file_bytes"],
                **{f"decide_{how}": by_third(one) for how, one in sides.items()},
                **compared,
            }
        )
    return found


def by_third(cells: Sequence[Cell]) -> list[float]:
    """Mean decide accuracy in each third of the epochs: whether the last still gains anything."""
    thirds = np.array_split(np.mean([cell["curve"] for cell in cells], axis=0), 3)
    return [round(float(third.mean()), 4) for third in thirds]


def _at_best_rate(cells: Sequence[Cell], name: str, taught: bool) -> list[Cell]:
    """Runs of a student at the rate that its first seed chose."""
    mine = [cell for cell in cells if cell["model"] == name and cell["taught"] == taught]
    first = min(int(cell["seed"]) for cell in mine)
    lr = best([cell for cell in mine if cell["seed"] == first])
    return [cell for cell in mine if cell["lr"] == lr]


def targets(rows: Sequence[Cell], saved: Sequence[Cell]) -> list[Cell]:
    """Each target with what was found; points are of accuracy, below dense."""
    by_name = {str(one["model"]): one for one in rows}
    large = {(one["model"], one["image_size"]): one for one in saved}

    def below(name: str) -> float:
        return -100 * float(by_name[name]["against_dense"]["point"])

    torch_row, dense = by_name["dense torch"], by_name[f"dense {FP32}"]
    pruned, smallest = by_name[f"{PRUNED} {FP32}"], by_name[f"{SMALLEST} {INT8}"]
    time = 1 - _ratio(pruned, "latency_ratio_to_dense_torch", dense)
    faster = 1 / float(smallest["latency_ratio_to_dense_torch"])
    both = large[BOTH, 336]
    return [
        _target("tokens: MACs saved at 140 px", large[TOKENS, SIDE]["saved"], 0.35),
        _target("tokens: points below dense", below(f"{TOKENS} {FP32}"), 0.5, most=True),
        _target("both: MACs saved at 336 px", both["saved"], 0.40),
        _target("both: MACs of attention saved at 336 px", both["attention_saved"], 0.60),
        _target("both: points below dense", below(f"{BOTH} {FP32}"), 1.5, most=True),
        _target("pruned: saving that is time", time / (1 - _ratio(pruned, "macs", dense)), 0.80),
        _target("smallest: times as fast as dense torch", faster, 4.0),
        _target("smallest: points below dense", below(f"{SMALLEST} {INT8}"), 1.5, most=True),
        {"target": "reference of the last and of pruned", "found": LONGER},
        {"target": "dense torch, ms", "found": torch_row["latency_ms_1thread_p50"]},
    ]


def _ratio(one: Cell, key: str, other: Cell) -> float:
    return float(one[key]) / float(other[key])


def _target(name: str, found: float, bound: float, *, most: bool = False) -> Cell:
    met = found <= bound if most else found >= bound
    return {"target": name, "found": found, "bound": bound, "met": bool(met)}


def by_variant(name: str) -> bool:
    """Whether latency of a backbone is measured: those that the targets speak of."""
    return not named(name).once and name != LONGER
