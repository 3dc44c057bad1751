"""A block may lose its whole attention: what is left is a constant, everywhere alike."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common import backbone, codec, distil
from common.anchors import Anchors, compute_anchors
from common.assembly import require_buildable
from common.budget import Budget, choose_mask
from common.errors import ConfigError, ProtocolError, RefusalError
from common.export import exported, require_parity
from common.heads import Gates, gate_units, tap_heads
from common.int8 import quantised
from common.mask import Keep, Mask
from common.rollout import patch_shares
from common.runtime import Runtime
from common.scores import UnitScores
from common.silent import SilentAttention
from common.spec import ModelSpec
from common.step import Cut, Step
from common.surgery import collect_moments, prune, prune_compensated, slice_flat
from common.trainable import TRAINABLE_SETS, factors, trainable_set
from server.publish import load
from server.redundancy import irreplaceable
from tests.common.test_surgery import (
    ARCHITECTURES,
    SPEC,
    architecture,
    drawn_model,
    images,
    require_agreement,
)
from tests.lab.versions import add_version, registry_in

Made = tuple[VisionTransformer, ModelSpec]


def keep_of(spec: ModelSpec, seed: int, silent: int | None = None) -> Keep:
    """Some units of every block, but no head of one of them."""
    rng = np.random.default_rng(seed)
    gone = int(rng.integers(spec.depth)) if silent is None else silent

    def some(count: int, least: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        size = int(rng.integers(least, count + 1))
        return np.sort(rng.choice(count, size, replace=False)).astype(np.int64)

    heads = [some(count, 1) for count in spec.heads]
    heads[gone] = np.empty(0, np.int64)
    return Keep(tuple(heads), tuple(some(count, 1) for count in spec.neurons))


def scores_of(spec: ModelSpec, seed: int) -> UnitScores:
    rng = np.random.default_rng(seed)
    heads, neurons = (rng.random(sum(n)).astype(np.float32) for n in (spec.heads, spec.neurons))
    return UnitScores.from_flat(heads, neurons, spec)


@lru_cache
def silent(kind: str = "small") -> Made:
    """A backbone whose first block has no attention."""
    if kind == "small":
        return prune(drawn_model(SPEC), SPEC, keep_of(SPEC, 0, silent=0))
    single, _, _, spec = architecture(kind)
    return prune(single, spec, keep_of(spec, 0, silent=0))


def constant_of(model: VisionTransformer) -> Tensor:
    """What the first block's attention says."""
    return backbone.block_layers(model)[0].attn.proj.bias.detach()


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_masked_and_pruned_logits_agree(kind: str, seed: int) -> None:
    keep = keep_of(architecture(kind)[3], seed)
    assert 0 in require_agreement(kind, keep).heads


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nothing_but_the_constant_is_left(kind: str) -> None:
    model, spec = silent(kind)
    assert isinstance(model.blocks[0].attn, SilentAttention)
    left = {n for n, one in model.named_parameters() if n.startswith("blocks.0.") and one.numel()}
    assert {n for n in left if ".attn." in n} == {"blocks.0.attn.proj.bias"}
    assert not [n for n in left if "norm1" in n]
    assert [n for n in left if "norm2" in n]
    again, _ = backbone.unpack(backbone.pack(model, spec))
    assert backbone.digest(again, spec) == backbone.digest(model, spec)
    assert not [one for one in backbone.stored_tensors(model).values() if not one.numel()]
    x = images(spec)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_it_costs_nothing() -> None:
    _, spec = silent()
    one_head = spec.with_units((1, *spec.heads[1:]), spec.neurons)
    saved = backbone.macs(one_head) - backbone.macs(spec)
    assert saved == backbone.head_macs(spec, backbone.tokens(spec))


@pytest.mark.parametrize("kind", ["vit", "dinov2", "layer_scale", "average_pool"])
def test_onnx_says_the_same_without_it(tmp_path: Path, kind: str) -> None:
    model, spec = silent(kind)
    graph = exported(model, spec.image_size)
    require_parity(model, spec.image_size, Runtime(graph, tmp_path))
    named = {n for n in numbers_of(graph) if n.startswith("blocks.0.")}
    assert not [n for n in named if "norm1" in n or "qkv" in n]


def test_in_8_bits_it_says_about_the_same(tmp_path: Path) -> None:
    model, spec = silent("vit")
    graph = exported(model, spec.image_size)
    x = images(spec, 8).numpy()
    small = Runtime(quantised(graph, [one[None] for one in x]), tmp_path).features(x)
    whole = Runtime(graph, tmp_path).features(x)
    alike = np.corrcoef(small.ravel(), whole.ravel())[0, 1]
    assert alike > 0.98


def numbers_of(graph: bytes) -> list[str]:
    return [one.name for one in onnx.load_model_from_string(graph).graph.initializer]


def test_cuts_compose_and_a_block_that_is_silent_stays_so() -> None:
    model, spec = silent()
    mask = Mask.dense(SPEC)
    first = keep_of(SPEC, 0, silent=0)
    one = Mask(
        tuple(tuple(k.tolist()) for k in first.heads),
        tuple(tuple(k.tolist()) for k in first.neurons),
        mask.dense_heads,
        mask.dense_neurons,
    )
    assert one.apply_to(SPEC) == spec
    assert Mask.from_json(one.to_json()) == one
    two = Mask(one.heads, tuple(k[:1] for k in one.neurons), mask.dense_heads, mask.dense_neurons)
    again, smaller = prune(model, spec, two.keep_in(one))
    at_once, same = prune(drawn_model(SPEC), SPEC, two.keep_in(mask))
    assert smaller == same
    assert backbone.digest(again, smaller) == backbone.digest(at_once, same)


def test_compensation_keeps_what_the_heads_said_on_average() -> None:
    model = drawn_model(SPEC)
    keep = Keep(
        (np.empty(0, np.int64), *(np.arange(n) for n in SPEC.heads[1:])),
        tuple(np.arange(n) for n in SPEC.neurons),
    )
    x = images(SPEC, 8)
    said: list[Tensor] = []
    attn = backbone.block_layers(model)[0].attn
    hook = attn.register_forward_hook(lambda _m, _i, out: said.append(out))
    with torch.no_grad():
        expected = model(x)
    hook.remove()
    moments = collect_moments(model, [x])
    apart = {}
    for method in ("none", "bias", "least_squares"):
        cut, _ = prune_compensated(model, SPEC, keep, moments, method)
        with torch.no_grad():
            apart[method] = float((cut(x) - expected).square().mean())
        if method == "bias":
            bias = constant_of(cut)
            torch.testing.assert_close(bias, said[0].mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert apart["bias"] < apart["none"]
    assert apart["least_squares"] < apart["none"]
    silent_moments = collect_moments(cut, [x])
    assert silent_moments.heads[0].shape == (1, 1)
    prune_compensated(cut, backbone.spec_of(cut, SPEC), _all(cut), silent_moments)


def _all(model: VisionTransformer) -> Keep:
    spec = backbone.spec_of(model, SPEC)
    return Keep(tuple(np.arange(n) for n in spec.heads), tuple(np.arange(n) for n in spec.neurons))


# --- what goes through blocks alike ---------------------------------------------------------------


def test_taps_gates_anchors_and_maps_find_no_head_in_it() -> None:
    model, spec = silent()
    x = images(spec, 4)
    with tap_heads(model) as taps, torch.no_grad():
        model(x)
    assert [one.shape for one in taps] == [(4, n, spec.head_width) for n in spec.heads]
    anchors = compute_anchors(model, [x], seed=1)
    assert anchors.heads == spec.heads
    assert Anchors.from_bytes(anchors.to_bytes()).heads == spec.heads
    gates = Gates.ones(model, 4, requires_grad=True)
    with gate_units(model, gates):
        loss = model(x).sum()
    found = torch.autograd.grad(loss, [*gates.heads, *gates.neurons])
    assert found[0].shape == (4, 0)
    assert all(bool(one.abs().sum() > 0) for one in found[1:])
    lowered = irreplaceable(scores_of(spec, 1), model, collect_moments(model, [x]))
    assert tuple(map(len, lowered.heads)) == spec.heads


def test_a_map_takes_nothing_from_it_masked_or_gone() -> None:
    model, keep = drawn_model(SPEC), keep_of(SPEC, 3, silent=1)
    x = images(SPEC)
    smaller = patch_shares(prune(model, SPEC, keep)[0], x)
    with gate_units(model, Gates.masking(model, keep)):
        masked = patch_shares(model, x)
    torch.testing.assert_close(masked, smaller, atol=1e-6, rtol=1e-4)
    cut, spec = prune(model, SPEC, keep)  # the last block is silent: the one before looks
    with distil.attention_map(cut, spec) as maps, torch.no_grad():
        cut(x)
    assert bool(torch.isfinite(maps[0]).all())
    assert maps[0].shape[0] == len(x)


@pytest.mark.parametrize("kind", TRAINABLE_SETS)
def test_rounds_go_over_the_cut_and_on(kind: str) -> None:
    """A step with such a cut, and one behind it, give the same on both sides."""
    model, rank = drawn_model(SPEC), 2 if kind == "lora" else 0
    keep, rng = keep_of(SPEC, 2, silent=0), np.random.default_rng(0)
    trained = trainable_set(model, kind, 2)
    base = backbone.digest(model, SPEC)
    learnt = (rng.standard_normal(trained.layout.count) / 100).astype(np.float32)
    update = codec.encode(learnt, base, rank=rank)
    ours = drawn_model(SPEC)
    trained.add(ours, codec.decode(update, base=base, count=learnt.size))
    plain, spec = prune(ours, SPEC, keep)
    better, _ = prune_compensated(ours, SPEC, keep, collect_moments(ours, [images(SPEC)]))
    cut = Cut.between(plain, better, keep, base)
    theirs, their_spec = Step.from_bytes(Step(update, cut).to_bytes()).apply(model, SPEC)
    cut.compensate(plain)
    assert their_spec == spec
    assert backbone.digest(theirs, spec) == backbone.digest(plain, spec)
    after = trainable_set(plain, kind, 2)
    left = slice_flat(learnt, trained.layout, SPEC, keep, after.layout)
    assert left.shape == (after.layout.count,)
    again = codec.encode(left, "b" * 64, rank=rank)
    Step(again).apply(theirs, spec)
    after.add(plain, codec.decode(again, base="b" * 64, count=left.size))
    assert backbone.digest(theirs, spec) == backbone.digest(plain, spec)


def test_it_trains_with_factors_beside_its_weights() -> None:
    model, spec = prune(drawn_model(SPEC), SPEC, keep_of(SPEC, 0, silent=0))
    with factors(model, 2):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss = model(images(spec)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = constant_of(model).clone()
        optimiser.step()
    assert not torch.equal(constant_of(model), before), "the constant is learnt on"


# --- masks and budgets ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.05, 1.0),
    budget=st.sampled_from(["heads", "macs"]),
)
def test_with_the_option_the_lowest_heads_go_wherever_they_are(
    seed: int, share: float, budget: str
) -> None:
    scores, dense = scores_of(SPEC, seed), Mask.dense(SPEC)
    if budget == "macs":
        rules = Budget(macs_kept=max(share, 0.55), whole_attention=True)
    else:
        rules = Budget(heads_kept=max(share, 1 / sum(SPEC.heads)), whole_attention=True)
    mask = choose_mask(scores, dense, SPEC, rules)
    kept = [scores.heads[b][h] for b, heads in enumerate(mask.heads) for h in heads]
    gone = [
        scores.heads[b][h]
        for b, count in enumerate(SPEC.heads)
        for h in range(count)
        if h not in mask.heads[b]
    ]
    assert kept
    assert not gone or max(gone) <= min(kept)
    spec = mask.apply_to(SPEC)
    if rules.macs_kept is not None:
        assert backbone.macs(spec) <= rules.macs_kept * backbone.macs(SPEC)
    else:
        assert len(kept) == max(1, round((rules.heads_kept or 0) * sum(SPEC.heads)))


def test_a_block_keeps_a_head_unless_the_option_is_set() -> None:
    heads = (np.zeros(3, np.float32), np.ones(3, np.float32))
    scores = UnitScores(heads, scores_of(SPEC, 0).neurons)
    dense = Mask.dense(SPEC)
    spared = choose_mask(scores, dense, SPEC, Budget(heads_kept=0.5))
    assert tuple(map(len, spared.heads)) == (1, 2)
    whole = choose_mask(scores, dense, SPEC, Budget(heads_kept=0.5, whole_attention=True))
    assert tuple(map(len, whole.heads)) == (0, 3)
    assert "heads ○○○  0/3" in whole.describe()
    with pytest.raises(ConfigError, match="min_heads=0"):
        choose_mask(scores, dense, SPEC, Budget(heads_kept=0.01, whole_attention=True))


def test_one_head_must_stay_and_every_block_keeps_neurons() -> None:
    dense = Mask.dense(SPEC)
    with pytest.raises(ProtocolError, match="one head at least"):
        Mask(((), ()), dense.neurons, dense.dense_heads, dense.dense_neurons)
    with pytest.raises(ProtocolError, match="neurons of block 1 must be ascending, at least 1"):
        Mask(((), (0,)), (dense.neurons[0], ()), dense.dense_heads, dense.dense_neurons)


def test_tokens_cannot_be_sampled_without_attention() -> None:
    values = SPEC.model_dump() | {"heads": (0, 3), "kept_tokens": (3, 3)}
    with pytest.raises(ValueError, match="tokens are sampled by attention"):
        ModelSpec.model_validate(values)
    linear = ModelSpec.model_validate(
        SPEC.model_dump() | {"heads": (0, 3), "linear_blocks": (0, 1)}
    )
    assert isinstance(backbone.build(linear).blocks[0].attn, SilentAttention)


# --- versions ------------------------------------------------------------------------------------


def test_it_is_published_and_comes_back(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    model, spec = silent()
    row = add_version(registry, model, spec)
    manifest = registry.manifest(row.counter)
    assert 0 in manifest.spec.heads
    require_buildable(manifest)
    again, _ = load(registry, row.counter)
    assert backbone.digest(again, spec) == backbone.digest(model, spec)
    fewer = manifest.model_copy(update={"tensors": manifest.tensors[1:]})
    with pytest.raises(RefusalError, match="its spec needs"):
        require_buildable(fewer)
