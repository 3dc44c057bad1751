"""Importances are per-image Taylor scores, from one backward pass, and leave no trace."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from client.scores import FarmScores, score_units
from common.anchors import compute_anchors, head_mmd2
from common.backbone import block_layers, build, dense_spec
from common.errors import DataError, ModelError, ProtocolError
from common.heads import Gates, gate_units, tap_heads

OPTIONS = {"depth": 2, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 1}
SPEC = dense_spec("vit_tiny_patch16_224", 32, OPTIONS)
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = build(SPEC).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def classifier() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(48, 4).double()


def farm(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn((count, 3, 32, 32), generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 4


def cut(size: int, count: int = 6) -> Batches:
    images, labels = farm(count)
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))


def losses(
    model: VisionTransformer, classifier: nn.Module, kind: str, unit: int, gate: float
) -> Tensor:
    """CE of each image, (6,), with one unit's gate set."""
    images, labels = farm()
    gates = Gates.ones(model)
    blocks = gates.heads if kind == "heads" else gates.neurons
    block, at = divmod(unit, blocks[0].shape[1])
    blocks[block][0, at] = gate
    with torch.no_grad(), gate_units(model, gates):
        return functional.cross_entropy(classifier(model(images)), labels, reduction="none")


@pytest.mark.parametrize(("kind", "count"), [("heads", 6), ("neurons", 96)])
def test_importance_is_the_mean_absolute_finite_difference_per_image(
    model: VisionTransformer, classifier: nn.Linear, kind: str, count: int
) -> None:
    step, total = 1e-5, np.zeros(count)
    for unit in range(count):
        up = losses(model, classifier, kind, unit, 1 + step)
        down = losses(model, classifier, kind, unit, 1 - step)
        total[unit] = float((up - down).abs().sum())
    scores = score_units(model, classifier, cut(3), None)
    found = scores.head_importance if kind == "heads" else scores.neuron_importance
    np.testing.assert_allclose(found, total / total.sum(), rtol=1e-4, atol=1e-8)


def test_opposite_images_do_not_cancel(model: VisionTransformer, classifier: nn.Linear) -> None:
    """Summing before taking the absolute value would give another result."""
    images, labels = farm()
    gates = Gates.ones(model, 1, requires_grad=True)
    with gate_units(model, gates):
        loss = functional.cross_entropy(classifier(model(images)), labels, reduction="sum")
    summed = torch.cat(torch.autograd.grad(loss, gates.heads), 1).abs()[0]
    scores = score_units(model, classifier, cut(6), None)
    assert np.abs(scores.head_importance - (summed / summed.sum()).numpy()).max() > 0.01


def test_batching_does_not_matter(model: VisionTransformer, classifier: nn.Linear) -> None:
    anchors = compute_anchors(model, [farm(40)[0]], seed=4)
    whole = score_units(model, classifier, cut(6), anchors)
    for size in (1, 4):
        parts = score_units(model, classifier, cut(size), anchors)
        for name in ("head_importance", "head_mmd2", "neuron_importance"):
            a, b = getattr(whole, name), getattr(parts, name)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
            assert b.dtype == np.float32


def test_normalisation_and_distance(model: VisionTransformer, classifier: nn.Linear) -> None:
    images = farm()[0]
    anchors = compute_anchors(model, [torch.rand_like(farm(40)[0])], seed=4)
    scores = score_units(model, classifier, cut(4), anchors)
    assert scores.head_importance.sum() == pytest.approx(1, abs=1e-6)
    assert scores.neuron_importance.sum() == pytest.approx(1, abs=1e-6)
    with torch.no_grad(), tap_heads(model) as taps:
        model(images)
    np.testing.assert_allclose(scores.head_mmd2, head_mmd2(taps, anchors), rtol=1e-5, atol=1e-7)
    assert not score_units(model, classifier, cut(4), None).head_mmd2.any()


def permuted(model: VisionTransformer, order: list[int]) -> VisionTransformer:
    """The same function, with the heads of block 1 in another order."""
    channels = (torch.tensor(order)[:, None] * 16 + torch.arange(16)).flatten()
    attn = block_layers(model)[1].attn
    rows = torch.cat([channels + 48 * part for part in range(3)])
    with torch.no_grad():
        attn.qkv.weight.copy_(attn.qkv.weight[rows].clone())
        attn.qkv.bias.copy_(attn.qkv.bias[rows].clone())
        attn.proj.weight.copy_(attn.proj.weight[:, channels].clone())
    return model


def test_permuting_heads_permutes_their_scores(
    model: VisionTransformer, classifier: nn.Linear
) -> None:
    source = farm(40)[0] * 0.5
    anchors = compute_anchors(model, [source], seed=4)
    before = score_units(model, classifier, cut(6), anchors)
    order = [2, 0, 1]
    turned = permuted(model, order)
    kept = [np.arange(3), np.array(order)]
    after = score_units(turned, classifier, cut(6), anchors.select(kept))
    to = np.array([0, 1, 2, *(3 + i for i in order)])
    for name in ("head_importance", "head_mmd2"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name)[to], rtol=1e-4)
    np.testing.assert_allclose(after.neuron_importance, before.neuron_importance, rtol=1e-4)


def test_modes_flags_and_gradients_are_left_as_found(
    model: VisionTransformer, classifier: nn.Linear
) -> None:
    model.train()
    model.blocks[1].eval()
    model.patch_embed.requires_grad_(False)

    def look() -> list[tuple[bool, ...]]:
        return [
            (part.training, *(p.requires_grad for p in part.parameters(recurse=False)))
            for part in (*model.modules(), *classifier.modules())
        ]

    before = look()
    score_units(model, classifier, cut(6), None)
    with pytest.raises(IndexError):
        score_units(model, classifier, [(farm()[0], torch.full((6,), 9))], None)
    assert look() == before
    assert all(p.grad is None for p in (*model.parameters(), *classifier.parameters()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_silent_farm_scores_all_units_alike(model: VisionTransformer) -> None:
    silent = nn.Linear(48, 4).double()
    nn.init.zeros_(silent.weight)
    scores: FarmScores = score_units(model, silent, cut(6), None)
    np.testing.assert_allclose(scores.head_importance, 1 / 6, rtol=1e-6)


def test_refusals(model: VisionTransformer, classifier: nn.Linear) -> None:
    with pytest.raises(DataError, match="no images"):
        score_units(model, classifier, [], None)
    anchors = compute_anchors(model, [farm(8)[0]], seed=4)
    with pytest.raises(ProtocolError, match="same candidate"):
        score_units(model, classifier, cut(6), anchors.select([np.arange(2), np.arange(3)]))
    nn.init.constant_(classifier.weight, torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        score_units(model, classifier, cut(6), None)
