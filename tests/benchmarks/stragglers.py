"""Two hundred farms of very different speed: asynchronous rounds against the best deadline.

``make stragglers`` (about 30 minutes on 2 cores) needs the photographs and the weights beside the
project. Every farm holds a few photographs of one species, some classes more than others, and slow
devices are commoner with some species than with others. Farms are five times apart in speed, and
30 % of all requests, or their answers, are lost. What they learn is real: one linear classifier of
all classes of all species on cached ViT features, which travels as an update does. The round loop
is the product's own, on a simulated clock.

    sync_seconds, ours_seconds      simulated, until TARGET of the test images are right
    sync_accuracy, ours_accuracy    of the last candidate within HORIZON
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common import backbone, codec, fit
from common.config import BackboneConfig, RoundConfig, ServerConfig, TrainConfig
from common.errors import FieldfedError
from common.images import Part, Purpose, open_folder
from common.layout import Layout
from common.messages import AlignReply, Reply, Request
from common.plan import PlanConfig
from common.precision import bf16_supported
from common.trainable import trainable_set
from server.begin import run_rounds
from server.models import Models
from server.settings import RunSettings
from server.store import Store
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.benchmarks.plants import SHARED, WEIGHTS
from tests.lab.simulation import SimClock, SimFarm, SimLink

FARMS, SEEDS, LOSS = 200, 5, 0.3
FASTEST, SPREAD = 60.0, 5.0
IMAGES = (20, 60)
HORIZON, TARGET = 7200.0, 0.70
DEADLINES = (150, 240, 330, 420, 600)
LEARNING_RATE, BATCH = 0.2, 8
# a backbone that is only there to carry the classifier in its parameters
CARRIER = BackboneConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    options={"depth": 1, "embed_dim": 48, "num_heads": 4, "patch_size": 8},
)

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Features (N, C + 1), the last one 1, and labels (N,) over all species; ``species`` (N,)."""

    features: Floats
    labels: Labels
    species: Labels


class Photographs:
    """Cached features of all species."""

    def __init__(self) -> None:
        self.train, self.test = self._load()
        self.classes = int(self.train.labels.max()) + 1

    def _load(self) -> tuple[Images, Images]:
        path = Path("bench-work") / "features.npz"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            with path.with_suffix(".part").open("wb") as file:
                np.savez(file, **_extract())  # type: ignore[arg-type]
            path.with_suffix(".part").replace(path)
        with np.load(path) as found:
            mean, std = found["train"].mean(0), found["train"].std(0) + 1e-6
            sets = []
            for name in ("train", "test"):
                features = (found[name] - mean) / std
                ones = np.ones((len(features), 1))
                features = np.concatenate([features, ones], 1).astype(np.float32)
                sets.append(Images(features, found[f"{name}_labels"], found[f"{name}_species"]))
        return sets[0], sets[1]


def _extract() -> dict[str, npt.NDArray[Any]]:
    spec = backbone.dense_spec("vit_small_patch14_dinov2", 112)
    model = backbone.load_pretrained(spec, str(WEIGHTS))
    rows: dict[str, list[npt.NDArray[Any]]] = {}
    first = 0

    def take(name: str, part: Part, number: int) -> None:
        features, labels = fit.extract(model, part, spec, autocast=bf16_supported())
        for key, values in (
            (name, features.numpy()),
            (f"{name}_labels", labels.numpy() + first),
            (f"{name}_species", np.full(len(labels), number)),
        ):
            rows.setdefault(key, []).append(values)

    for number, path in enumerate(sorted((SHARED / "data" / "farms").iterdir())):
        folder = open_folder(path)
        take("train", folder.fit, number)
        take("train", folder.decide, number)
        take("test", folder.open_test(Purpose.REPORT), number)
        first += len(folder.classes)
        print(f"features of {path.name}", flush=True)
    return {name: np.concatenate(values) for name, values in rows.items()}


# --- farms ---------------------------------------------------------------------------------------


class Crowd:
    """Farms that learn one linear classifier together."""

    def __init__(self, photographs: Photographs, seed: int) -> None:
        self._all, self._seed = photographs, seed
        rng = np.random.default_rng([seed, 1])
        species = int(photographs.train.species.max()) + 1
        slowness = rng.permutation(species) / (species - 1)
        self.images: dict[str, Labels] = {}
        self.farms: list[SimFarm] = []
        for number in range(FARMS):
            home = int(rng.integers(species))
            chosen = self._draw(rng, home)
            slow = (slowness[home] + rng.uniform()) / 2
            seconds = FASTEST * SPREAD**slow
            farm = SimFarm(f"farm{number:03d}", seconds, len(chosen), loss=LOSS)
            self.images[farm.name] = chosen
            self.farms.append(farm)
        self.classifiers: dict[str, Floats] = {}

    def _draw(self, rng: np.random.Generator, home: int) -> Labels:
        """Some images of one species, its classes in very different shares."""
        train = self._all.train
        own = np.flatnonzero(train.species == home)
        labels = np.unique(train.labels[own])
        shares = dict(zip(labels, rng.dirichlet(np.full(len(labels), 0.5)), strict=True))
        counts = {label: np.sum(train.labels[own] == label) for label in labels}
        chances = np.array([shares[label] / counts[label] for label in train.labels[own]])
        size = int(rng.integers(*IMAGES))
        return rng.choice(own, size, p=chances / chances.sum())

    def _shaped(self, base: str) -> Floats:
        shape = (self._all.train.features.shape[1], self._all.classes)
        return self.classifiers[base][: shape[0] * shape[1]].reshape(shape)

    def accuracy(self, base: str) -> float:
        """Share of the test images that the classifier carried by ``base`` gets right."""
        test = self._all.test
        return float((np.argmax(test.features @ self._shaped(base), 1) == test.labels).mean())

    def answer(self, _node: int, farm: SimFarm, request: Request) -> Reply:
        """One pass of stochastic gradient descent over the farm's images."""
        assert request.kind == "align"
        train, chosen = self._all.train, self.images[farm.name]
        start = self._shaped(request.base)
        weights = start.copy()
        x, y = train.features[chosen], train.labels[chosen]
        accuracy = float((np.argmax(x @ start, 1) == y).mean())
        rng = np.random.default_rng([self._seed, request.round, int(farm.name[4:])])
        order = rng.permutation(len(chosen))
        for begin in range(0, len(order), BATCH):
            batch = order[begin : begin + BATCH]
            weights -= LEARNING_RATE * _gradient(x[batch], y[batch], weights)
        update = np.zeros_like(self.classifiers[request.base])
        update[: weights.size] = (weights - start).ravel()
        steps = -(-len(order) // BATCH)
        return AlignReply(
            **request.identity(),
            farm=farm.name,
            examples=len(chosen),
            accuracy=accuracy,
            f1=accuracy,
            loss=0.0,
            dal=0.0,
            steps=steps,
            seconds=farm.seconds,
            train_seconds=farm.seconds,
            update=codec.encode(update, request.base),
        )


def _gradient(x: Floats, y: Labels, weights: Floats) -> Floats:
    """Of the mean cross-entropy."""
    logits = x @ weights
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    chances[np.arange(len(y)), y] -= 1
    gradient: Floats = x.T @ chances / len(y)
    return gradient


# --- runs ----------------------------------------------------------------------------------------


class HorizonReachedError(FieldfedError):
    """The horizon is reached."""


class Course:
    """Follows one run: simulated seconds and test accuracy of each candidate."""

    def __init__(self, crowd: Crowd, clock: SimClock) -> None:
        self._crowd, self._clock = crowd, clock
        self.points: list[tuple[float, float]] = []
        self._start: Floats | None = None

    @cached_property
    def _layout(self) -> Layout:
        spec = backbone.dense_spec(CARRIER.name, CARRIER.image_size, CARRIER.options)
        model = backbone.build(spec)
        return trainable_set(model, "full").layout

    def saved(self, save: Callable[..., str], *arguments: Any, **options: Any) -> str:
        """In place of ``Models.save``: take the classifier out of the candidate."""
        digest = save(*arguments, **options)
        model = arguments[1]
        flat = self._layout.flatten(dict(model.named_parameters()))
        self._start = flat if self._start is None else self._start
        self._crowd.classifiers[digest] = flat - self._start
        return digest

    def committed(self, commit: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """In place of ``Store.commit_round``: judge the candidate."""
        commit(*arguments, **options)
        now = self._clock.now()
        if now > HORIZON:
            raise HorizonReachedError("the horizon is reached")
        self.points.append((now, self._crowd.accuracy(options["candidate"].digest)))


def play(photographs: Photographs, seed: int, rules: RoundConfig) -> Cell:
    """One run up to the horizon."""
    crowd, clock = Crowd(photographs, seed), SimClock()
    course = Course(crowd, clock)
    config = ServerConfig(
        seed=seed,
        backbone=CARRIER,
        plan=PlanConfig(rounds=10_000),
        rounds=rules,
        train=TrainConfig(trainable="full"),
    )
    save, commit = Models.save, Store.commit_round
    Models.save = partial_method(course.saved, save)  # type: ignore[method-assign]
    Store.commit_round = partial_method(course.committed, commit)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spec = backbone.dense_spec(CARRIER.name, CARRIER.image_size, CARRIER.options)
            torch.manual_seed(seed)
            backbone.save_backbone(folder / "base.safetensors", backbone.build(spec), spec)
            settings = folder / "run.json"
            text = RunSettings(config=config, probe=False).model_dump_json()
            settings.write_text(text)
            run_rounds(SimLink(clock, crowd.farms, crowd.answer, seed), folder, settings, clock)
    except HorizonReachedError:
        pass
    finally:
        Models.save, Store.commit_round = save, commit  # type: ignore[method-assign]
    times = [seconds for seconds, _ in course.points]
    reached = [seconds for seconds, accuracy in course.points if accuracy >= TARGET]
    return {
        "seed": seed,
        "rounds": len(course.points),
        "time_to_target": float(reached[0]) if reached else None,
        "accuracy": course.points[-1][1],
        "longest_round": float(np.diff(times).max()),
    }


def partial_method(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """A plain function, which a class binds as a method; ``partial`` objects are not bound."""
    bound = partial(function, *first)
    return lambda *arguments, **options: bound(*arguments, **options)


def synchronous(deadline: float) -> RoundConfig:
    """Wait for all farms, at most until the deadline; late answers are thrown away."""
    return RoundConfig(deadline_seconds=deadline, grace_seconds=0, max_in_flight=FARMS)


def ours() -> RoundConfig:
    """A candidate after every 40 answers; late ones count, weighed by their age."""
    return RoundConfig(
        mode="async",
        buffer=40,
        staleness=100,
        deadline_seconds=900,
        attempt_seconds=450,
        max_in_flight=FARMS,
    )


def summary(cells: list[Cell], rule: str) -> dict[str, Any]:
    """Means over seeds; a run that never got there counts as the whole horizon."""
    own = [cell for cell in cells if cell["rule"] == rule]
    times = [HORIZON if c["time_to_target"] is None else c["time_to_target"] for c in own]
    return {
        "rule": rule,
        "seconds": fmean(times),
        "accuracy": fmean(c["accuracy"] for c in own),
        "longest_round": max(c["longest_round"] for c in own),
        "per_seed": own,
    }


def main() -> None:
    """Run what is missing, print, write."""
    logging.disable(logging.WARNING)  # a third of all messages is lost: that is the point
    cells = Cells("stragglers")
    photographs = Photographs()
    rules = {f"deadline {d} s": synchronous(d) for d in DEADLINES} | {"async": ours()}
    found: list[Cell] = []
    for seed in range(SEEDS):
        for name, rule in rules.items():
            cell = cells.run(f"{name}, seed {seed}", partial(play, photographs, seed, rule))
            if cell is None:
                unfinished("stragglers")
                return
            found.append(cell | {"rule": name})
    rows = [summary(found, name) for name in rules]
    best = min(rows[:-1], key=lambda row: row["seconds"])
    for row in rows:
        print(f"{row['rule']:16s} {row['seconds']:8.0f} s   {row['accuracy']:.3f}")
    figures = {
        "sync_seconds": best["seconds"],
        "ours_seconds": rows[-1]["seconds"],
        "sync_accuracy": best["accuracy"],
        "sync_accuracy_best": max(row["accuracy"] for row in rows[:-1]),
        "ours_accuracy": rows[-1]["accuracy"],
        "target": TARGET,
        "rows": rows,
    }
    cells.finish(figures, list(range(SEEDS)))


if __name__ == "__main__":
    main()
