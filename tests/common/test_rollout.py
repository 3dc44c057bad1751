"""The map is its formula, and knows of heads only what they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.backbone import block_layers
from common.heads import Gates, gate_units
from common.mask import Mask
from common.rollout import patch_shares
from common.spec import ModelSpec
from common.surgery import prune
from tests.common.test_efficient import KINDS, spec_of, twins

ALL = {"dense": {}, **KINDS}


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def model_of(kind: str) -> tuple[VisionTransformer, ModelSpec]:
    return twins(**ALL[kind])[0], spec_of(**ALL[kind])


@pytest.mark.parametrize("kind", ALL)
def test_shares_sum_to_1_and_depend_on_the_image(kind: str) -> None:
    shares = patch_shares(model_of(kind)[0], images())
    assert shares.shape == (2, 4, 4)
    assert bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(2))
    assert (shares[0] - shares[1]).abs().max() > 1e-4


@given(st.permutations(range(4)), st.integers(0, 3))
@settings(deadline=None, max_examples=10)
def test_the_order_of_heads_does_not_matter(order: list[int], block: int) -> None:
    model, _ = model_of("both")
    before = patch_shares(model, images())
    attn = block_layers(model)[block].attn
    heads, width = attn.num_heads, attn.head_dim
    with torch.no_grad():
        rows = attn.qkv.weight.reshape(3, heads, width, -1)[:, order].flatten(0, 2)
        bias = attn.qkv.bias.reshape(3, heads, width)[:, order].flatten()
        columns = attn.proj.weight.reshape(-1, heads, width)[:, order].flatten(1)
        attn.qkv.weight.copy_(rows)
        attn.qkv.bias.copy_(bias)
        attn.proj.weight.copy_(columns)
    torch.testing.assert_close(patch_shares(model, images()), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_heads_that_are_masked_count_as_little_as_those_that_are_gone(kind: str) -> None:
    model, spec = model_of(kind)
    dense = Mask.dense(spec)
    fewer = Mask(
        ((0, 2), (1,), *dense.heads[2:]), dense.neurons, dense.dense_heads, dense.dense_neurons
    )
    keep = fewer.keep_in(dense)
    smaller = patch_shares(prune(model, spec, keep)[0], images())
    with gate_units(model, Gates.masking(model, keep)):
        masked = patch_shares(model, images())
    torch.testing.assert_close(masked, smaller, atol=1e-6, rtol=1e-4)
    assert (patch_shares(model, images()) - smaller).abs().max() > 1e-5


def test_it_is_its_formula() -> None:
    model, _ = model_of("dense")
    image = images(1)
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
        rolled = torch.eye(17)
        for block, layers in zip(model.blocks, block_layers(model), strict=True):
            attn = layers.attn
            q, k, v = (
                attn.qkv(block.get_submodule("norm1")(x)).unflatten(2, (3, 4, 12))[0].unbind(1)
            )
            taken = torch.zeros(17, 17)
            for head in range(4):
                weight = (q[:, head] @ k[:, head].T / 12**0.5).softmax(1)
                columns = attn.proj.weight[:, 12 * head : 12 * head + 12]
                for j in range(17):
                    taken[:, j] += weight[:, j] * (columns @ v[j, head]).norm()
            taken /= taken.sum(1, keepdim=True)
            rolled = (taken + torch.eye(17)) / 2 @ rolled
            x = block(x)
    expected = (rolled[0, 1:] / rolled[0, 1:].sum()).reshape(4, 4)
    torch.testing.assert_close(patch_shares(model, image)[0], expected, atol=1e-6, rtol=1e-4)


def test_nothing_stays_behind() -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    model, _ = model_of("both")
    before = hooks()
    patch_shares(model, images())
    assert hooks() == before
    assert (patch_shares(model, images()) == patch_shares(model, images())).all()
