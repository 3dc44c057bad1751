"""What a student learns from a teacher agrees with its formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.backbone import block_layers, build, dense_spec
from common.distil import attention_map, energy, map_distance, soft_answers
from common.errors import ModelError
from common.spec import ModelSpec

SPEC = dense_spec(
    "vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8}
)


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.floats(0.5, 10))
@settings(deadline=None, max_examples=30)
def test_soft_answers_are_their_formula(seed: int, temperature: float) -> None:
    student, teacher = drawn(seed, 4, 3).double(), drawn(seed + 1, 4, 3).double()
    p, q = (np.exp(x.numpy() / temperature) for x in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(soft_answers(student, teacher, temperature)) == pytest.approx(expected)
    assert float(soft_answers(student, student, temperature)) == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 1000), st.floats(0.1, 100))
@settings(deadline=None, max_examples=30)
def test_maps_are_compared_by_their_shape_alone(seed: int, factor: float) -> None:
    one, other = drawn(seed, 2, 4, 4).square(), drawn(seed + 1, 2, 4, 4).square()
    assert float(map_distance(one, factor * one)) == pytest.approx(0, abs=1e-5)
    cosine = torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1))
    assert float(map_distance(one, other)) == pytest.approx(
        float((2 - 2 * cosine).mean()), abs=1e-5
    )


def test_a_teacher_with_a_finer_grid_is_resized() -> None:
    coarse = torch.zeros(1, 2, 2)
    coarse[0, 0, 1] = 1
    fine = torch.zeros(1, 8, 8)
    fine[0, :4, 4:] = 1
    other = torch.zeros(1, 8, 8)
    other[0, 4:, :4] = 1
    assert float(map_distance(coarse, fine)) < 0.3
    assert float(map_distance(coarse, other)) > 1.5


def test_energy_is_the_sum_of_squares() -> None:
    features = drawn(0, 2, 5, 3, 4)
    np.testing.assert_allclose(energy(features), (features.numpy() ** 2).sum(1), rtol=1e-5)
    with pytest.raises(ModelError, match="four dimensions"):
        energy(drawn(0, 2, 5))


def test_a_transformer_looks_where_its_class_token_attends() -> None:
    torch.manual_seed(0)
    model = build(SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    attn = block_layers(model)[1].attn
    seen = []
    hook = attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out))
    images = drawn(1, 2, 3, 32, 32)
    with torch.inference_mode(), attention_map(model, SPEC) as maps:
        model(images)
    hook.remove()
    q, k, _ = seen[0].reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    weight = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    expected = weight[:, :, 0, 1:].mean(1).reshape(2, 4, 4)
    torch.testing.assert_close(maps[0], expected)
    assert not attn._forward_hooks
    assert not attn.q_norm._forward_hooks


def test_no_map_without_all_tokens() -> None:
    sparse = ModelSpec.model_validate(SPEC.model_dump() | {"kept_tokens": (8, 8)})
    with pytest.raises(ModelError, match="has no map"), attention_map(build(sparse), sparse):
        pass
