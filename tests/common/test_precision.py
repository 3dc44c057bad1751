"""bfloat16 where it is fast: attention that is differentiated on a CPU is computed in float32."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common import backbone
from common.precision import bf16_supported, bfloat16

CPU = torch.device("cpu")


def heads(requires_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, 17, 8, generator=generator).bfloat16().unbind(0)
    return tuple(one.clone().requires_grad_(requires_grad) for one in (q, k, v))  # type: ignore[return-value]


def test_differentiated_attention_is_that_of_float32() -> None:
    q, k, v = heads(requires_grad=True)
    with bfloat16(CPU, enabled=True):
        found = functional.scaled_dot_product_attention(q, k, v)
    exact = functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    weight = torch.linspace(-1, 1, found.numel()).view(found.shape)
    (rough,) = torch.autograd.grad((found.float() * weight).sum(), q)
    (best,) = torch.autograd.grad((exact.bfloat16().float() * weight).sum(), q)
    assert torch.equal(rough, best)


def test_a_mask_takes_part() -> None:
    q, k, v = heads(requires_grad=True)
    mask = torch.linspace(-2, 2, 17 * 17).view(17, 17).bfloat16()
    with bfloat16(CPU, enabled=True):
        found = functional.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
    exact = functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask.float()
    )
    assert torch.equal(found, exact.bfloat16())


def test_other_attention_is_that_of_torch() -> None:
    q, k, v = heads(requires_grad=False)
    plain = functional.scaled_dot_product_attention(q, k, v)
    with bfloat16(CPU, enabled=True):
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v), plain)
    q, k, v = heads(requires_grad=True)
    with bfloat16(CPU, enabled=True), torch.no_grad():
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v), plain)


def test_where_it_is_off_nothing_changes() -> None:
    layer, x = torch.nn.Linear(5, 7), torch.ones(3, 5)
    with bfloat16(CPU, enabled=False):
        assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    with bfloat16(CPU, enabled=True):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_gradients_of_a_backbone_are_close_to_those_of_float32(name: str) -> None:
    torch.manual_seed(0)
    model = backbone.build(backbone.dense_spec(name, 32)).train()
    images = torch.randn(4, 3, 32, 32)

    def gradient(enabled: bool) -> Tensor:
        with bfloat16(CPU, enabled):
            features = model(images)
        found = torch.autograd.grad(features.float().square().sum(), list(model.parameters()))
        return torch.cat([one.flatten() for one in found])

    exact, rough = gradient(enabled=False), gradient(enabled=True)
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("has", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_a_processor_that_multiplies_bf16_in_some_way_supports_it(
    has: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has)
    assert bf16_supported() is (has is not None)
