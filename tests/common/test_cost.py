"""What is counted in a graph is what the formulas of backbones say, and what torch holds."""

from pathlib import Path

import pytest
import torch
from torch import nn

from common.backbone import macs, parameters
from common.cost import cost_of
from common.errors import ModelError
from common.export import exported
from common.int8 import quantised
from tests.common.test_efficient import KINDS, spec_of, twins
from tests.common.test_export import written


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_a_backbone_costs_what_its_formula_says(kind: str) -> None:
    spec = spec_of(**KINDS.get(kind, {}))
    model, _ = twins(**KINDS.get(kind, {}))  # no two tensors alike, which a graph would hold once
    found = cost_of(exported(model, spec.image_size), spec.image_size)
    assert found.parameters == parameters(model)
    # sums of linear attention and what is fused are products of the graph alone
    assert found.macs == pytest.approx(macs(spec), rel=1e-9 if kind == "dense" else 0.03)


def test_numbers_beside_the_graph(tmp_path: Path) -> None:
    spec = spec_of()
    model, _ = twins()
    graph, objects = written(tmp_path, (model, spec))
    found = cost_of(graph, spec.image_size, objects.folder)
    assert found == (macs(spec), parameters(model))


def test_convolutions_and_8_bits() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net = nn.Sequential(*layers, nn.Linear(6, 4))
    graph = exported(net.eval(), 8)
    products = 6 * 8 * 8 * 9 + 6 * 4
    assert cost_of(graph, 8) == (products, parameters(net))
    small = quantised(graph, [torch.randn(1, 3, 8, 8).numpy() for _ in range(4)])
    assert cost_of(small, 8) == (products, parameters(net))


def test_what_is_no_graph() -> None:
    with pytest.raises(ModelError, match="cannot be counted at 8 px"):
        cost_of(b"no graph", 8)
