"""Scores less what other units can say instead."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.backbone import block_layers, build, dense_spec
from common.errors import ModelError
from common.mask import Keep
from common.scores import UnitScores
from common.surgery import Moments, collect_moments, prune_compensated
from server.redundancy import irreplaceable

SPEC = dense_spec(
    "vit_tiny_patch16_224", 32, {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 16}
)


def drawn_model(seed: int = 0) -> VisionTransformer:
    generator = torch.Generator().manual_seed(seed)
    model = build(SPEC).double()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn / fan_in**0.5)
    return model


def images(count: int = 60) -> Tensor:
    shape = (count, 3, SPEC.image_size, SPEC.image_size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@lru_cache
def measured() -> tuple[VisionTransformer, Moments]:
    model = drawn_model()
    return model, collect_moments(model, [images()])


def drawn_scores(seed: int) -> UnitScores:
    rng = np.random.default_rng(seed)
    return UnitScores.from_flat(
        rng.random(sum(SPEC.heads), dtype=np.float32),
        rng.random(sum(SPEC.neurons), dtype=np.float32),
        SPEC,
    )


def flat(scores: UnitScores) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.concatenate([scores.flat_heads(), scores.flat_neurons()])


def errors_without(unit: int, kind: str, ridge: float) -> tuple[float, float]:
    """Squared error of block 0's layer when a unit is cut: plainly, and compensated."""
    model, moments = measured()
    gone = {"heads": unit} if kind == "heads" else {"neurons": unit}
    heads = np.delete(np.arange(SPEC.heads[0]), gone.get("heads", []))
    neurons = np.delete(np.arange(SPEC.neurons[0]), gone.get("neurons", []))
    keep = Keep(
        (heads, *map(np.arange, SPEC.heads[1:])), (neurons, *map(np.arange, SPEC.neurons[1:]))
    )
    G = (moments.heads if kind == "heads" else moments.neurons)[0]
    width = SPEC.head_width if kind == "heads" else 1
    kept = heads if kind == "heads" else neurons
    columns = torch.from_numpy((kept[:, None] * width + np.arange(width)).ravel())
    found = []
    for method in ("none", "least_squares"):
        cut, _ = prune_compensated(model, SPEC, keep, moments, method, ridge)
        old, new = block_layers(model)[0], block_layers(cut)[0]
        before = old.attn.proj if kind == "heads" else old.fc2
        after = new.attn.proj if kind == "heads" else new.fc2
        change = torch.cat([before.weight, before.bias[:, None]], 1).detach().clone()
        change[:, columns] -= after.weight.detach()
        change[:, -1] -= after.bias.detach()
        found.append(float(torch.einsum("oa,ab,ob->", change, G, change)))
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_first_to_go_is_the_one_whose_cut_costs_least(kind: str) -> None:
    """Against the surgery itself: of equal scores the least is the smallest root of the errors."""
    model, moments = measured()
    ones = UnitScores.from_flat(
        np.ones(sum(SPEC.heads), np.float32), np.ones(sum(SPEC.neurons), np.float32), SPEC
    )
    lowered = irreplaceable(ones, model, moments, ridge=1e-9)
    block = (lowered.heads if kind == "heads" else lowered.neurons)[0]
    ratios = {}
    for unit in {int(block.argmin()), *range(0, len(block), 1 + len(block) // 8)}:
        plain, compensated = errors_without(unit, kind, 1e-9)
        ratios[unit] = (compensated / plain) ** 0.5
    assert min(ratios, key=ratios.__getitem__) == int(block.argmin())
    assert block.min() == pytest.approx(min(ratios.values()), rel=1e-3)


def test_one_of_two_twins_goes_first_and_the_other_speaks_for_both() -> None:
    model = drawn_model()
    layers = block_layers(model)[0]
    with torch.no_grad():
        layers.fc1.weight[1] = layers.fc1.weight[0]
        layers.fc1.bias[1] = layers.fc1.bias[0]
    scores = drawn_scores(0)
    scores.neurons[0][:2] = 2.0, 3.0  # the best of all
    lowered = irreplaceable(scores, model, collect_moments(model, [images()]), ridge=1e-9)
    twins = lowered.neurons[0][:2]
    assert twins.argmin() == 0
    assert twins[0] < 1e-3
    assert twins[1] > np.sort(lowered.neurons[0])[SPEC.neurons[0] // 2]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-6, 0))
def test_units_that_share_nothing_keep_their_scores(seed: int, exponent: float) -> None:
    """Where G is diagonal nobody can stand in; only the ridge, common to all, shows."""
    model, moments = measured()
    alone = Moments(
        tuple(torch.diag(G.diagonal()) for G in moments.heads),
        tuple(torch.diag(G.diagonal()) for G in moments.neurons),
    )
    scores, ridge = drawn_scores(seed), 10**exponent
    lowered = irreplaceable(scores, model, alone, ridge)
    np.testing.assert_allclose(flat(lowered), flat(scores) * (1 + ridge) ** 0.5, rtol=1e-5)


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_units_is_that_of_the_answers(seed: int) -> None:
    model, moments = measured()
    scores = drawn_scores(seed)
    lowered = irreplaceable(scores, model, moments)
    order = np.random.default_rng(seed).permutation(SPEC.neurons[0])
    moved = drawn_model()
    layers = block_layers(moved)[0]
    with torch.no_grad():
        layers.fc1.weight.copy_(layers.fc1.weight[torch.from_numpy(order)])
        layers.fc1.bias.copy_(layers.fc1.bias[torch.from_numpy(order)])
        layers.fc2.weight.copy_(layers.fc2.weight[:, torch.from_numpy(order)])
    with_one = torch.from_numpy(np.append(order, len(order)))
    G = moments.neurons[0][with_one][:, with_one]
    again = irreplaceable(
        UnitScores(scores.heads, (scores.neurons[0][order], *scores.neurons[1:])),
        moved,
        Moments(moments.heads, (G, *moments.neurons[1:])),
    )
    np.testing.assert_allclose(again.neurons[0], lowered.neurons[0][order], rtol=1e-4)


def test_silent_units_and_nothing_that_matters_are_handled() -> None:
    model, moments = measured()
    G = moments.neurons[0].clone()
    G[5], G[:, 5] = 0, 0
    silent = Moments(moments.heads, (G, *moments.neurons[1:]))
    lowered = irreplaceable(drawn_scores(0), model, silent)
    assert np.isfinite(flat(lowered)).all()
    nothing = UnitScores.from_flat(
        np.zeros(sum(SPEC.heads), np.float32), np.zeros(sum(SPEC.neurons), np.float32), SPEC
    )
    assert np.isfinite(flat(irreplaceable(nothing, model, moments))).all()


def test_where_no_neuron_is_to_go_their_scores_stay() -> None:
    model, moments = measured()
    scores, heads = drawn_scores(0), collect_moments(model, [images()], neurons=False)
    lowered, expected = irreplaceable(scores, model, heads), irreplaceable(scores, model, moments)
    assert np.array_equal(lowered.flat_heads(), expected.flat_heads())
    assert np.array_equal(lowered.flat_neurons(), scores.flat_neurons())


def test_scores_of_another_model_are_refused() -> None:
    model, moments = measured()
    scores = drawn_scores(0)
    with pytest.raises(ModelError, match="of another model"):
        irreplaceable(
            UnitScores(scores.heads, (scores.neurons[0][:-5], *scores.neurons[1:])), model, moments
        )
