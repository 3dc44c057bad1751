"""A pruned backbone is told, layer by layer, what a fuller one says of some images."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.backbone import block_layers, build, dense_spec
from common.errors import DataError, ModelError
from common.mask import Keep
from common.reconstruction import reconstruct
from common.spec import ModelSpec
from common.surgery import prune
from tests.common.test_surgery import (
    ARCHITECTURES,
    SPEC,
    architecture,
    drawn_model,
    everything,
    images,
    random_keep,
)


def gap(model: VisionTransformer, fuller: VisionTransformer, x: Tensor) -> float:
    """Mean squared distance of what leaves the last block, which is what is fitted."""
    streams: list[Tensor] = []
    handles = [
        one.blocks[-1].register_forward_hook(lambda _m, _i, out: streams.append(out))
        for one in (model, fuller)
    ]
    with torch.no_grad():
        model(x)
        fuller(x)
    for handle in handles:
        handle.remove()
    return float((streams[0] - streams[1]).square().mean())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_on_the_images_it_is_told_about_it_says_nearly_the_same(kind: str) -> None:
    fuller, _, _, spec = architecture(kind)
    keep = random_keep(spec, 1)
    whole = everything(spec).neurons[:1]  # a layer that the two share after the cut
    pruned, smaller = prune(fuller, spec, Keep(keep.heads, (*whole, *keep.neurons[1:])))
    x = images(spec, 8)
    before = gap(pruned, fuller, x)
    state = copy.deepcopy(fuller.state_dict())
    reconstruct(pruned, smaller, fuller, spec, list(torch.split(x, 3)), ridge=1e-2)
    assert gap(pruned, fuller, x) < 0.5 * before
    now = fuller.state_dict()
    assert all(torch.equal(state[name], now[name]) for name in state)
    assert not any(block.attn.proj._forward_pre_hooks for block in block_layers(pruned))


@given(seed=st.integers(0, 50), ridge=st.sampled_from([1e-3, 1e-1, 1.0]))
@settings(deadline=None, max_examples=15)
def test_the_last_layer_is_never_worse_on_the_images_it_is_fitted_to(
    seed: int, ridge: float
) -> None:
    """One block whose attention is whole: what is left to its MLP is least squares alone."""
    spec = dense_spec(
        "vit_tiny_patch16_224", 32, {"depth": 1, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2}
    )
    fuller = drawn_model(spec, seed)
    keep = Keep(everything(spec).heads, random_keep(spec, seed).neurons)
    pruned, smaller = prune(fuller, spec, keep)
    x = images(spec, 4)
    before = gap(pruned, fuller, x)
    reconstruct(pruned, smaller, fuller, spec, [x], ridge)
    assert gap(pruned, fuller, x) <= before * (1 + 1e-5)


def test_neurons_that_say_the_same_are_replaced_on_any_image() -> None:
    fuller = drawn_model(SPEC)
    with torch.no_grad():
        for layers in block_layers(fuller):
            layers.fc1.weight[1::2] = layers.fc1.weight[::2]
            layers.fc1.bias[1::2] = layers.fc1.bias[::2]
    keep = Keep(everything(SPEC).heads, tuple(np.arange(0, n, 2) for n in SPEC.neurons))
    pruned, smaller = prune(fuller, SPEC, keep)
    reconstruct(pruned, smaller, fuller, SPEC, [images(SPEC, 40)], ridge=1e-9)
    other = torch.randn(3, 3, SPEC.image_size, SPEC.image_size)
    with torch.no_grad():
        torch.testing.assert_close(pruned(other), fuller(other), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_where_nothing_was_cut_nothing_changes(ridge: float) -> None:
    fuller = drawn_model(SPEC)
    same = copy.deepcopy(fuller)
    reconstruct(same, SPEC, fuller, SPEC, [images(SPEC)], ridge)
    for name, tensor in fuller.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_strong_ridge_leaves_it_as_it_was() -> None:
    fuller = drawn_model(SPEC)
    pruned, smaller = prune(fuller, SPEC, random_keep(SPEC, 2))
    before = copy.deepcopy(pruned.state_dict())
    reconstruct(pruned, smaller, fuller, SPEC, [images(SPEC)], ridge=1e9)
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)


def test_batches_may_be_cut_as_one_likes() -> None:
    fuller, x = drawn_model(SPEC), images(SPEC, 6)
    made = []
    for size in (6, 2):
        pruned, smaller = prune(fuller, SPEC, random_keep(SPEC, 3))
        reconstruct(pruned, smaller, fuller, SPEC, list(torch.split(x, size)), ridge=0.1)
        made.append(pruned.state_dict())
    for name in made[0]:
        torch.testing.assert_close(made[0][name], made[1][name], rtol=1e-3, atol=1e-4)


def test_an_attention_that_is_gone_is_made_up_for_behind_it() -> None:
    fuller = drawn_model(SPEC)
    heads = (np.empty(0, np.int64), *everything(SPEC).heads[1:])
    pruned, smaller = prune(fuller, SPEC, Keep(heads, everything(SPEC).neurons))
    x = images(SPEC, 8)
    before = gap(pruned, fuller, x)
    reconstruct(pruned, smaller, fuller, SPEC, [x], ridge=1e-2)
    assert gap(pruned, fuller, x) < 0.5 * before


def another(**changes: object) -> ModelSpec:
    return SPEC.model_copy(update=changes)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (another(image_size=48), "take a backbone of the same network"),
        (another(name="deit_tiny_patch16_224"), "deit_tiny_patch16_224 at 32 px cannot tell"),
        (another(kept_tokens=(4, 2)), "drops tokens"),
    ],
)
def test_another_network_cannot_tell_it(spec: ModelSpec, words: str) -> None:
    model = build(SPEC)
    with pytest.raises(ModelError, match=words):
        reconstruct(model, SPEC, model, spec, [images(SPEC)])


def test_there_must_be_images() -> None:
    model = build(SPEC)
    with pytest.raises(DataError, match="there are none"):
        reconstruct(model, SPEC, copy.deepcopy(model), SPEC, [])
