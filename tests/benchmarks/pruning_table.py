"""The tables of bench-pruning and their picture; from cells alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeAlias, get_args

from rich.console import Console
from rich.table import Table

from common.plan import Criterion, PlanConfig
from common.surgery import Method
from server.compare import Interval, paired_bootstrap, verdict
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell
from tests.benchmarks.frontier import Curve, draw
from tests.benchmarks.invariance import PAIR
from tests.benchmarks.oneshot import FARMS, FIXED, PLAIN, REFITTED, TORCH_PRUNING
from tests.benchmarks.plants import Flags
from tests.benchmarks.recovery import DENSE, DENSE_PATIENT, PATIENT, ROUNDS, TAUGHT

CRITERIA: tuple[str, ...] = (*get_args(Criterion), FARMS, PLAIN, TORCH_PRUNING)
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT: Criterion = PlanConfig().criterion
TRAINED = (DEFAULT, TAUGHT, PATIENT)
"""Whose runs with recovery are curves of the picture, from the dense run of as many rounds on."""

Outcomes: TypeAlias = Mapping[int, Mapping[str, Flags]]
"""Which images were right, by seed and farm."""


def outcomes(cells: Sequence[Cell], method: str, classifier: str) -> Outcomes:
    """Of the cells of one row."""
    return {
        int(cell["seed"]): plants.unpacked(cell["correct"][method][classifier])
        for cell in sorted(cells, key=lambda one: int(one["seed"]))
    }


def by_farm(found: Outcomes, chosen: Sequence[int]) -> dict[str, list[Flags]]:
    """By farm, a vector per seed."""
    return {farm: [found[seed][farm] for seed in chosen] for farm in found[chosen[0]]}


def difference(found: Outcomes, against: Outcomes) -> Cell:
    """Paired on the same images and on the seeds that both have, with what it means."""
    both = sorted(set(found) & set(against))
    interval = paired_bootstrap(by_farm(found, both), by_farm(against, both))
    return {**interval._asdict(), "verdict": verdict(interval), "paired_seeds": both}


def row(cells: Sequence[Cell], method: str, classifier: str, against: Outcomes) -> Cell:
    """One line of the table: a criterion at a size, against the dense backbone."""
    found = outcomes(cells, method, classifier)
    farms = by_farm(found, list(found))
    each = plants.by_seed(farms)
    return {
        "criterion": cells[0]["criterion"],
        "macs_ratio": cells[0].get("ratio", 1.0),
        "compensation": method,
        "classifier": classifier,
        "rounds_recovery": cells[0].get("rounds", 0),
        "accuracy": fmean(each),
        "accuracy_sd": stdev(each) if len(each) > 1 else None,
        "per_seed": each,
        "farms": plants.by_farm(farms),
        "seeds": list(found),
        "heads_kept": fmean(cell.get("heads_kept", 1.0) for cell in cells),
        "neurons_kept": fmean(cell.get("neurons_kept", 1.0) for cell in cells),
        "against_dense": difference(found, against),
    }


def grouped(cells: Sequence[Cell]) -> dict[tuple[str, float], list[Cell]]:
    """By criterion and size."""
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["criterion"], cell.get("ratio", 1.0)), []).append(cell)
    return found


def one_shot_rows(dense: Sequence[Cell], cuts: Sequence[Cell]) -> list[Cell]:
    """Without training: by classifier, size and criterion."""
    found = []
    ordered = sorted(grouped(cuts).items(), key=lambda item: (-item[0][1], item[0][0]))
    for classifier in (FIXED, REFITTED):
        reference = outcomes(dense, "none", classifier)
        found.append(row(dense, "none", classifier, reference))
        for _, cells in ordered:
            found += [row(cells, method, classifier, reference) for method in METHODS]
    return found


def recovery_rows(cells: Sequence[Cell]) -> list[Cell]:
    """Runs with recovery, each against the dense run of the same seeds and rounds."""
    by_case = grouped(cells)
    found = []
    for (name, _), same in by_case.items():
        (method,) = same[0]["correct"]
        dense = outcomes(by_case[DENSE, 1.0], method, REFITTED)
        line = row(same, method, REFITTED, dense)
        alike = outcomes(by_case[DENSE_PATIENT, 1.0], method, REFITTED)
        trained = outcomes(same, method, REFITTED)
        if name == PATIENT and set(trained) & set(alike):
            # a fair reader asks what the dense one gains from as much training
            line["against_dense_trained_alike"] = difference(trained, alike)
        found.append(line)
    return found


def comparisons(
    cells: Sequence[Cell], methods: Sequence[str], classifiers: Sequence[str]
) -> list[Cell]:
    """The default criterion against every other one of the same size, on the same images."""
    found = []
    groups = grouped(cells)
    for (name, ratio), others in groups.items():
        default = groups.get((DEFAULT, ratio))
        if name in (DEFAULT, DENSE) or default is None:
            continue
        for classifier in classifiers:
            for method in methods:
                ours = outcomes(default, method, classifier)
                theirs = outcomes(others, method, classifier)
                if not set(ours) & set(theirs):
                    continue
                change = difference(ours, theirs)
                about = {"default": DEFAULT, "other": name, "macs_ratio": ratio}
                how = {"compensation": method, "classifier": classifier}
                rounds = others[0].get("rounds", 0)
                found.append({**about, **how, "rounds_recovery": rounds, **change})
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


def invariance_rows(cuts: Sequence[Cell], cases: Sequence[Cell]) -> list[Cell]:
    """``taha`` minus ``taylor``, over all farms and farm by farm, in each case at each size."""
    found = []
    ordinary = [{"case": "all score, 40 images per class", **cell} for cell in cuts]
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in (*ordinary, *cases):
        if cell["criterion"] in PAIR:
            groups.setdefault((cell["case"], cell["ratio"]), []).append(cell)
    for (case, ratio), cells in groups.items():
        sides = {name: [c for c in cells if c["criterion"] == name] for name in PAIR}
        for classifier in (FIXED, REFITTED):
            plain, invariant = (outcomes(sides[n], METHODS[-1], classifier) for n in PAIR)
            both = sorted(set(plain) & set(invariant))
            each = [plants.by_farm(by_farm(one, both)) for one in (invariant, plain)]
            found.append(
                {
                    "case": case,
                    "macs_ratio": ratio,
                    "classifier": classifier,
                    **difference(invariant, plain),
                    "farms": {
                        farm: fmean(each[0][farm]) - fmean(each[1][farm]) for farm in each[0]
                    },
                }
            )
    return found


def picture(table: Sequence[Cell], path: Path) -> None:
    """Accuracy against MACs with the default compensation and classifiers fitted anew."""
    best = [r for r in table if (r["compensation"], r["classifier"]) == (METHODS[-1], REFITTED)]

    def curve(rounds: int, *names: str) -> Curve:
        chosen = [r for r in best if r["rounds_recovery"] == rounds and r["criterion"] in names]
        return [(r["macs_ratio"], r["accuracy"]) for r in chosen]

    curves = {name: curve(0, name) for name in CRITERIA}
    curves |= {f"{name}, {ROUNDS} rounds": curve(ROUNDS, name, DENSE) for name in TRAINED}
    (level,) = [
        r["accuracy"]
        for r in table
        if r["criterion"] == DENSE and r["classifier"] == REFITTED and not r["rounds_recovery"]
    ]
    title = "Accuracy after one cut without training, and with rounds between cuts; ten farms"
    draw(path, title, curves, level)


def seeds(rows: Sequence[Cell]) -> list[int]:
    """All that any row has."""
    return sorted({seed for r in rows for seed in r["seeds"]})


def show(rows: Sequence[Cell]) -> None:
    """Print the table."""
    table = Table(title="accuracy on whole test parts, mean of ten farms", width=130)
    for name in ("criterion", "MACs", "compensation", "classifier", "rounds", "accuracy", "sd"):
        table.add_column(name)
    table.add_column("against dense, points")
    for r in rows:
        change = r["against_dense"]
        interval = Interval(change["point"], change["low"], change["high"])
        sd = "" if r["accuracy_sd"] is None else f"{r['accuracy_sd']:.3f}"
        table.add_row(
            *(r["criterion"], f"{r['macs_ratio']:g}", r["compensation"], r["classifier"]),
            *(str(r["rounds_recovery"]), f"{r['accuracy']:.4f}", sd),
            f"{points(interval)}, {change['verdict']}",
        )
    Console(width=130).print(table)


def points(interval: Interval) -> str:
    """An interval as people read it, in points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in interval))
