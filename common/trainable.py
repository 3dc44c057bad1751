"""What a round trains: parameters by name, or low-rank factors beside frozen weights.

    bias       every one-dimensional parameter (biases, norms, layer-scale): 70 k numbers in a ViT-S
    attention  those and the attention projections
    lora       those and factors of rank r beside qkv, proj, fc1 and fc2 (LoRA, Hu et al., 2021)
    full       everything

Of the two factors of a weight one is trained, from zero; the other is frozen, drawn from the name
of the weight and never sent (FFA-LoRA, Sun et al., 2024). The change T F is then linear in what is
sent, so the mean of many farms' factors is exactly the mean of their changes, and the server merges
it into the weights. Frozen is the side of the backbone's width C, which no mask cuts:

    qkv, fc1   W + T F    T (out, r) trained, F (r, C) = +-1 / sqrt(C)
    proj, fc2  W + F T    T (r, in) trained,  F (C, r) = +-1 / C

A step of the optimiser changes every number of T by about the same amount; the two scales make the
output of both kinds of layer move about as far by it.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common import layout
from common.backbone import block_layers
from common.codec import Floats
from common.errors import ModelError
from common.layout import Layout

TRAINABLE_SETS = ("bias", "attention", "lora", "full")
FACTOR = "factor"


@dataclass(frozen=True)
class TrainableSet:
    """The trained numbers of one backbone, laid out flat; ``rank`` is 0 where none are factors."""

    layout: Layout
    rank: int

    def add(self, model: VisionTransformer, flat: Floats) -> None:
        """Add a change, fp32 (n,), to a backbone in place; the same bits on every machine.

        Raises:
            ModelError: the backbone is not the one that the set was made for.
            ProtocolError: ``flat`` does not fit.
        """
        if not self.rank:
            layout.add(model, self.layout, flat)
            return
        changes = self.layout.unflatten(flat)
        plain = [name for name in self.layout.names if not name.endswith(FACTOR)]
        named = layout.layout_of(model, plain)
        layout.add(model, named, named.flatten(changes))
        self.merge(model, flat)

    def merge(self, model: VisionTransformer, flat: Floats) -> None:
        """Add what the factors of a change amount to, and nothing else of it.

        Raises:
            ProtocolError: ``flat`` does not fit.
        """
        if self.rank:
            changes = self.layout.unflatten(flat)
            for name, linear, trains_rows in _factored(model):
                _merge(linear, changes[name], name, trains_rows)


def trainable_set(model: VisionTransformer, kind: str, rank: int = 8) -> TrainableSet:
    """The set of that name; ``rank`` counts for ``lora`` alone.

    Raises:
        ModelError: there is no such set.
    """
    names = trainable_names(model, kind)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if kind != "lora":
        return TrainableSet(Layout(tuple(names), tuple(shapes[name] for name in names)), 0)
    for name, linear, trains_rows in _factored(model):
        rows, columns = linear.weight.shape
        shapes[name] = (rows, rank) if trains_rows else (rank, columns)
        names.append(name)
    names.sort()
    return TrainableSet(Layout(tuple(names), tuple(shapes[name] for name in names)), rank)


def trainable_names(model: VisionTransformer, kind: str) -> list[str]:
    """Names of a backbone's own parameters that a round trains, sorted.

    Raises:
        ModelError: there is no set of that name.
    """
    if kind not in TRAINABLE_SETS:
        raise ModelError(f"unknown trainable set '{kind}'; known: {', '.join(TRAINABLE_SETS)}")
    chosen = [
        name
        for name, parameter in model.named_parameters()
        if kind == "full" or parameter.ndim == 1 or (kind == "attention" and ".attn." in name)
    ]
    return sorted(chosen)


@contextmanager
def factors(model: VisionTransformer, rank: int) -> Iterator[None]:
    """Trained factors, all zero, as parameters of their layers for as long as the context lasts.

    They are named as in the layout of ``lora`` and take part in the forward pass through hooks.
    """
    hooks = []
    try:
        for name, linear, trains_rows in _factored(model):
            rows, columns = linear.weight.shape
            shape = (rows, rank) if trains_rows else (rank, columns)
            linear.register_parameter(FACTOR, nn.Parameter(torch.zeros(shape)))
            frozen = _frozen(name, linear, rank, trains_rows)
            hooks.append(linear.register_forward_hook(_Beside(frozen, trains_rows)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for _, linear, _ in _factored(model):
            if hasattr(linear, FACTOR):
                delattr(linear, FACTOR)


@dataclass(frozen=True, eq=False)
class _Beside:
    """Adds what the factors make of a layer's input (..., in) to its output (..., out)."""

    frozen: Tensor
    trains_rows: bool

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        trained = linear.get_parameter(FACTOR)
        if self.trains_rows:
            return output + functional.linear(functional.linear(inputs[0], self.frozen), trained)
        return output + functional.linear(functional.linear(inputs[0], trained), self.frozen)


def _factored(model: VisionTransformer) -> Iterator[tuple[str, nn.Linear, bool]]:
    """Name of the factor, layer, and whether its rows are trained (else its columns)."""
    for number, layers in enumerate(block_layers(model)):
        assert isinstance(layers.attn.qkv, nn.Linear)
        assert isinstance(layers.attn.proj, nn.Linear)
        yield f"blocks.{number}.attn.qkv.{FACTOR}", layers.attn.qkv, True
        yield f"blocks.{number}.attn.proj.{FACTOR}", layers.attn.proj, False
        yield f"blocks.{number}.mlp.fc1.{FACTOR}", layers.fc1, True
        yield f"blocks.{number}.mlp.fc2.{FACTOR}", layers.fc2, False


def _signs(name: str, rank: int, width: int) -> Floats:
    """+-1 (rank, width), the same on every machine and in every version of every library."""
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(-(-rank * width // 8)), np.uint8)
    flat = np.unpackbits(bits)[: rank * width].astype(np.float32)
    return (flat * 2 - 1).reshape(rank, width)


def _frozen(name: str, linear: nn.Linear, rank: int, trains_rows: bool) -> Tensor:
    """The frozen factor: (r, C) beside trained rows, (C, r) beside trained columns."""
    rows, columns = linear.weight.shape
    if trains_rows:
        return torch.from_numpy(_signs(name, rank, columns) * _row_scale(columns))
    return torch.from_numpy(_signs(name, rank, rows).T * _column_scale(rows)).contiguous()


def _row_scale(width: int) -> np.float32:
    return np.float32(1 / math.sqrt(width))


def _column_scale(width: int) -> np.float32:
    return np.float32(1 / width)


@torch.no_grad()
def _merge(linear: nn.Linear, trained: Tensor, name: str, trains_rows: bool) -> None:
    """Add T F to the weight: rank by rank, a product and a sum at a time, never fused."""
    weight = linear.weight.numpy()
    rows, columns = weight.shape
    rank = trained.shape[1 if trains_rows else 0]
    width = columns if trains_rows else rows
    scale = _row_scale(width) if trains_rows else _column_scale(width)
    signs, values = _signs(name, rank, width), trained.numpy() * scale
    change = np.zeros_like(weight)
    for number in range(rank):
        if trains_rows:
            change += values[:, number, None] * signs[number]
        else:
            change += signs[number, :, None] * values[number]
    weight += change
