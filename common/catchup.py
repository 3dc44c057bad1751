"""What brings a farm that skipped rounds up to date, when that is less than the whole backbone.

    chain    safetensors {"0": uint8, "1": ...}: steps (common/step.py), applied one by one
    tensors  safetensors of the parameters that differ, fp32, to be put in the place of the old ones

A chain grows with every round; the tensors that a run trains stay the same few, so they are shorter
after some rounds. Units can only be cut by a step, so tensors replace those of the same shape.
"""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from common.codec import Bytes
from common.compress import compress, expand
from common.errors import ProtocolError, RejectReason
from common.step import MAX_BYTES, Step, most_bytes

MAX_STEPS = 64


def chain(steps: Sequence[Bytes]) -> Bytes:
    """Steps as they are stored, as one body."""
    named = {str(number): step for number, step in enumerate(steps)}
    return np.frombuffer(save_arrays(named), np.uint8)


def steps_of(body: Bytes, limit: int = MAX_BYTES) -> list[Step]:
    """Inverse of :func:`chain`.

    Raises:
        ProtocolError: these bytes are no chain of steps, or one holds more than ``limit`` bytes.
    """
    try:
        named = load_arrays(body.tobytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ProtocolError(f"not a chain of steps: {str(error)[:200]}") from error
    if set(named) != {str(number) for number in range(len(named))} or len(named) > MAX_STEPS:
        raise ProtocolError(f"a chain of {len(named)} steps with gaps, or too long")
    steps = (named[str(number)].view(np.uint8) for number in range(len(named)))
    return [Step.from_bytes(step, limit) for step in steps]


def changed(before: nn.Module, after: nn.Module) -> Bytes | None:
    """The parameters that differ; None where shapes do, because units were cut in between."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    if any(old[name].shape != parameter.shape for name, parameter in new.items()):
        return None
    differing = {
        name: parameter.detach().contiguous()
        for name, parameter in new.items()
        if not torch.equal(old[name], parameter)
    }
    return compress(np.frombuffer(save_tensors(differing), np.uint8))


@torch.no_grad()
def replace(model: nn.Module, body: Bytes) -> None:
    """Put the tensors of :func:`changed` into a backbone.

    Raises:
        ProtocolError: these bytes are no tensors of this backbone.
    """
    parameters = dict(model.named_parameters())
    try:
        tensors = load_tensors(expand(body, most_bytes(model)).tobytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ProtocolError(f"not a body of tensors: {str(error)[:200]}") from error
    for name, tensor in tensors.items():
        known = parameters.get(name)
        if known is None or known.shape != tensor.shape or tensor.dtype != torch.float32:
            raise ProtocolError(
                f"this backbone has no fp32 '{name[:80]}' of {tuple(tensor.shape)}",
                RejectReason.SHAPE,
            )
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
