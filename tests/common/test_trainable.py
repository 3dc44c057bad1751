"""Trainable sets: what belongs to them, and factors that are merged as they were trained."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from common import backbone
from common.config import TrainConfig
from common.errors import ModelError, ProtocolError
from common.mask import Keep
from common.surgery import prune, slice_tensors
from common.trainable import FACTOR, TRAINABLE_SETS, factors, trainable_names, trainable_set
from tests.lab.network import SIDE, TINY

SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)


def model_of(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return backbone.build(SPEC)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def trained(
    model: VisionTransformer, rank: int, seed: int
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    count = trainable_set(model, "lora", rank).layout.count
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return values * np.float32(0.05)


def test_sets_are_nested() -> None:
    sets = {kind: set(trainable_names(model_of(), kind)) for kind in TRAINABLE_SETS}
    assert sets["bias"] == sets["lora"] < sets["attention"] < sets["full"]
    names = trainable_set(model_of(), "lora", 4).layout.names
    assert sum(name.endswith(FACTOR) for name in names) == 4 * SPEC.depth
    assert list(names) == sorted(names)


def test_the_default_set_of_a_vit_s_is_130_thousand_numbers() -> None:
    spec = backbone.dense_spec("vit_small_patch14_dinov2", 112)
    with torch.device("meta"):
        model = backbone.build(spec)
    default = TrainConfig()
    chosen = trainable_set(model, default.trainable, default.rank)
    assert 120_000 < chosen.layout.count < 140_000
    assert 60_000 < trainable_set(model, "bias").layout.count < 80_000


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown trainable set"):
        trainable_set(model_of(), "some")


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(0, 99))
def test_merged_factors_compute_what_they_did_beside_the_weights(rank: int, seed: int) -> None:
    model, flat = model_of(seed), trained(model_of(seed), rank, seed)
    chosen = trainable_set(model, "lora", rank)
    changes = chosen.layout.unflatten(flat)
    with factors(model, rank), torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in changes:
                parameter.add_(changes[name])
        beside = model(images())
        names = {name for name, _ in model.named_parameters() if name.endswith(FACTOR)}
        assert names == {name for name in chosen.layout.names if name.endswith(FACTOR)}
    merged = model_of(seed)
    before = merged(images())
    chosen.add(merged, flat)
    torch.testing.assert_close(merged(images()), beside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, beside, atol=1e-2)


def test_nothing_is_left_of_the_factors_afterwards() -> None:
    model = model_of()
    before = backbone.digest(model, SPEC)
    with pytest.raises(RuntimeError), factors(model, 3):
        raise RuntimeError("in the middle of training")
    assert backbone.digest(model, SPEC) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_merging_adds_the_factors_alone() -> None:
    """After training the parameters have moved already; what is left to add is the product."""
    model, flat = model_of(), trained(model_of(), 3, 1)
    chosen = trainable_set(model, "lora", 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen.merge(model, flat)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.ndim == 1 or "blocks" not in name)


def test_the_mean_of_updates_is_the_mean_of_changes() -> None:
    one, other = (trained(model_of(), 4, seed) for seed in (1, 2))
    chosen = trainable_set(model_of(), "lora", 4)
    weights = []
    for flat in (one, other, (one + other) / np.float32(2)):
        model = model_of()
        chosen.add(model, flat)
        weights.append(dict(model.named_parameters())["blocks.1.mlp.fc2.weight"].detach())
    torch.testing.assert_close((weights[0] + weights[1]) / 2, weights[2], rtol=1e-6, atol=1e-6)


def test_a_factor_is_cut_like_its_weight() -> None:
    """Cutting, then adding what is left of a change, is adding the change, then cutting."""
    keep = Keep(
        tuple(np.array([0, 2]) for _ in range(SPEC.depth)),
        tuple(np.arange(0, count, 3) for count in SPEC.neurons),
    )
    model, flat = model_of(), trained(model_of(), 4, 5)
    whole = trainable_set(model, "lora", 4)
    kept = slice_tensors(whole.layout.unflatten(flat), SPEC, keep)
    smaller, _ = prune(model_of(), SPEC, keep)
    part = trainable_set(smaller, "lora", 4)
    part.add(smaller, part.layout.flatten(kept))
    whole.add(model, flat)
    expected, _ = prune(model, SPEC, keep)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(smaller.state_dict()[name], tensor), name


def test_a_change_of_another_size_is_refused() -> None:
    chosen = trainable_set(model_of(), "lora", 4)
    with pytest.raises(ProtocolError, match="is expected"):
        chosen.add(model_of(), np.zeros(chosen.layout.count - 1, np.float32))
