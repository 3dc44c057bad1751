"""Forward passes in bfloat16, where the machine multiplies it in hardware."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def bf16_supported() -> bool:
    """Whether this machine multiplies bfloat16 in hardware; emulation is slower than fp32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


@contextmanager
def bfloat16(device: torch.device, enabled: bool) -> Iterator[None]:
    """Matrix products in bfloat16 for as long as the context lasts; weights stay float32.

    Attention that is differentiated on a CPU is computed in float32: backward, torch's fused kernel
    takes more than twice as long in bfloat16 (a step of a ViT-S of 65 tokens 1.3 times), and the
    gradients are no closer to those in float32.

    Args:
        device: of the backbone.
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), _DifferentiatedAttention():
        yield


class _DifferentiatedAttention(TorchFunctionMode):
    """On CPUs, attention in float32 where a gradient will be taken."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **named)
        query: Tensor = args[0] if args else named["query"]
        if query.device.type != "cpu" or not (torch.is_grad_enabled() and query.requires_grad):
            return function(*args, **named)
        exact = {name: _in_fp32(one) for name, one in named.items()}
        with torch.autocast("cpu", enabled=False):
            found: Tensor = function(*map(_in_fp32, args), **exact)
        return found.to(query.dtype)


def _in_fp32(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.float() if floating else argument
