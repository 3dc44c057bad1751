"""DAL is unbiased, differentiable, grows with a shift; anchors travel and refuse garbage."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from common import anchors as anchors_module
from common.anchors import (
    FEATURES,
    Anchors,
    Kind,
    Statistics,
    compute_anchors,
    domain_alignment_loss,
    fourier_features,
    head_coral,
    head_mmd2,
    median_sigma,
    pooled_mmd2,
    tap_features,
)
from common.backbone import build, dense_spec
from common.errors import ConfigError, DataError, ProtocolError, RejectReason
from common.heads import tap_heads

WIDTH = 5
KINDS: tuple[Kind, ...] = ("mmd", "coral")


def drawn(count: int, heads: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((count, heads, WIDTH), generator=generator, dtype=torch.float64)
    return z * torch.linspace(0.5, 2, WIDTH) + shift


def anchors_of(z: Tensor, heads: tuple[int, ...], seed: int = 3) -> Anchors:
    """Anchors of a source sample, straight from the definitions."""
    sigma = torch.linspace(2, 3, z.shape[1])
    phi = fourier_features(z, sigma, seed)
    centred = z - z.mean(0)
    return Anchors(
        seed=seed,
        count=len(z),
        heads=heads,
        sigma=sigma,
        psi=phi.mean(0).float(),
        spread=phi.var(0).sum(-1).float(),
        mean=z.mean(0).float(),
        covariance=(torch.einsum("bui,buj->uij", centred, centred) / (len(z) - 1)).float(),
    )


def split(z: Tensor, heads: tuple[int, ...]) -> list[Tensor]:
    return list(torch.split(z, list(heads), 1))


# --- the distance ---------------------------------------------------------------------------------


def test_features_approximate_the_gaussian_kernel() -> None:
    z = drawn(2, 400, 0)
    phi = torch.stack([fourier_features(z, torch.full((400,), 3.0), seed) for seed in range(60)])
    estimate = (phi[:, 0] * phi[:, 1]).sum(-1).mean(0)
    exact = torch.exp(-(z[0] - z[1]).square().sum(-1) / (2 * 9))
    assert (estimate - exact).abs().max() < 0.1


def test_mmd_is_the_mean_over_pairs() -> None:
    """Unbiased MMD is a U-statistic: no image is compared with itself."""
    source, batch = drawn(7, 2, 0), drawn(5, 2, 1, shift=0.3)
    anchors = anchors_of(source, (2,))
    x, y = (tap_features([z], anchors).transpose(0, 1) for z in (batch, source))

    def within(phi: Tensor) -> Tensor:
        products = phi @ phi.mT
        n = phi.shape[1]
        return (products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))

    expected = within(x) + within(y) - 2 * (x @ y.mT).mean((1, 2))
    torch.testing.assert_close(head_mmd2([batch], anchors), expected, atol=1e-6, rtol=1e-5)


def test_mmd_is_unbiased_for_finite_draws_of_one_distribution() -> None:
    values = []
    for draw in range(1500):
        z = drawn(20 + 8, 3, draw)
        values.append(head_mmd2([z[:8]], anchors_of(z[8:], (3,))))
    mean, error = torch.stack(values).mean(0), torch.stack(values).std(0) / math.sqrt(len(values))
    assert (mean.abs() < 3 * error).all(), (mean, error)
    # The test can tell: without its corrections the estimate would be far off.
    spread = anchors_of(z, (3,)).spread
    assert (spread / 20 > 10 * error).all()
    assert (spread / 8 > 10 * error).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    anchors = anchors_of(drawn(9, 3, 0), (1, 2))
    z = [block.clone().requires_grad_() for block in split(drawn(4, 3, 1, 0.2), (1, 2))]
    weights = torch.tensor([1.0, 0.0, 3.0])

    def loss(*blocks: Tensor) -> Tensor:
        return domain_alignment_loss(blocks, anchors, kind, weights)

    assert torch.autograd.gradcheck(loss, z)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_grows_with_a_mean_shift(kind: Kind, seed: int) -> None:
    anchors = anchors_of(drawn(300, 3, seed), (3,))
    noise = drawn(300, 3, seed + 1)
    losses = [
        float(domain_alignment_loss([noise + shift], anchors, kind))
        for shift in (0.0, 0.3, 0.6, 0.9, 1.2)
    ]
    assert losses == sorted(losses)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(4)), seed=st.integers(0, 10_000))
def test_order_of_heads_does_not_matter(order: list[int], seed: int) -> None:
    source, batch = drawn(12, 4, seed), drawn(6, 4, seed + 1, 0.4)
    anchors = anchors_of(source, (4,))
    permuted = anchors.select([np.array(order)])
    for distance in (head_mmd2, head_coral):
        torch.testing.assert_close(
            distance([batch[:, order]], permuted), distance([batch], anchors)[order]
        )


def test_weights_choose_the_heads() -> None:
    anchors, batch = anchors_of(drawn(12, 3, 0), (3,)), drawn(6, 3, 1, 1.0)
    mmd2 = head_mmd2([batch], anchors)
    chosen = domain_alignment_loss([batch], anchors, weights=torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(chosen, mmd2[1])
    torch.testing.assert_close(domain_alignment_loss([batch], anchors), mmd2.mean())


def test_coral_is_zero_on_the_source_itself_and_half_precision_is_widened() -> None:
    source = drawn(40, 2, 0)
    anchors = anchors_of(source, (2,))
    assert head_coral([source], anchors).max() < 1e-10
    assert head_mmd2([source.bfloat16()], anchors).dtype == torch.float32


def test_refusals() -> None:
    anchors, batch = anchors_of(drawn(12, 3, 0), (1, 2)), drawn(6, 3, 1)
    with pytest.raises(ProtocolError, match="same candidate") as caught:
        head_mmd2(split(batch, (2, 1)), anchors)
    assert caught.value.reason == RejectReason.FOREIGN_MASK
    with pytest.raises(DataError, match="two images"):
        head_mmd2(split(batch[:1], (1, 2)), anchors)
    with pytest.raises(ConfigError, match="covariance"):
        domain_alignment_loss(split(batch, (1, 2)), replace(anchors, mean=None), "coral")
    with pytest.raises(ConfigError, match="unknown"):
        domain_alignment_loss(split(batch, (1, 2)), anchors, "wasserstein")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 19), max_size=4))
def test_streaming_does_not_depend_on_the_batches(seed: int, cuts: set[int]) -> None:
    z = drawn(20, 2, seed)
    anchors = anchors_of(drawn(9, 2, seed + 1), (2,))
    statistics = Statistics()
    for part in torch.tensor_split(z, sorted(cuts)):
        statistics.add(tap_features([part], anchors))
    torch.testing.assert_close(pooled_mmd2(statistics, anchors), head_mmd2([z], anchors))


def test_pooled_distance_needs_two_images() -> None:
    anchors, statistics = anchors_of(drawn(9, 2, 1), (2,)), Statistics()
    statistics.add(tap_features([drawn(1, 2, 0)], anchors))
    with pytest.raises(DataError):
        pooled_mmd2(statistics, anchors)


# --- on a backbone --------------------------------------------------------------------------------

SPEC = dense_spec("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 48, "num_heads": 3})


def pictures(count: int) -> Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(5))


def test_compute_anchors_matches_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = build(SPEC).train(), pictures(40)
    anchors = compute_anchors(model, torch.split(x, 16), seed=11, coral=True)
    assert model.training
    with torch.no_grad(), tap_heads(model.eval()) as taps:
        model(x)
    z = torch.cat(taps, 1)
    phi = fourier_features(z, anchors.sigma, 11)
    assert (anchors.count, anchors.heads) == (40, (3, 3))
    torch.testing.assert_close(anchors.psi, phi.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(anchors.spread, phi.var(0).sum(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(anchors.sigma, median_sigma(z, 11), rtol=1e-3, atol=1e-9)
    assert anchors.covariance is not None
    torch.testing.assert_close(anchors.covariance[4], z[:, 4].T.cov(), rtol=1e-3, atol=1e-8)
    # A stream longer than the pool: sigma from the pool, everything else from all images.
    monkeypatch.setattr(anchors_module, "SIGMA_POOL", 16)
    longer = compute_anchors(model, torch.split(x, 16), seed=11)
    torch.testing.assert_close(longer.sigma, median_sigma(z[:16], 11), rtol=1e-3, atol=1e-9)
    assert longer.count == 40


def test_sigma_is_the_median_distance() -> None:
    z = drawn(30, 2, 0)
    distances = torch.cdist(z[:, 1], z[:, 1])
    i, j = torch.triu_indices(30, 30, 1)
    assert float(median_sigma(z, 0)[1]) == pytest.approx(float(distances[i, j].median()), rel=1e-6)
    assert (median_sigma(torch.ones(4, 2, WIDTH), 0) > 0).all()


def test_anchors_need_images_and_finite_outputs() -> None:
    model = build(SPEC)
    with pytest.raises(DataError, match="two source images"):
        compute_anchors(model, [pictures(1)], seed=0)
    with pytest.raises(DataError, match="not finite"):
        compute_anchors(model, [pictures(4) * torch.inf], seed=0)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coral", [True, False])
def test_bytes_round_trip(coral: bool) -> None:
    anchors = anchors_of(drawn(9, 3, 0), (1, 2))
    if not coral:
        anchors = replace(anchors, mean=None, covariance=None)
    again = Anchors.from_bytes(anchors.to_bytes())
    assert (again.seed, again.count, again.heads) == (3, 9, (1, 2))
    for name in ("sigma", "psi", "spread", "mean", "covariance"):
        a, b = getattr(anchors, name), getattr(again, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert again.to_bytes() == anchors.to_bytes()


def test_select_keeps_the_named_heads() -> None:
    anchors = anchors_of(drawn(9, 5, 0), (2, 3))
    chosen = anchors.select([np.array([1]), np.array([0, 2])])
    assert chosen.heads == (1, 2)
    assert torch.equal(chosen.psi, anchors.psi[[1, 2, 4]])
    assert chosen.covariance is not None
    assert chosen.covariance.shape == (3, WIDTH, WIDTH)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_garbage_raises_protocol_error_only(data: st.DataObject) -> None:
    body = bytearray(anchors_of(drawn(9, 2, 0), (2,)).to_bytes())
    kind = data.draw(st.sampled_from(["random", "cut", "flip"]))
    if kind == "random":
        body = bytearray(data.draw(st.binary(max_size=200)))
    elif kind == "cut":
        body = body[: data.draw(st.integers(0, len(body) - 1))]
    else:
        header = 8 + int.from_bytes(body[:8], "little")
        for at in data.draw(st.lists(st.integers(0, header + 40), min_size=1, max_size=4)):
            body[at] = data.draw(st.integers(0, 255))
    try:
        Anchors.from_bytes(bytes(body))
    except ProtocolError:
        return
    assert kind == "flip"


def tampered(**changes: Tensor) -> bytes:
    anchors = anchors_of(drawn(9, 2, 0), (2,))
    tensors = {"sigma": anchors.sigma, "psi": anchors.psi, "spread": anchors.spread} | changes
    about = {"version": 1, "seed": 3, "count": 9, "heads": [2]}
    return save(tensors, metadata={"anchors": json.dumps(about)})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("sigma", torch.zeros(2)),
        ("sigma", torch.full((2,), torch.nan)),
        ("psi", torch.ones(2, FEATURES)),
        ("psi", torch.zeros(2, FEATURES + 1)),
        ("spread", torch.full((2,), -1.0)),
        ("spread", torch.full((2,), 5.0)),
        ("spread", torch.zeros(2, dtype=torch.float64)),
        ("mean", torch.zeros(2, WIDTH)),
        ("other", torch.zeros(2)),
    ],
)
def test_wrong_tensors_are_refused(name: str, tensor: Tensor) -> None:
    Anchors.from_bytes(tampered())
    with pytest.raises(ProtocolError):
        Anchors.from_bytes(tampered(**{name: tensor}))


def test_oversized_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors_module, "MAX_BYTES", 10)
    with pytest.raises(ProtocolError) as caught:
        Anchors.from_bytes(tampered())
    assert caught.value.reason == RejectReason.OVERSIZED
