"""Multiply-accumulates agree with PyTorch's own counter, dense and pruned."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from common.backbone import (
    block_layers,
    build,
    dense_spec,
    head_macs,
    macs,
    neuron_macs,
    parameters,
    tokens,
)
from common.mask import Keep
from common.spec import ModelSpec
from common.surgery import prune

ARCHITECTURES = [
    ("vit_tiny_patch16_224", 224, {}),
    ("deit_tiny_distilled_patch16_224", 96, {"depth": 2}),
    ("vit_small_patch14_dinov2", 112, {"depth": 2}),
    ("vit_small_patch14_reg4_dinov2", 112, {"depth": 2}),
    ("deit3_small_patch16_224", 64, {"depth": 2}),
    ("vit_little_patch16_reg4_gap_256", 64, {"depth": 2}),
]


def counted(model: VisionTransformer, image_size: int) -> float:
    """Half the floating point operations of one image; the counter cannot see fused kernels."""
    for layers in block_layers(model):
        vars(layers.attn)["fused_attn"] = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, image_size, image_size))
    return float(counter.get_total_flops()) / 2


@pytest.mark.parametrize(("name", "image_size", "options"), ARCHITECTURES)
def test_macs_agree_with_an_independent_counter(
    name: str, image_size: int, options: dict[str, int]
) -> None:
    spec = dense_spec(name, image_size, options)
    model = build(spec)
    keep = Keep(
        tuple(np.arange(0, heads, 2) for heads in spec.heads),
        tuple(np.arange(block % 2, count, 3) for block, count in enumerate(spec.neurons)),
    )
    pruned, smaller = prune(model, spec, keep)
    assert counted(model, image_size) == pytest.approx(macs(spec), rel=0.01)
    assert counted(pruned, image_size) == pytest.approx(macs(smaller), rel=0.01)
    assert parameters(pruned) < parameters(model)


def test_units_add_up() -> None:
    spec = dense_spec("vit_small_patch14_dinov2", 112)
    fewer = spec.with_units((5, *spec.heads[1:]), (1500, *spec.neurons[1:]))
    count = tokens(spec)
    assert count == 65
    assert macs(spec) - macs(fewer) == head_macs(spec, count) + 36 * neuron_macs(spec, count)


def test_a_head_costs_as_much_as_139_neurons() -> None:
    spec: ModelSpec = dense_spec("vit_small_patch14_dinov2", 112)
    assert head_macs(spec, 65) / neuron_macs(spec, 65) == pytest.approx(139, abs=0.5)
