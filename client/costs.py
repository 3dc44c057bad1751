"""What heads and neurons cost on this machine: a table that a server prunes by (common/costs.py).

A dense backbone is timed beside others whose blocks all keep fewer heads, or fewer neurons, in ONNX
Runtime, two at a time and in turns, so that what slows the machine down slows both. Weights are
random: they do not matter for time.
"""

import logging
import platform
from collections.abc import Iterator
from functools import partial

import numpy as np

from common import backbone
from common.costs import CostTable, cost_alike
from common.errors import ConfigError
from common.export import exported
from common.latency import compared
from common.runtime import Runtime
from common.spec import ModelSpec

log = logging.getLogger(__name__)

PORTIONS = 8
"""Counts of neurons that are measured; between them time is interpolated."""


def measured_costs(
    dense: ModelSpec, *, device: str = "", threads: int = 1, seconds: float = 5.0
) -> CostTable:
    """Measure a backbone's units on this machine.

    Args:
        dense: the backbone before any cut.
        device: what to call this kind of device; empty: by its processor.
        threads: of ONNX Runtime.
        seconds: of measuring, per number of units.

    Raises:
        ConfigError: it is not dense, or there is nothing to choose from in its blocks.
        ModelError: it cannot be built or run.
    """
    found: dict[str, dict[int, float]] = {"heads": {}, "neurons": {}}
    everything, best = _runtime(dense, threads), float("inf")
    smaller = list(_smaller(dense))
    for number, (kind, count, spec) in enumerate(smaller, start=1):
        other = _runtime(spec, threads)
        image = np.zeros((1, 3, spec.image_size, spec.image_size), np.float32)
        works = [partial(one.features, image) for one in (everything, other)]
        whole, part = compared(works, seconds)
        found[kind][count], best = part.ratio, min(best, whole.p50)
        log.info(
            "%d of %d: %d %s a block, %.2f of the time",
            *(number, len(smaller), count, kind, part.ratio),
        )
    return CostTable(
        device=device or platform.processor() or platform.machine(),
        engine="onnxruntime",
        threads=threads,
        spec=dense,
        dense_seconds=best,
        heads=found["heads"],
        neurons=found["neurons"],
    )


def _smaller(dense: ModelSpec) -> Iterator[tuple[str, int, ModelSpec]]:
    """Backbones with fewer units in every block: kind, count and spec."""
    if not cost_alike(dense):
        raise ConfigError(f"this {dense.name} has been cut or changed; give the dense backbone")
    heads, neurons = dense.heads[0], dense.neurons[0]
    if heads < 2 or neurons < PORTIONS:
        raise ConfigError(f"{dense.name} has too few heads or neurons per block to leave any out")
    for count in range(1, heads):
        yield "heads", count, dense.with_units((count,) * dense.depth, dense.neurons)
    for part in range(1, PORTIONS):
        count = max(part * neurons // PORTIONS, 1)
        yield "neurons", count, dense.with_units(dense.heads, (count,) * dense.depth)


def _runtime(spec: ModelSpec, threads: int) -> Runtime:
    graph = exported(backbone.build(spec), spec.image_size)
    return Runtime(graph, threads=threads, settle=True)
