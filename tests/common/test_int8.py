"""Which products of a graph become 8-bit."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from common.export import exported
from common.int8 import CONVOLUTION, EXACT_CONVOLUTIONS, quantised
from common.pixels import Floats

SIDE, DEEP = 16, 13


@pytest.fixture(scope="module")
def graph() -> bytes:
    """Thirteen convolutions and a classifier."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(DEEP):
        layers += [nn.Conv2d(8 if index else 3, 8, 3, padding=1), nn.ReLU()]
    return exported(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * SIDE**2, 4)).eval(), SIDE)


def images(count: int) -> list[Floats]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 3, SIDE, SIDE), dtype=np.float32) for _ in range(count)]


def test_the_first_convolutions_stay_exact(graph: bytes) -> None:
    nodes = onnx.load_from_string(quantised(graph, images(4))).graph.node
    maker = {name: node.op_type for node in nodes for name in node.output}
    convolutions = [node for node in nodes if node.op_type == CONVOLUTION]
    in_8_bits = [maker.get(node.input[1]) == "DequantizeLinear" for node in convolutions]
    assert in_8_bits == [index >= EXACT_CONVOLUTIONS for index in range(DEEP)]


def test_a_transformer_reads_its_patches_exactly_and_multiplies_in_8_bits() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(128, 4))
    nodes = onnx.load_from_string(quantised(exported(patches.eval(), SIDE), images(4))).graph.node
    maker = {name: node.op_type for node in nodes for name in node.output}
    kinds = {node.op_type: maker.get(node.input[1]) for node in nodes if len(node.input) > 1}
    assert kinds[CONVOLUTION] is None
    assert kinds["Gemm"] == "DequantizeLinear"
