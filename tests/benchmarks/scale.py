"""Ten thousand registered farms, five hundred at work in each round: what the server itself costs.

``make scale`` (about a minute). Farms are simulated and answer with random updates and scores; the
round loop, the checks, the spool, the store, aggregation and consensus are the product's own.
Printed: peak resident memory, and per round the seconds that are neither aggregation, consensus
nor the simulation's own (``farms``: the simulated link with all its farms), as the median of
``REPEATS`` runs, because the speed of a machine that others use as well wavers by a third.
``python -m cProfile -s cumulative -m tests.benchmarks.scale`` shows where they go.
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

import server.close
from common import backbone, codec
from common.compress import expand
from common.config import BackboneConfig, RoundConfig, ServerConfig
from common.messages import AlignReply, AlignRequest, EvaluateReply, EvaluateRequest, Reply, Request
from common.plan import PlanConfig
from common.scores import encode_neurons
from common.spec import ModelSpec
from common.step import MAX_BYTES
from common.trainable import trainable_set
from server.begin import run_rounds
from server.settings import RunSettings
from server.store import Store
from tests.benchmarks.cells import Cells, unfinished
from tests.lab.simulation import SimClock, SimFarm, SimLink

REGISTERED, ACTIVE, ROUNDS, REPEATS = 10_000, 500, 4, 5
NAME, SIDE = "vit_small_patch14_dinov2", 112
PARTS = ("aggregate", "consensus", "farm_scores")


class Stopwatch:
    """Seconds spent in functions, by name, up to the end of each round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("farms", *PARTS), 0.0)
        self.rounds: list[dict[str, float]] = []

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The function, on the watch."""

        def watched(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return work(*arguments, **options)
            finally:
                self.seconds[name] += time.monotonic() - started

        return watched


class Answers:
    """Random replies of the right shape."""

    def __init__(self, trainable: str) -> None:
        self._trainable = trainable
        self._shapes: dict[str, tuple[ModelSpec, int]] = {}
        self._rng = np.random.default_rng(0)

    def _shape(self, request: AlignRequest) -> tuple[ModelSpec, int]:
        """Spec and numbers of an update under a mask; its first request carries the backbone."""
        if request.mask not in self._shapes:
            assert request.body is not None
            model, spec = backbone.unpack(expand(request.body, MAX_BYTES).tobytes())
            self._shapes[request.mask] = spec, trainable_set(model, self._trainable).layout.count
        return self._shapes[request.mask]

    def __call__(self, node: int, farm: SimFarm, request: Request) -> Reply:
        """A reply to any request."""
        done: dict[str, Any] = {
            "farm": farm.name,
            "examples": 100,
            "accuracy": 0.8,
            "f1": 0.8,
            "seconds": 60.0,
        }
        if isinstance(request, EvaluateRequest):
            return EvaluateReply(**request.identity(), **done, label=request.label)
        assert isinstance(request, AlignRequest)
        spec, count = self._shape(request)
        values = self._rng.standard_normal(count, dtype=np.float32)
        scores: dict[str, Any] = {}
        if request.criterion is not None:
            heads, neurons = sum(spec.heads), sum(spec.neurons)
            scores["head_importance"] = self._rng.dirichlet(np.ones(heads)).astype(np.float32)
            scores["head_mmd2"] = self._rng.uniform(0, 1, heads).astype(np.float32)
            neuron = self._rng.dirichlet(np.ones(neurons)).astype(np.float32)
            scores["neuron_importance"] = encode_neurons(neuron)
        return AlignReply(
            **request.identity(),
            **done,
            loss=1.0,
            dal=0.0,
            steps=10,
            train_seconds=50.0,
            update=codec.encode(values, request.base),
            **scores,
        )


def measure(folder: Path) -> dict[str, Any]:
    """One run; rounds 1 and 2 are score rounds, and round 2 ends with a prune event."""
    spec = backbone.dense_spec(NAME, SIDE)
    model = backbone.build(spec)
    backbone.save_backbone(folder / "base.safetensors", model, spec)
    config = ServerConfig(
        backbone=BackboneConfig(name=NAME, image_size=SIDE),
        plan=PlanConfig(rounds=ROUNDS, warmup=2, prune_events=1, prune_heads=0.1),
        rounds=RoundConfig(sample=ACTIVE, max_in_flight=REGISTERED, grace_seconds=0),
    )
    settings = folder / "run.json"
    settings.write_text(RunSettings(config=config, probe=False).model_dump_json())
    watch, clock, rng = Stopwatch(), SimClock(), np.random.default_rng(1)
    answers = Answers(config.train.trainable)
    farms = [SimFarm(f"farm{i}", float(rng.uniform(40, 200))) for i in range(REGISTERED)]
    link = SimLink(clock, farms, answers)
    for method in ("online", "send", "poll"):
        setattr(link, method, watch.timed("farms", getattr(link, method)))
    commit = Store.commit_round

    def noted(*arguments: Any, **options: Any) -> None:
        watch.rounds.append(dict(watch.seconds))
        commit(*arguments, **options)

    with ExitStack() as patches:
        for part in PARTS:
            timed = watch.timed(part, getattr(server.close, part))
            patches.enter_context(patch.object(server.close, part, timed))
        patches.enter_context(patch.object(Store, "commit_round", noted))
        run_rounds(link, folder, settings, clock)
    with Store.open(folder / "fieldfed.db") as store:
        found = [row for row in store.rounds(1) if row.kind == "align"]
    rows, before = [], dict.fromkeys(watch.seconds, 0.0)
    for row, total in zip(found, watch.rounds, strict=True):
        parts = {name: total[name] - before[name] for name in total}
        wall, before = (row.finished or row.started) - row.started, total
        own = wall - sum(parts.values())
        rows.append({"round": row.round, "replies": row.participants, "wall": wall, "own": own})
        rows[-1] |= parts
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rss_bytes": rss_bytes, "rows": rows}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, round by round; the limit applies to the slowest round's."""
    rows = []
    for found in zip(*(run["rows"] for run in runs), strict=True):
        middle = {name: median(row[name] for row in found) for name in found[0]}
        rows.append(middle | {"own_by_run": [row["own"] for row in found]})
    return {
        "registered": REGISTERED,
        "active": ACTIVE,
        "rss_bytes": max(run["rss_bytes"] for run in runs),
        "server_seconds_per_round": max(row["own"] for row in rows),
        "rows": rows,
    }


def main() -> None:
    """Measure, print, write."""
    cells = Cells("scale", 30)
    runs = []
    for number in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            found = cells.run(f"run {number}", partial(measure, Path(folder)))
        if found is None:
            unfinished("scale")
            return
        runs.append(found)
    figures = summary(runs)
    cells.finish(figures, [0])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
