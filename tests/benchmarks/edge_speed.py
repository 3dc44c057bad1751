"""How long one image takes, all models in turns (common/latency.py), at one thread and at all.

Weights are random: how long a product takes does not depend on its numbers. Shapes are those of the
runs that were judged, by the specs that their cells hold.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from client.bench import measured
from client.subjects import opened
from common import backbone
from common.export import exported
from common.int8 import quantised
from common.spec import ModelSpec
from common.student import Student
from tests.benchmarks.cells import Cell
from tests.benchmarks.edge_runs import SIDE, Scale

TORCH, FP32, INT8 = "torch", "fp32", "int8"


def speed_cell(scale: Scale, specs: Mapping[str, str], students: list[str]) -> Cell:
    """Latency of every backbone and student; the first is the dense one in torch.

    Args:
        scale: where files are kept, and for how long is measured.
        specs: of backbones by name, as JSON, "dense" among them.
        students: names of timm networks.
    """
    torch.manual_seed(0)
    folder = scale.root / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    dense = ModelSpec.from_json(specs["dense"])
    first = folder / f"dense {TORCH}.safetensors"
    backbone.save_backbone(first, backbone.build(dense), dense)
    paths = [first]
    for name, text in specs.items():
        spec = ModelSpec.from_json(text)
        paths += _written(folder, name, exported(backbone.build(spec), spec.image_size))
    for name in students:
        paths += _written(folder, name, exported(Student(name).eval(), SIDE))
    subjects = [opened(path) for path in paths]
    rows = [asdict(row) for row in measured(subjects, [], scale.seconds)]
    return {"kind": "speed", "rows": [row | {"model": Path(row["model"]).stem} for row in rows]}


def _written(folder: Path, name: str, graph: bytes) -> list[Path]:
    """A graph in fp32 and in 8 bits."""
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, 3, SIDE, SIDE), dtype=np.float32) for _ in range(4)]
    bodies = {FP32: graph, INT8: quantised(graph, images)}
    paths = [folder / f"{name} {precision}.onnx" for precision in bodies]
    for path, body in zip(paths, bodies.values(), strict=True):
        path.write_bytes(body)
    return paths
