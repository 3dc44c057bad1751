"""Taps see what a head says, gates scale it, and no hook outlives its block."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.backbone import block_layers, build, dense_spec
from common.errors import ModelError
from common.heads import Gates, evaluation_mode, gate_units, tap_heads

SPEC = dense_spec("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 48, "num_heads": 3})


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = build(SPEC)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn((count, 3, 32, 32), generator=torch.Generator().manual_seed(1))


def hooks(model: VisionTransformer) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def by_hand(model: VisionTransformer, x: Tensor) -> Tensor:
    """Block 0's heads from q, k and v, written out: (B,H,d)."""
    norm, attn = model.blocks[0].get_submodule("norm1"), block_layers(model)[0].attn
    normed = norm(model._pos_embed(model.patch_embed(x)))
    q, k, v = attn.qkv(normed).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    heads: Tensor = torch.softmax(q @ k.mT / 4, -1) @ v
    return heads


def test_tap_is_the_token_mean_of_each_head(model: VisionTransformer) -> None:
    with tap_heads(model) as z:
        model(images())
    assert [tuple(block.shape) for block in z] == [(2, 3, 16)] * 2
    torch.testing.assert_close(z[0], by_hand(model, images()).mean(2), atol=1e-5, rtol=1e-4)


def test_taps_carry_gradients_and_follow_each_forward(model: VisionTransformer) -> None:
    with tap_heads(model) as z:
        model(images())
        first = z[1]
        model(images(3))
        assert z[1].shape[0] == 3
    first.square().sum().backward()  # type: ignore[no-untyped-call]
    assert block_layers(model)[0].attn.qkv.weight.grad is not None


def test_taps_average_half_precision_in_fp32(model: VisionTransformer) -> None:
    with tap_heads(model) as z, torch.autocast("cpu", torch.bfloat16):
        model(images())
    assert z[0].dtype == torch.float32


def test_gates_of_one_change_nothing(model: VisionTransformer) -> None:
    expected = model(images())
    for batch in (1, 2):
        with gate_units(model, Gates.ones(model, batch)):
            assert torch.equal(model(images()), expected)


def test_gates_act_per_image_and_per_unit(model: VisionTransformer) -> None:
    gates = Gates.ones(model, 2)
    gates.heads[1][0, 2] = 0.5
    gates.neurons[0][0, 7] = 0.0
    with gate_units(model, gates):
        gated = model(images())
    layers = block_layers(model)
    with torch.no_grad():
        layers[1].attn.proj.weight[:, 32:48] *= 0.5
        layers[0].fc2.weight[:, 7] = 0
    torch.testing.assert_close(gated[0], model(images())[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        layers[1].attn.proj.weight[:, 32:48] *= 2
    assert not torch.allclose(gated[1], gated[0])


def test_hooks_are_removed_also_on_errors(model: VisionTransformer) -> None:
    with pytest.raises(RuntimeError), tap_heads(model), gate_units(model, Gates.ones(model)):
        assert hooks(model) == 6
        model(torch.zeros(1, 3, 32, 32, dtype=torch.int32))
    assert hooks(model) == 0


def test_foreign_gates_are_refused(model: VisionTransformer) -> None:
    gates = Gates.ones(model)
    with (
        pytest.raises(ModelError, match="units per block"),
        gate_units(model, Gates([g[:, :1] for g in gates.heads], gates.neurons)),
    ):
        pass
    with pytest.raises(ModelError), gate_units(model, Gates(gates.heads, gates.neurons[:1])):
        pass
    assert hooks(model) == 0


def test_evaluation_mode_restores_every_submodule(model: VisionTransformer) -> None:
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
