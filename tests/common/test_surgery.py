"""Cutting equals masking, on every kind of backbone; compensation never makes a layer worse."""

from functools import lru_cache
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.backbone import block_layers, build, dense_spec, pack, unpack
from common.errors import DataError, ModelError
from common.heads import Gates, gate_units
from common.mask import Keep
from common.spec import ModelSpec
from common.surgery import (
    Method,
    Moments,
    collect_moments,
    prune,
    prune_compensated,
    slice_tensors,
)

ARCHITECTURES = {
    "vit": ("vit_tiny_patch16_224", 32, {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", 32, {"depth": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", 32, {"depth": 2}),
    "dinov2": ("vit_small_patch14_dinov2", 28, {"depth": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", 28, {"depth": 2}),
    "qk_norm": ("vit_tiny_patch16_224", 32, {"depth": 2, "qk_norm": 1}),
    "no_qkv_bias": ("vit_tiny_patch16_224", 32, {"depth": 2, "qkv_bias": 0}),
    "layer_scale": ("deit3_small_patch16_224", 32, {"depth": 2}),
    "average_pool": ("vit_wee_patch16_reg1_gap_256", 32, {"depth": 2}),
}
SMALL = ("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2})
SPEC = dense_spec(*SMALL)


def drawn_model(spec: ModelSpec, seed: int = 0) -> VisionTransformer:
    """Every parameter drawn at a scale at which every head and neuron is heard."""
    generator = torch.Generator().manual_seed(seed)
    model = build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model


@lru_cache
def architecture(kind: str) -> tuple[VisionTransformer, VisionTransformer, nn.Linear, ModelSpec]:
    """The same backbone in fp32 and fp64, and a classifier."""
    spec = dense_spec(*ARCHITECTURES[kind])
    single, double = drawn_model(spec), drawn_model(spec).double()
    torch.manual_seed(0)
    return single, double, nn.Linear(spec.width, 7), spec


def random_keep(spec: ModelSpec, seed: int) -> Keep:
    rng = np.random.default_rng(seed)

    def some(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        size = int(rng.integers(1, count + 1))
        return np.sort(rng.choice(count, size, replace=False)).astype(np.int64)

    return Keep(tuple(map(some, spec.heads)), tuple(map(some, spec.neurons)))


def everything(spec: ModelSpec) -> Keep:
    return Keep(tuple(map(np.arange, spec.heads)), tuple(map(np.arange, spec.neurons)))


def images(spec: ModelSpec, count: int = 2) -> Tensor:
    shape = (count, 3, spec.image_size, spec.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def require_agreement(kind: str, keep: Keep) -> ModelSpec:
    """Masked and pruned logits are the same; the spec of what is left."""
    single, double, classifier, spec = architecture(kind)
    x = images(spec)
    for model, limit in ((double, 1e-10), (single, 1e-5)):
        dtype = next(model.parameters()).dtype
        classifier.to(dtype)
        pruned, smaller = prune(model, spec, keep)
        with torch.no_grad():
            with gate_units(model, Gates.masking(model, keep)):
                masked = classifier(model(x.to(dtype)))
            cut = classifier(pruned(x.to(dtype)))
        scale = 1.0 if dtype == torch.float64 else max(1.0, float(masked.abs().max()))
        assert (masked - cut).abs().max() <= limit * scale
    return smaller


# --- removal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_masked_and_pruned_logits_agree(kind: str, seed: int) -> None:
    spec = architecture(kind)[3]
    keep = random_keep(spec, seed)
    smaller = require_agreement(kind, keep)
    assert smaller.heads == tuple(map(len, keep.heads))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_head_and_neuron_is_heard(kind: str) -> None:
    """Else agreement above would prove nothing (DINOv2's layer-scale starts at 1e-5)."""
    _, model, _, spec = architecture(kind)
    x = images(spec).double()
    with torch.no_grad():
        expected = model(x)
        for block in range(spec.depth):
            gates, more = Gates.ones(model), Gates.ones(model)
            gates.heads[block][0, -1] = 0
            more.neurons[block][0, -1] = 0
            for one_off in (gates, more):
                with gate_units(model, one_off):
                    assert (model(x) - expected).abs().max() > 1e-4


def test_original_and_random_state_are_untouched() -> None:
    model = drawn_model(SPEC)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    keep = random_keep(SPEC, 1)
    pruned, _ = prune(model, SPEC, keep)
    assert torch.equal(torch.get_rng_state(), state)
    moments = collect_moments(model, [images(SPEC)])
    for method in get_args(Method):
        prune_compensated(model, SPEC, keep, moments, method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not pruned.training
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_keeping_all_changes_nothing_and_cuts_compose() -> None:
    model = drawn_model(SPEC)
    same, spec = prune(model, SPEC, everything(SPEC))
    assert spec == SPEC
    assert torch.equal(same(images(SPEC)), model(images(SPEC)))
    one, one_spec = prune(model, SPEC, random_keep(SPEC, 1))
    second = random_keep(one_spec, 2)
    two, two_spec = prune(one, one_spec, second)
    first = random_keep(SPEC, 1)
    at_once = Keep(
        tuple(a[b] for a, b in zip(first.heads, second.heads, strict=True)),
        tuple(a[b] for a, b in zip(first.neurons, second.neurons, strict=True)),
    )
    direct, direct_spec = prune(model, SPEC, at_once)
    assert two_spec == direct_spec
    assert pack(two, two_spec) == pack(direct, direct_spec)


def test_a_pruned_backbone_survives_packing() -> None:
    pruned, spec = prune(drawn_model(SPEC), SPEC, random_keep(SPEC, 3))
    again, again_spec = unpack(pack(pruned, spec))
    assert again_spec == spec
    torch.testing.assert_close(again(images(SPEC)), pruned(images(SPEC)))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_cutting_a_moved_model_is_moving_a_cut_model(seed: int) -> None:
    model, keep = drawn_model(SPEC), random_keep(SPEC, seed)
    step = {name: value.detach() for name, value in drawn_model(SPEC, 1).named_parameters()}
    moved, _ = prune(model, SPEC, keep)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(slice_tensors(step, SPEC, keep)[name])
        for name, parameter in model.named_parameters():
            parameter.add_(step[name])
    expected = dict(prune(model, SPEC, keep)[0].named_parameters())
    for name, parameter in moved.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_wrong_keeps_and_specs_are_refused() -> None:
    model, good = drawn_model(SPEC), everything(SPEC)
    for first in ([3], [-1], [1, 0], [0, 0]):
        with pytest.raises(ModelError, match="heads to keep in block 0"):
            prune(model, SPEC, Keep((np.array(first, np.int64), *good.heads[1:]), good.neurons))
    with pytest.raises(
        ModelError, match="neurons to keep in block 0 must be ascending, at least 1"
    ):
        prune(model, SPEC, Keep(good.heads, (np.empty(0, np.int64), *good.neurons[1:])))
    with pytest.raises(ModelError, match="blocks of neurons"):
        prune(model, SPEC, Keep(good.heads, good.neurons[:1]))
    with pytest.raises(ModelError, match="does not describe"):
        prune(model, SPEC.with_units((2, 2), SPEC.neurons), good)


# --- moments --------------------------------------------------------------------------------------


def layer_inputs(model: VisionTransformer, x: Tensor) -> list[Tensor]:
    """What enters proj of every block, then fc2 of every block: (B*N, A)."""
    seen: dict[nn.Module, Tensor] = {}
    layers = [b.attn.proj for b in block_layers(model)] + [b.fc2 for b in block_layers(model)]
    handles = [
        layer.register_forward_hook(
            lambda module, args, _output: seen.update({module: args[0].flatten(0, 1)})
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [seen[layer] for layer in layers]


@lru_cache
def measured(seed: int = 0) -> tuple[VisionTransformer, Moments, Tensor]:
    model = drawn_model(SPEC, seed).double()
    x = images(SPEC, 20).double()
    return model, collect_moments(model, torch.split(x, 8)), x


def test_moments_are_sums_over_all_tokens() -> None:
    model, moments, x = measured()
    for G, entered in zip((*moments.heads, *moments.neurons), layer_inputs(model, x), strict=True):
        augmented = torch.cat([entered, torch.ones(len(entered), 1).double()], 1)
        torch.testing.assert_close(G, augmented.T @ augmented)
        assert G.dtype == torch.float64
        assert G[-1, -1] == 20 * 5


def test_moments_need_finite_images_and_leave_the_mode() -> None:
    model = drawn_model(SPEC).train()
    with pytest.raises(DataError, match="needs images"):
        collect_moments(model, [])
    with pytest.raises(DataError, match="not finite"):
        collect_moments(model, [images(SPEC) * torch.inf])
    assert model.training


# --- compensation ---------------------------------------------------------------------------------


def reconstruction_errors(
    model: VisionTransformer, pruned: VisionTransformer, keep: Keep, x: Tensor
) -> list[float]:
    """Per layer: squared error of its output when fed the original's kept inputs."""
    width = SPEC.head_width
    kept = [(h[:, None] * width + np.arange(width)).ravel() for h in keep.heads] + [*keep.neurons]
    old = [b.attn.proj for b in block_layers(model)] + [b.fc2 for b in block_layers(model)]
    new = [b.attn.proj for b in block_layers(pruned)] + [b.fc2 for b in block_layers(pruned)]
    with torch.no_grad():
        return [
            float((a(entered) - b(entered[:, torch.from_numpy(index)])).square().sum())
            for a, b, entered, index in zip(old, new, layer_inputs(model, x), kept, strict=True)
        ]


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-8, 2))
def test_compensation_never_increases_the_error_it_is_fitted_to(seed: int, exponent: float) -> None:
    model, moments, x = measured()
    keep = random_keep(SPEC, seed)

    def errors(method: Method) -> list[float]:
        pruned, _ = prune_compensated(model, SPEC, keep, moments, method, 10**exponent)
        return reconstruction_errors(model, pruned, keep, x)

    plain = errors("none")
    slack = [1e-9 * max(error, 1e-9) for error in plain]
    for method in ("bias", "least_squares"):
        compensated = errors(method)
        assert all(c <= p + s for c, p, s in zip(compensated, plain, slack, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_moments_of_a_bfloat16_forward_pass_make_up_for_a_cut_as_well(seed: int) -> None:
    model, x, keep = drawn_model(SPEC), images(SPEC, 20), random_keep(SPEC, seed)
    errors = {}
    for autocast in (False, True):
        moments = collect_moments(model, torch.split(x, 8), autocast=autocast)
        assert moments.heads[0][-1, -1] == 20 * 5
        pruned, _ = prune_compensated(model, SPEC, keep, moments)
        errors[autocast] = np.array(reconstruction_errors(model, pruned, keep, x))
    assert (errors[True] <= 1.05 * errors[False]).all()
    assert (errors[True] != errors[False]).any()


def test_least_squares_is_the_formula() -> None:
    model, moments, _ = measured()
    keep, eps = random_keep(SPEC, 5), 0.01
    pruned, _ = prune_compensated(model, SPEC, keep, moments, "least_squares", eps)
    for block, kept in enumerate(keep.neurons):
        G, old = moments.neurons[block].numpy(), block_layers(model)[block].fc2
        K = np.append(kept, SPEC.neurons[block])
        g = np.setdiff1d(np.arange(SPEC.neurons[block]), kept)
        W = np.column_stack([old.weight.detach().numpy(), old.bias.detach().numpy()])
        G_KK = G[np.ix_(K, K)]
        regular = np.linalg.inv(G_KK + eps * np.diag(np.diag(G_KK)))
        expected = W[:, K] + W[:, g] @ G[np.ix_(g, K)] @ regular
        new = block_layers(pruned)[block].fc2
        np.testing.assert_allclose(new.weight.detach().numpy(), expected[:, :-1], atol=1e-8)
        np.testing.assert_allclose(new.bias.detach().numpy(), expected[:, -1], atol=1e-8)


def test_bias_folds_the_mean() -> None:
    model, moments, x = measured()
    keep = random_keep(SPEC, 5)
    plain, _ = prune(model, SPEC, keep)
    pruned, _ = prune_compensated(model, SPEC, keep, moments, "bias")
    old, new = block_layers(model)[1].fc2, block_layers(pruned)[1].fc2
    gone = np.setdiff1d(np.arange(SPEC.neurons[1]), keep.neurons[1])
    mean = layer_inputs(model, x)[3].mean(0)[gone]
    assert torch.equal(new.weight, block_layers(plain)[1].fc2.weight)
    torch.testing.assert_close(new.bias, old.bias + old.weight[:, gone] @ mean)


@pytest.mark.parametrize("method", ["none", "bias", "least_squares"])
def test_nothing_dropped_means_nothing_changed(method: Method) -> None:
    model, moments, _ = measured()
    same, spec = prune_compensated(model, SPEC, everything(SPEC), moments, method)
    state = model.state_dict()
    assert spec == SPEC
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())


def test_a_twin_takes_over_exactly_and_a_huge_ridge_is_the_plain_cut() -> None:
    model = drawn_model(SPEC).double()
    layers = block_layers(model)[0]
    with torch.no_grad():
        layers.fc1.weight[1] = layers.fc1.weight[0]
        layers.fc1.bias[1] = layers.fc1.bias[0]
    x = images(SPEC, 20).double()
    moments, keep = collect_moments(model, [x]), everything(SPEC)
    keep = Keep(keep.heads, (np.delete(keep.neurons[0], 1), *keep.neurons[1:]))
    with torch.no_grad():
        exact, _ = prune_compensated(model, SPEC, keep, moments, ridge=1e-10)
        assert (exact(x) - model(x)).abs().max() < 1e-5
        plain, _ = prune(model, SPEC, keep)
        assert (plain(x) - model(x)).abs().max() > 1e-2
        stiff, _ = prune_compensated(model, SPEC, keep, moments, ridge=1e12)
        torch.testing.assert_close(stiff(x), plain(x))


def test_silent_channels_and_missing_biases_are_handled() -> None:
    options = {**dict(SPEC.options), "proj_bias": 0}
    spec = dense_spec("vit_tiny_patch16_224", 32, options)
    model, x = drawn_model(spec), images(spec, 20)
    with torch.no_grad():  # a head that is always zero: an empty row of G
        block_layers(model)[0].attn.qkv.weight[-16:] = 0
        block_layers(model)[0].attn.qkv.bias[-16:] = 0
    keep = Keep((np.array([0, 2]), np.array([1])), random_keep(spec, 1).neurons)
    moments = collect_moments(model, [x])
    for method in ("bias", "least_squares"):
        pruned, _ = prune_compensated(model, spec, keep, moments, method)
        assert torch.isfinite(pruned(x)).all()
        assert next(pruned.parameters()).dtype == torch.float32


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_moments_of_heads_are_enough_where_only_heads_go(method: Method) -> None:
    model, moments, x = measured()
    keep = Keep(random_keep(SPEC, 1).heads, everything(SPEC).neurons)
    heads = collect_moments(model, torch.split(x, 8), neurons=False)
    assert heads.neurons == ()
    found, _ = prune_compensated(model, SPEC, keep, heads, method)
    expected, _ = prune_compensated(model, SPEC, keep, moments, method)
    assert torch.equal(found(x), expected(x))
    with pytest.raises(ModelError, match="another model"):
        prune_compensated(model, SPEC, random_keep(SPEC, 1), heads, method)


def test_wrong_requests_are_refused() -> None:
    model, moments, _ = measured()
    keep = random_keep(SPEC, 1)
    with pytest.raises(ModelError, match="second moments"):
        prune_compensated(model, SPEC, keep, None)
    with pytest.raises(ModelError, match="another model"):
        prune_compensated(model, SPEC, keep, Moments(moments.heads, moments.heads))
    with pytest.raises(ModelError, match="ridge"):
        prune_compensated(model, SPEC, keep, moments, ridge=0)
    with pytest.raises(ModelError, match="unknown compensation"):
        prune_compensated(model, SPEC, keep, moments, "magic")  # type: ignore[arg-type]
