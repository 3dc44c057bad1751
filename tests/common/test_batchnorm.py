"""Statistics put together are those of all images in one place."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.batchnorm import Moments, Statistics, adopt, layers, pooled, statistics
from common.errors import DataError, ModelError

COUNTS = st.lists(st.integers(1, 20), min_size=1, max_size=5)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(values: Tensor) -> Moments:
    """Of (V,C)."""
    values = values.double()
    return Moments(len(values), values.mean(0), values.var(0, correction=0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


@given(COUNTS, st.floats(-1e4, 1e4), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_pooled_is_the_statistics_of_the_union(counts: list[int], far: float, seed: int) -> None:
    values = [drawn(seed + n, count, 3) * (1 + n) + far + 5 * n for n, count in enumerate(counts)]
    found = pooled([{"norm": moments(one)} for one in values])["norm"]
    expected = moments(torch.cat(values))
    assert found.count == sum(counts)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-6, atol=1e-6)


@given(COUNTS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_order_and_the_grouping_of_farms_do_not_matter(
    counts: list[int], random: Random
) -> None:
    farms: list[Statistics] = [
        {"norm": moments(drawn(n, count, 2) + n)} for n, count in enumerate(counts)
    ]
    whole = pooled(farms)["norm"]
    random.shuffle(farms)
    again = pooled([pooled(farms[:1]), *farms[1:]])["norm"]
    torch.testing.assert_close(again.mean, whole.mean)
    torch.testing.assert_close(again.variance, whole.variance)


def test_means_of_variances_would_be_wrong() -> None:
    apart = [{"norm": Moments(4, torch.tensor([m]), torch.tensor([1.0]))} for m in (-3.0, 3.0)]
    assert float(pooled(apart)["norm"].variance) == pytest.approx(10)


def test_what_is_measured_by_farms_is_what_is_measured_at_once() -> None:
    model, images = network(), drawn(3, 10, 3, 9, 9)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    whole = statistics(model, [images])
    parts = pooled([statistics(model, [images[:2], images[2:3]]), statistics(model, [images[3:]])])
    for name, found in whole.items():
        torch.testing.assert_close(parts[name].mean, found.mean)
        torch.testing.assert_close(parts[name].variance, found.variance)
        assert parts[name].count == found.count
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


def test_a_network_that_adopts_them_normalises_by_them() -> None:
    model, images = network(), drawn(3, 10, 3, 9, 9)
    first = model[:2]
    adopt(first, statistics(first, [images]))
    with torch.no_grad():
        out = first.eval()(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(4), atol=0.01, rtol=0)


def test_what_does_not_belong_together() -> None:
    one = {"norm": Moments(2, torch.zeros(3), torch.ones(3))}
    with pytest.raises(ModelError, match="the same layers"):
        pooled([])
    with pytest.raises(ModelError, match="the same layers"):
        pooled([one, {"other": one["norm"]}])
    with pytest.raises(ModelError, match="different numbers of channels"):
        pooled([one, {"norm": Moments(2, torch.zeros(2), torch.ones(2))}])
    for bad in (
        Moments(0, torch.zeros(3), torch.ones(3)),
        Moments(2, torch.full((3,), torch.nan), torch.ones(3)),
        Moments(2, torch.zeros(3), -torch.ones(3)),
    ):
        with pytest.raises(DataError, match="layer norm: statistics of"):
            pooled([one, {"norm": bad}])
    with pytest.raises(ModelError, match="not the statistics of this network"):
        adopt(network(), one)
    with pytest.raises(ModelError, match="layer 1 has another number of channels"):
        adopt(network()[:2], {"1": one["norm"]})
    with pytest.raises(DataError, match="no image"):
        statistics(network(), [])
