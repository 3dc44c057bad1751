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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.backbone import block_layers
from common.codec import Floats
from common.errors import ModelError
from common.layout import Layout, add_tensors

TRAINABLE_SETS = ("bias", "attention", "lora", "full")
FACTOR = "factor"


@dataclass(frozen=True)
class TrainableSet:
    """The trained numbers of one backbone, laid out flat; ``rank`` is 0 where none are factors."""

    layout: Layout
    rank: int

    def add(self, model: nn.Module, flat: Floats) -> None:
        """Add a change, fp32 (n,), to a backbone in place; the same bits on every machine.

        Raises:
            ModelError: the backbone is not the one that the set was made for.
            ProtocolError: ``flat`` does not fit.
        """
        changes = self.layout.unflatten(flat)
        add_tensors(model, {n: c for n, c in changes.items() if not n.endswith(FACTOR)})
        self._merge(model, changes)

    def holds(self, other: "TrainableSet") -> bool:
        """Whether numbers of this set have a place in ``other``, of the same backbone cut."""
        names = set(self.layout.names)
        return names.issuperset(other.layout.names) and other.rank in (0, self.rank)

    def merge(self, model: nn.Module, flat: Floats) -> None:
        """Add what the factors of a change amount to, and nothing else of it.

        Raises:
            ProtocolError: ``flat`` does not fit.
        """
        self._merge(model, self.layout.unflatten(flat))

    def _merge(self, model: nn.Module, changes: Mapping[str, Tensor]) -> None:
        if self.rank:
            for factor in _factors_of(model, self.rank):
                factor.merge(changes[factor.name])


def trainable_set(model: nn.Module, kind: str, rank: int = 8) -> TrainableSet:
    """The set of that name; ``rank`` counts for ``lora`` alone.

    Raises:
        ModelError: there is no such set.
    """
    names = trainable_names(model, kind)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if kind != "lora":
        return TrainableSet(Layout(tuple(names), tuple(shapes[name] for name in names)), 0)
    shapes |= {factor.name: factor.shape for factor in _factors_of(model, rank)}
    names = sorted([*names, *(name for name in shapes if name.endswith(FACTOR))])
    return TrainableSet(Layout(tuple(names), tuple(shapes[name] for name in names)), rank)


def trainable_names(model: nn.Module, kind: str) -> list[str]:
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
    found = list(_factors_of(model, rank))
    hooks = []
    try:
        for factor in found:
            trained = nn.Parameter(torch.zeros(factor.shape))
            factor.linear.register_parameter(FACTOR, trained)
            hooks.append(factor.linear.register_forward_hook(factor.beside()))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for factor in found:
            if hasattr(factor.linear, FACTOR):
                delattr(factor.linear, FACTOR)


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


@dataclass(frozen=True, eq=False)
class _Factor:
    """The trained factor of one layer: of its rows (out, r), or of its columns (r, in)."""

    name: str
    linear: nn.Linear
    trains_rows: bool
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the trained factor."""
        rows, columns = self.linear.weight.shape
        return (rows, self.rank) if self.trains_rows else (self.rank, columns)

    def beside(self) -> _Beside:
        """The hook that takes the factors into the forward pass."""
        return _Beside(torch.from_numpy(self._frozen()), self.trains_rows)

    def merge(self, trained: Tensor) -> None:
        """Add T F to the weight: rank by rank, a product and a sum at a time, never fused."""
        frozen, weight = self._frozen(), self.linear.weight.detach().numpy()
        left, right = (trained.numpy(), frozen) if self.trains_rows else (frozen, trained.numpy())
        change = np.zeros_like(weight)
        for number in range(self.rank):
            change += left[:, number, None] * right[number]
        weight += change

    def _frozen(self) -> Floats:
        """The frozen factor: (r, C) beside trained rows, (C, r) beside trained columns."""
        rows, columns = self.linear.weight.shape
        if self.trains_rows:
            return _signs(self.name, self.rank, columns) * np.float32(1 / math.sqrt(columns))
        return np.ascontiguousarray(_signs(self.name, self.rank, rows).T * np.float32(1 / rows))


def _factors_of(model: nn.Module, rank: int) -> Iterator[_Factor]:
    if not isinstance(model, VisionTransformer):
        raise ModelError("only a transformer has layers to put lora factors beside; train 'full'")
    for number, layers in enumerate(block_layers(model)):
        for place, linear, trains_rows in (
            ("attn.qkv", layers.attn.qkv, True),
            ("attn.proj", layers.attn.proj, False),
            ("mlp.fc1", layers.fc1, True),
            ("mlp.fc2", layers.fc2, False),
        ):
            assert isinstance(linear, nn.Linear)
            yield _Factor(f"blocks.{number}.{place}.{FACTOR}", linear, trains_rows, rank)


def _signs(name: str, rank: int, width: int) -> Floats:
    """+-1 (rank, width), the same on every machine and in every version of every library."""
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(-(-rank * width // 8)), np.uint8)
    flat = np.unpackbits(bits)[: rank * width].astype(np.float32)
    return (flat * 2 - 1).reshape(rank, width)
