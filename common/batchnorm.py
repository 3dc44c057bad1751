"""Statistics of batch normalisation, put together as if all farms' images lay in one place.

A batch-norm layer keeps a running mean m and variance v of each channel. Means of farms can be
averaged, variances cannot: what farms differ in is part of the variance of all of them. First and
second moments can, weighed by the images n_f that they are of:

    m = sum_f n_f m_f / n,   v = sum_f n_f (v_f + m_f^2) / n - m^2,   n = sum_f n_f

which is the mean and variance of the union, exactly, where v_f divides by the number of values and
not by one less (what torch keeps does the latter: :func:`statistics` measures anew). It is computed
in float64 around the mean, v = sum_f n_f (v_f + (m_f - m)^2) / n, where nothing cancels.

What reaches a layer depends on what the layers before it normalise by. All farms have to measure
the same network, and a network that adopts what they found has other values deeper down: measured
and adopted again, statistics settle.

Shapes: C channels of a layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import DataError, ModelError
from common.heads import evaluation_mode


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance (C,) of the values that reach a layer, of so many of them; float64."""

    count: int
    mean: Tensor
    variance: Tensor


Statistics = Mapping[str, Moments]
"""By the name of the layer."""


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers of a network that keep statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def pooled(farms: Sequence[Statistics]) -> dict[str, Moments]:
    """The statistics of the union of what farms have, whatever their order.

    Raises:
        ModelError: there are none, or they are of different networks.
        DataError: one is of nothing, not finite, or has a negative variance.
    """
    if not farms or any(set(one) != set(farms[0]) for one in farms):
        raise ModelError("statistics can be put together only where farms have the same layers")
    return {name: _pool(name, [one[name] for one in farms]) for name in farms[0]}


def _pool(name: str, parts: Sequence[Moments]) -> Moments:
    if len({part.mean.shape for part in parts} | {part.variance.shape for part in parts}) != 1:
        raise ModelError(f"layer {name}: farms have different numbers of channels")
    for part in parts:
        finite = bool(torch.isfinite(part.mean).all() and torch.isfinite(part.variance).all())
        if part.count < 1 or not finite or bool((part.variance < 0).any()):
            raise DataError(f"layer {name}: statistics of {part.count} values are none")
    total = sum(part.count for part in parts)
    weights = torch.tensor([part.count / total for part in parts], dtype=torch.float64)[:, None]
    mean_FC = torch.stack([part.mean.double() for part in parts])
    variance_FC = torch.stack([part.variance.double() for part in parts])
    mean_C = (weights * mean_FC).sum(0)
    variance_C = (weights * (variance_FC + (mean_FC - mean_C).square())).sum(0)
    return Moments(total, mean_C, variance_C)


@torch.no_grad()
def statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Measure, on images as they will be seen: evaluation mode, nothing is changed.

    Raises:
        DataError: there is no image.
    """
    seen: dict[str, list[Moments]] = {name: [] for name in layers(model)}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_CV = inputs[0].double().transpose(0, 1).flatten(1)
            variance = x_CV.var(1, correction=0)
            seen[name].append(Moments(x_CV.shape[1], x_CV.mean(1), variance))

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers(model).items()]
    try:
        with evaluation_mode(model):
            for images in batches:
                model(images)
    finally:
        for one in hooks:
            one.remove()
    if any(not parts for parts in seen.values()):
        raise DataError("there is no image to measure statistics on")
    return {name: _pool(name, parts) for name, parts in seen.items()}


@torch.no_grad()
def adopt(model: nn.Module, found: Statistics) -> None:
    """Let a network normalise by these statistics.

    Raises:
        ModelError: they are those of another network.
    """
    mine = layers(model)
    if set(mine) != set(found):
        raise ModelError("these are not the statistics of this network's layers")
    for name, layer in mine.items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if layer.running_mean.shape != found[name].mean.shape:
            raise ModelError(f"layer {name} has another number of channels than its statistics")
        layer.running_mean.copy_(found[name].mean)
        layer.running_var.copy_(found[name].variance)
