"""Token sampling and linear attention do what their formulas say, in every form a backbone has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import backbone
from common.backbone import build, dense_spec, macs, tokens_by_block
from common.costs import unit_costs
from common.efficient import linear_attention, softmax_attention
from common.errors import ConfigError, ModelError
from common.export import require_parity
from common.mask import Mask
from common.pixels import Floats
from common.runtime import Runtime
from common.sampling import with_tokens
from common.spec import ModelSpec
from common.surgery import prune
from common.tokens import dropped, halvings, merged, token_scores
from common.trainable import factors
from tests.common.test_export import written

OPTIONS = {"depth": 4, "embed_dim": 48, "num_heads": 4, "patch_size": 8}
PATCHES = 16
KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"kept_tokens": (16, 9, 9, 5)},
    "merged": {"kept_tokens": (12, 12, 5, 5), "merge_tokens": True},
    "linear": {"linear_blocks": (1, 3)},
    "both": {"kept_tokens": (16, 8, 8, 8), "merge_tokens": True, "linear_blocks": (0, 1, 2)},
}


def spec_of(**changes: Any) -> ModelSpec:
    """A tiny backbone's, with another attention."""
    dense = dense_spec("vit_tiny_patch16_224", 32, OPTIONS)
    return ModelSpec.model_validate(dense.model_dump() | changes)


def twins(**changes: Any) -> tuple[VisionTransformer, VisionTransformer]:
    """A backbone with another attention, and the plain one with the same tensors."""
    torch.manual_seed(0)
    plain, other = build(spec_of()), build(spec_of(**changes))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    other.load_state_dict(plain.state_dict())
    return other, plain


@torch.inference_mode()
def features(model: VisionTransformer, count: int = 3) -> Tensor:
    """Of drawn images, (count, C)."""
    out: Tensor = model(torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return out


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_linear_attention_is_its_formula(seed: int, tokens: int, width: int) -> None:
    q, k, v = (drawn(3 * seed + n, 2, 3, tokens, width).double() for n in range(3))
    phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    weight = phi_q @ phi_k.transpose(-2, -1)
    expected = (weight / weight.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(linear_attention(q, k, v), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("class_token", [True, False])
def test_scores_are_their_formula(class_token: bool) -> None:
    q, k, v = (drawn(n, 2, 3, 7, 4) for n in range(3))
    found = token_scores(q, k, v, class_token)
    for image in range(2):
        for token in range(7):
            total = 0.0
            for head in range(3):
                query = q[image, head, 0] if class_token else q[image, head].mean(0)
                logits = torch.stack([query @ k[image, head, j] / 2 for j in range(7)])
                total += float(logits.softmax(0)[token] * v[image, head, token].norm())
            assert float(found[image, token]) == pytest.approx(total / 3, rel=1e-4)


@given(st.integers(0, 1000), st.integers(0, 3), st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=50)
def test_what_stays_is_the_best_in_order(
    seed: int, prefix: int, patches: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, patches - 1))
    x, scores = drawn(seed, 2, prefix + patches, 5), drawn(seed + 1, 2, prefix + patches).abs()
    choice = dropped(scores, prefix, keep)
    found = choice.of(x)
    assert choice.sizes is None
    for image in range(2):
        ranked = sorted(range(patches), key=lambda j: -float(scores[image, prefix + j]))
        best = [prefix + j for j in sorted(ranked[:keep])]
        torch.testing.assert_close(found[image], x[image, [*range(prefix), *best]], rtol=0, atol=0)


@given(st.integers(0, 1000), st.integers(0, 3), st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=50)
def test_merged_tokens_are_means_of_the_patches_they_stand_for(
    seed: int, prefix: int, patches: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, patches))
    keep = data.draw(st.integers(1, first))
    tokens = prefix + patches
    x, keys = drawn(seed, 2, tokens, 5), drawn(seed + 1, 2, 3, tokens, 4)
    shares, sizes = torch.eye(tokens).expand(2, -1, -1), torch.ones(2, tokens)
    for count in sorted({first, keep} - {patches}, reverse=True):
        choice = merged(keys[:, :, : shares.shape[1]], sizes, prefix, count)
        x, shares, sizes = choice.of(x), choice.of(shares), choice.sizes
        assert x.shape == (2, prefix + count, 5)
    # every patch is in one token, and a token is the mean of its patches
    stood_for = shares * sizes[:, :, None]
    torch.testing.assert_close(stood_for.sum(1), torch.ones(2, tokens))
    torch.testing.assert_close(stood_for, stood_for.round(), atol=1e-5, rtol=0)
    assert torch.equal(shares[:, :prefix, :prefix], torch.eye(prefix).expand(2, -1, -1))
    torch.testing.assert_close(x, shares @ drawn(seed, 2, tokens, 5), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 1000), st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=50)
def test_those_are_merged_that_are_most_alike(seed: int, patches: int, data: st.DataObject) -> None:
    gone = data.draw(st.integers(1, patches // 2))
    keys = drawn(seed, 1, 3, patches, 4)
    shares = merged(keys, None, 0, patches - gone).of(torch.eye(patches)[None])[0]
    mean = torch.nn.functional.normalize(keys[0].mean(0), dim=-1)
    likeness = mean[::2] @ mean[1::2].T
    ranked = sorted(range(len(likeness)), key=lambda one: -float(likeness[one].max()))
    expected = {(2 * one, 2 * int(likeness[one].argmax()) + 1) for one in ranked[:gone]}
    together = {(a, b) for a in range(0, patches, 2) for b in range(1, patches, 2)
                if bool(((shares[:, a] > 0) & (shares[:, b] > 0)).any())}  # fmt: skip
    assert together == expected


def test_more_than_half_is_merged_again_and_again() -> None:
    assert halvings(16, 5) == [8, 3]
    assert halvings(7, 1) == [3, 2, 1]
    assert halvings(4, 4) == []


@pytest.mark.parametrize("attend", [softmax_attention, linear_attention])
def test_a_token_of_some_patches_counts_as_often(attend: Any) -> None:
    """A merged token is attended to as the equal tokens it stands for are."""
    q, k, v = (drawn(n, 2, 3, 5, 4) for n in range(3))
    times = [1, 3, 1, 2, 1]
    often = [token for token, count in enumerate(times) for _ in range(count)]
    found = attend(q, k, v, torch.tensor([times, times], dtype=torch.float32))
    expected = attend(q[:, :, often], k[:, :, often], v[:, :, often], torch.ones(2, 8))
    torch.testing.assert_close(found, expected[:, :, [often.index(n) for n in range(5)]])


def test_equal_patches_can_be_merged_for_nothing() -> None:
    """Images of one colour and no positions: whatever is merged, the features are those of all."""
    model, plain = twins(kept_tokens=(8, 8, 4, 2), merge_tokens=True)
    for one in (model, plain):
        one.get_parameter("pos_embed").data.zero_()
    images = torch.full((2, 3, 32, 32), 0.3)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=1e-4)
        again = model(images[:1])  # what is known of the images before does not matter
        torch.testing.assert_close(again, plain(images[:1]), atol=1e-5, rtol=1e-4)


def test_a_backbone_that_keeps_all_tokens_is_the_plain_one() -> None:
    other, plain = twins(kept_tokens=(PATCHES,) * 4)
    assert torch.equal(features(other), features(plain))


def test_the_same_layers_give_the_same_attention() -> None:
    """Where tokens are dropped behind the last block, the class token has not noticed."""
    other, plain = twins(kept_tokens=(PATCHES, PATCHES, PATCHES, 3))
    torch.testing.assert_close(features(other), features(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_another_function(kind: str) -> None:
    other, plain = twins(**KINDS[kind])
    assert (features(other) - features(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_those_that_torch_counts(kind: str) -> None:
    spec = spec_of(**KINDS[kind])
    # the counter cannot see fused kernels
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        build(spec)(torch.zeros(1, 3, 32, 32))
    counted = counter.get_total_flops() / 2
    # the sums of linear attention are hundredths of it
    assert macs(spec) == pytest.approx(counted, rel=0.03)
    assert macs(spec) < macs(spec_of())


def test_tokens_by_block() -> None:
    assert tokens_by_block(spec_of()) == (17,) * 4
    assert tokens_by_block(spec_of(**KINDS["sampled"])) == (17, 17, 10, 10)
    assert tokens_by_block(spec_of(**KINDS["merged"])) == (17, 13, 13, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_cut_kept_and_exported_like_any_other(kind: str, tmp_path: Path) -> None:
    spec = spec_of(**KINDS[kind])
    model, _ = twins(**KINDS[kind])
    dense = Mask.dense(spec)
    fewer = Mask(((0, 2), *dense.heads[1:]), dense.neurons, dense.dense_heads, dense.dense_neurons)
    smaller, smaller_spec = prune(model, spec, fewer.keep_in(dense))
    assert smaller_spec.kept_tokens == spec.kept_tokens
    again, again_spec = backbone.unpack(backbone.pack(smaller, smaller_spec))
    assert torch.equal(features(again), features(smaller))
    graph, objects = written(tmp_path, (again, again_spec))
    require_parity(again, again_spec.image_size, Runtime(graph, objects.folder))


class Astray(Runtime):
    """Differs from its graph on the first so many images."""

    def __init__(self, graph: bytes, objects: Path, count: int) -> None:
        super().__init__(graph, objects)
        self._count = count

    def features(self, images: Floats) -> Floats:
        """Off by .01 on some."""
        found = super().features(images)
        found[: self._count] += 0.01
        return found


@pytest.mark.parametrize(("kind", "may_differ"), [("linear", 0), ("sampled", 1), ("merged", 1)])
def test_one_choice_may_hang_on_the_last_bit(kind: str, may_differ: int, tmp_path: Path) -> None:
    spec = spec_of(**KINDS[kind])
    model = build(spec)
    graph, objects = written(tmp_path, (model, spec))
    require_parity(model, spec.image_size, Astray(graph, objects.folder, may_differ))
    with pytest.raises(ModelError, match="nothing is written"):
        require_parity(model, spec.image_size, Astray(graph, objects.folder, may_differ + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_with_factors(kind: str) -> None:
    model, _ = twins(**KINDS[kind])
    with factors(model, 1):
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith("factor")}
    assert len(gradients) == 16
    missing = [n for n, g in gradients.items() if g is None or not torch.isfinite(g).all()]
    assert not missing


def test_half_precision_stays_finite() -> None:
    model, plain = twins(**KINDS["both"])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = features(model), features(plain)
    assert torch.isfinite(found).all()
    assert found.shape == expected.shape


def test_a_spec_without_it_is_written_as_before() -> None:
    named = json.loads(spec_of().to_json())
    assert not {"kept_tokens", "merge_tokens", "linear_blocks"} & set(named)
    for changes in KINDS.values():
        spec = spec_of(**changes)
        assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "changes",
    [
        {"kept_tokens": (9, 9)},
        {"kept_tokens": (5, 9, 9, 9)},
        {"kept_tokens": (9, 9, 9, 0)},
        {"linear_blocks": (4,)},
        {"linear_blocks": (1, 1)},
        {"linear_blocks": (2, 1)},
        {"linear_blocks": (-1,)},
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec_of(**changes)


def test_more_tokens_than_there_are() -> None:
    with pytest.raises(ModelError, match=r"block 0 is to keep 20 tokens.*has 16"):
        build(spec_of(kept_tokens=(20, 16, 16, 16)))


def test_a_budget_of_macs_needs_blocks_that_cost_alike() -> None:
    with pytest.raises(ConfigError, match="prune first"):
        unit_costs(spec_of(**KINDS["linear"]))


@given(st.floats(0.3, 0.99), st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_share_of_the_macs_is_met_and_hardly_more(share: float, merge: bool) -> None:
    spec = dense_spec("vit_small_patch14_dinov2", 112)
    sparse = with_tokens(spec, share, merge=merge)
    assert sparse.merge_tokens is merge
    assert macs(sparse) <= share * macs(spec)
    left = (64, *sparse.kept_tokens)
    fewer = [block for block in range(12) if left[block + 1] < left[block]]
    assert set(fewer) <= ({0, 2, 4, 6} if merge else {2, 5, 8})
    more = [min(count + 1, 64) for count in sparse.kept_tokens[fewer[0] :]]
    richer = {"kept_tokens": (*sparse.kept_tokens[: fewer[0]], *more)}
    assert macs(ModelSpec.model_validate(sparse.model_dump() | richer)) > 0.96 * share * macs(spec)


def test_too_little_is_refused() -> None:
    spec = dense_spec("vit_small_patch14_dinov2", 112)
    with pytest.raises(ConfigError, match="one token a stage still costs"):
        with_tokens(spec, 0.1)
    sparse = with_tokens(spec, 0.6)
    with pytest.raises(ConfigError, match="cannot be given fewer tokens"):
        with_tokens(sparse, 0.5)
