"""Taps and gates on attention heads and MLP neurons, through forward pre-hooks only.

A head's output is what ``attn.proj`` receives, a neuron's what ``mlp.fc2`` receives; hooks there
see both without copying or patching model code, and fused attention stays on. Multiplying by a
gate of 0 masks a unit; the gradient at a gate of 1 is its first-order importance (Michel et al.,
"Are Sixteen Heads Really Better than One?", 2019; Molchanov et al., 2019).

Shapes: B images, N tokens, H heads of one block, d channels of a head, M neurons of one block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.backbone import block_layers
from common.errors import ModelError
from common.mask import Keep

PreHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor] | None]


@dataclass(frozen=True, eq=False)
class Gates:
    """One factor per unit: ``heads[l]`` (B,H) and ``neurons[l]`` (B,M), or (1,...) to broadcast."""

    heads: list[Tensor]
    neurons: list[Tensor]

    @classmethod
    def ones(cls, model: VisionTransformer, batch: int = 1, requires_grad: bool = False) -> "Gates":
        """Gates that change nothing, (batch,H) and (batch,M), on the model's device and dtype."""

        def one(weight: Tensor, units: int) -> Tensor:
            return weight.new_ones((batch, units), requires_grad=requires_grad)

        layers = block_layers(model)
        return cls(
            [one(block.attn.proj.weight.detach(), block.attn.num_heads) for block in layers],
            [one(block.fc2.weight.detach(), block.fc2.in_features) for block in layers],
        )

    @classmethod
    def masking(cls, model: VisionTransformer, keep: Keep) -> "Gates":
        """Gates (1,H) and (1,M): 1 for the units of ``keep``, 0 for all others."""
        gates = cls.ones(model)
        for rows, kept in (
            *zip(gates.heads, keep.heads, strict=True),
            *zip(gates.neurons, keep.neurons, strict=True),
        ):
            index = torch.from_numpy(kept).to(rows.device)
            rows.copy_(torch.zeros_like(rows).index_fill_(1, index, 1.0))
        return gates


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the mode it was found in."""
    found = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in found:
            part.training = training


@contextmanager
def tap_heads(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """Watch every head: after each forward, item l is z (B,H_l,d), differentiable.

    z is the mean over the N tokens of a head's output just before ``attn.proj``. Every forward
    replaces all items; before the first they are empty. Half precision is averaged in fp32. The
    hooks are removed when the block is left, also by an exception.
    """
    blocks = block_layers(model)
    taps: list[Tensor] = [torch.empty(0) for _ in blocks]

    def watch(block: int, heads: int, width: int) -> PreHook:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x_BNA: Tensor = args[0]
            half = x_BNA.dtype in (torch.float16, torch.bfloat16)
            z_BA = x_BNA.mean(1, dtype=torch.float32 if half else x_BNA.dtype)
            taps[block] = z_BA.reshape(len(z_BA), heads, width)

        return hook

    with registered(
        [
            (layers.attn.proj, watch(i, layers.attn.num_heads, layers.attn.head_dim))
            for i, layers in enumerate(blocks)
        ]
    ):
        yield taps


@contextmanager
def gate_units(model: VisionTransformer, gates: Gates) -> Iterator[None]:
    """Multiply each head's and each neuron's output by its gate while the block is entered.

    Hooks run in the order of registration: taps opened inside see gated outputs.

    Raises:
        ModelError: the gates are for another number of blocks or units.
    """
    blocks = block_layers(model)
    _require_match([layers.attn.num_heads for layers in blocks], gates.heads)
    _require_match([layers.fc2.in_features for layers in blocks], gates.neurons)
    hooks: list[tuple[nn.Module, PreHook]] = []
    for layers, g_heads, g_neurons in zip(blocks, gates.heads, gates.neurons, strict=True):
        hooks.append((layers.attn.proj, _multiplier(g_heads)))
        hooks.append((layers.fc2, _multiplier(g_neurons)))
    with registered(hooks):
        yield


def _multiplier(g: Tensor) -> PreHook:
    """A pre-hook scaling (B,N,U*w) by gates (B,U), or (1,U): w channels of a unit share its gate.

    Neurons are units of one channel, so heads and neurons need only one hook.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        units = g.shape[1]
        x_BNUw = args[0].unflatten(-1, (units, args[0].shape[-1] // max(units, 1)))
        return ((x_BNUw * g[:, None, :, None].to(x_BNUw.dtype)).flatten(-2),)

    return hook


@contextmanager
def registered(hooks: Sequence[tuple[nn.Module, PreHook]]) -> Iterator[None]:
    """Forward pre-hooks on modules, removed when the block is left in whatever way."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _require_match(units: list[int], gates: list[Tensor]) -> None:
    gated = [g.shape[1] if g.ndim == 2 else None for g in gates]
    if gated != units:
        raise ModelError(
            f"gates for {gated} units per block do not fit a backbone with {units}; "
            "make them from the pruned model itself"
        )
