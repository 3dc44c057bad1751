"""Two of ten farms lie: what is left of the mask and of the accuracy.

``make liars`` (about 110 minutes on one core) needs the photographs and the weights beside the
project. Ten farms score and align the shared ViT-S once, honestly. In each of ten draws two of
them lie; the reference is what the same rule makes of the eight honest ones. Accuracy is the mean
over honest farms of their decide parts, classifiers refitted.

    jaccard         kept heads that both masks share, over kept heads of either
    accuracy_drop   of the reference minus that under attack, as a ratio
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer

from client.align import align
from client.scores import FarmScores, score_units
from common import backbone, codec, fit
from common.budget import Budget, choose_mask
from common.config import Aggregation, RoundConfig, TrainConfig
from common.images import FarmFolder, open_folder
from common.layout import add
from common.mask import Mask
from common.plan import PlanConfig
from common.precision import bf16_supported
from common.spec import ModelSpec
from common.surgery import Moments, collect_moments, prune_compensated
from common.trainable import trainable_set
from server.aggregate import aggregate
from server.consensus import Rule
from server.pretrain import source_batches
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.oneshot import agree
from tests.benchmarks.plants import NAME, SHARED, SIDE, WEIGHTS, require, source

PER_CLASS = 20
DRAWS, LIARS, KEPT = 10, 2, 0.6
SCORE_ATTACKS = ("random", "inverted", "promote one head", "colluding pair")
UPDATE_ATTACKS = ("sign flipped", "100 times")
SCORE_RULES: tuple[Rule, ...] = get_args(Rule)
UPDATE_RULES: tuple[Aggregation, ...] = get_args(Aggregation)

Floats = npt.NDArray[np.float32]


@dataclass
class Honest:
    """One farm's images, scores and update."""

    name: str
    folder: FarmFolder
    scores: FarmScores
    update: Floats


class Network:
    """Ten farms on one backbone; everything slow is done once."""

    def __init__(self) -> None:
        self.spec = backbone.dense_spec(NAME, SIDE)
        self.model = backbone.load_pretrained(self.spec, str(WEIGHTS))
        self.layout = trainable_set(self.model, TrainConfig().trainable).layout
        self._accuracy: dict[str, dict[str, float]] = {}

    @cached_property
    def farms(self) -> list[Honest]:
        """All farms, honest."""
        return [self._farm(path) for path in sorted((SHARED / "data" / "farms").iterdir())]

    @cached_property
    def moments(self) -> Moments:
        """For compensation, of the source species."""
        return collect_moments(self.model, source_batches(source(), self.spec, 256, 0))

    def _farm(self, path: Path) -> Honest:
        folder = open_folder(path, per_class=PER_CLASS)
        model = self._copy(np.zeros(self.layout.count, np.float32))
        classifier = self._classifier(model, self.spec, folder)
        scores = score_units(model, classifier, folder.fit.batches(self.spec, 16), None)
        config = TrainConfig(dal_weight=0.0)
        aligned = align(
            *(model, classifier, folder.fit, self.spec, config, None),
            seed=0,
            autocast=bf16_supported(),
        )
        return Honest(path.name, folder, scores, aligned.delta)

    def _copy(self, step: Floats) -> VisionTransformer:
        model, _ = backbone.unpack(backbone.pack(self.model, self.spec))
        add(model, self.layout, step)
        return model

    def _classifier(
        self, model: VisionTransformer, spec: ModelSpec, folder: FarmFolder
    ) -> torch.nn.Linear:
        features, labels = fit.extract(model, folder.fit, spec, autocast=bf16_supported())
        return fit.fit_classifier(features, labels, len(folder.classes))

    def accuracy_under(self, mask: Mask) -> dict[str, float]:
        """Decide accuracy of every farm on the backbone cut to this mask."""
        dense = Mask.dense(self.spec)
        keep = mask.keep_in(dense)

        def cut() -> tuple[VisionTransformer, ModelSpec]:
            method = PlanConfig().compensation
            return prune_compensated(self.model, self.spec, keep, self.moments, method)

        return self._judged(mask.digest, cut)

    def accuracy_after(self, step: Floats) -> dict[str, float]:
        """Decide accuracy of every farm on the backbone moved by this step."""
        key = str(hash(step.tobytes()))
        return self._judged(key, lambda: (self._copy(step), self.spec))

    def _judged(
        self, key: str, make: Callable[[], tuple[VisionTransformer, ModelSpec]]
    ) -> dict[str, float]:
        if key not in self._accuracy:
            model, spec = make()
            found = {}
            for farm in self.farms:
                classifier = self._classifier(model, spec, farm.folder)
                seen = fit.extract(model, farm.folder.decide, spec, autocast=bf16_supported())
                found[farm.name] = fit.evaluate(classifier, *seen).accuracy
            self._accuracy[key] = found
        return self._accuracy[key]


# --- lies ----------------------------------------------------------------------------------------


def lie(scores: FarmScores, attack: str, rng: np.random.Generator, target: int) -> FarmScores:
    """Scores that a liar sends; ``target`` is the head that it wants, the worst one in truth."""
    honest = scores.head_importance
    if attack == "random":
        heads = rng.dirichlet(np.ones(len(honest)))
    elif attack == "inverted":
        heads = honest.max() - honest
    elif attack == "promote one head":
        heads = np.eye(len(honest))[target]
    else:  # both lift the ten worst heads and none of the others
        heads = np.where(np.argsort(np.argsort(honest)) < 10, 1.0, 0.0)
    share = np.asarray(heads / heads.sum(), dtype=np.float32)
    return replace(scores, head_importance=share)


class Sent:
    """An update as the spool's reader gives it."""

    def __init__(self, node: int, farm: str, values: Floats) -> None:
        self.node, self.farm = node, farm
        self._payload = codec.encode(values, "0" * 64).tobytes()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from ``offset``."""
        return self._payload[offset : offset + length]


# --- figures -------------------------------------------------------------------------------------


def mask_of(network: Network, farms: Sequence[tuple[int, FarmScores]], rule: Rule) -> Mask:
    """What the server makes of these scores; the maximum over farms only where nobody is meant
    to be resisted."""
    spec = network.spec
    kappa = PlanConfig().kappa if rule == "mean" else 0.0
    agreed = agree(farms, spec, kappa=kappa, rule=rule)
    return choose_mask(agreed, Mask.dense(spec), spec, Budget(heads_kept=KEPT))


def jaccard(one: Mask, other: Mask) -> float:
    """Of kept heads."""
    first = {(block, head) for block, heads in enumerate(one.heads) for head in heads}
    second = {(block, head) for block, heads in enumerate(other.heads) for head in heads}
    return len(first & second) / len(first | second)


def drop(names: Sequence[str], before: dict[str, float], after: dict[str, float]) -> float:
    """Mean loss over these farms."""
    return fmean(before[name] - after[name] for name in names)


def score_cell(network: Network, attack: str, draw: int) -> Cell:
    """One draw of liars, all rules."""
    rng = np.random.default_rng([draw, SCORE_ATTACKS.index(attack)])
    farms = network.farms
    liars = set(np.random.default_rng(draw).choice(len(farms), LIARS, replace=False).tolist())
    honest = [farm for index, farm in enumerate(farms) if index not in liars]
    target = int(np.argmin(np.mean([farm.scores.head_importance for farm in honest], axis=0)))
    sent = [
        (len(farm.folder.fit), lie(farm.scores, attack, rng, target) if i in liars else farm.scores)
        for i, farm in enumerate(farms)
    ]
    names, found = [farm.name for farm in honest], {}
    for rule in SCORE_RULES:
        truth = [(len(farm.folder.fit), farm.scores) for farm in honest]
        reference, attacked = mask_of(network, truth, rule), mask_of(network, sent, rule)
        before, after = network.accuracy_under(reference), network.accuracy_under(attacked)
        found[rule] = {
            "jaccard": jaccard(reference, attacked),
            "accuracy_drop": drop(names, before, after),
        }
    return {"attack": attack, "draw": draw, "rules": found}


def update_cell(network: Network, attack: str, draw: int) -> Cell:
    """One draw of liars, all rules of aggregation."""
    farms = network.farms
    liars = set(np.random.default_rng(draw).choice(len(farms), LIARS, replace=False).tolist())
    factor = -1.0 if attack == "sign flipped" else 100.0
    honest = [farm for index, farm in enumerate(farms) if index not in liars]
    names, found = [farm.name for farm in honest], {}
    for rule in UPDATE_RULES:
        truth = merged(network, honest, rule, {})
        lied = merged(network, farms, rule, dict.fromkeys(liars, factor))
        before, after = network.accuracy_after(truth), network.accuracy_after(lied)
        found[rule] = {"jaccard": None, "accuracy_drop": drop(names, before, after)}
    return {"attack": attack, "draw": draw, "rules": found}


def merged(
    network: Network, farms: Sequence[Honest], rule: Aggregation, factors: dict[int, float]
) -> Floats:
    """The aggregate of these farms, updates of liars multiplied."""
    sent = [
        Sent(index, farm.name, np.float32(factors.get(index, 1.0)) * farm.update)
        for index, farm in enumerate(farms)
    ]
    weights = [float(len(farm.folder.fit)) for farm in farms]
    rules = RoundConfig()
    return aggregate(
        sent, weights, count=network.layout.count, clip=rules.clip, rule=rule, liars=rules.liars
    )


def no_liar_cell(network: Network) -> Cell:
    """What robust rules cost when nobody lies: against the plain mean over the same farms."""
    farms, found = network.farms, {}
    names = [farm.name for farm in farms]
    truth = [(len(farm.folder.fit), farm.scores) for farm in farms]
    plain = mask_of(network, truth, "mean")
    step = network.accuracy_after(merged(network, farms, "mean", {}))
    for rule in UPDATE_RULES:
        entry: dict[str, Any] = {}
        after = network.accuracy_after(merged(network, farms, rule, {}))
        entry["accuracy_drop_updates"] = drop(names, step, after)
        if rule in SCORE_RULES:
            mask = mask_of(network, truth, rule)
            entry["jaccard"] = jaccard(plain, mask)
            under = network.accuracy_under(plain), network.accuracy_under(mask)
            entry["accuracy_drop"] = drop(names, *under)
        found[rule] = entry
    return {"attack": "none", "draw": 0, "rules": found}


def table(cells: Sequence[Cell]) -> list[Cell]:
    """One row per attack and rule: median Jaccard, mean accuracy drop, and those of every draw."""
    rows = []
    for attack in dict.fromkeys(cell["attack"] for cell in cells):
        mine = [cell for cell in cells if cell["attack"] == attack]
        for rule in mine[0]["rules"]:
            drops = [cell["rules"][rule].get("accuracy_drop") for cell in mine]
            shares = [cell["rules"][rule].get("jaccard") for cell in mine]
            row: Cell = {"attack": attack, "rule": rule, "draws": drops}
            row["accuracy_drop"] = fmean(drops) if None not in drops else None
            row["jaccard"] = median(shares) if None not in shares else None
            if attack == "none":
                row |= mine[0]["rules"][rule]
            rows.append(row)
    return rows


def main() -> None:
    """All cells, then the table."""
    require()
    cells, network, done = Cells("liars"), Network(), []
    for draw in range(DRAWS):
        for attack in (*SCORE_ATTACKS, *UPDATE_ATTACKS):
            work = score_cell if attack in SCORE_ATTACKS else update_cell
            done.append(cells.run(f"{attack} {draw}", partial(work, network, attack, draw)))
    done.append(cells.run("none", partial(no_liar_cell, network)))
    finished = [cell for cell in done if cell is not None]
    if len(finished) < len(done):
        unfinished("liars")
        return
    rows = table(finished)
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "draws"}))
    print(f"figures: {cells.finish({'rows': rows}, list(range(DRAWS)))}")


if __name__ == "__main__":
    main()
