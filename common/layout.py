"""Tensors by name as one flat array, in a fixed order, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.errors import ModelError, ProtocolError, RejectReason

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trainable tensors, in the order in which they are laid out flat."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers per tensor."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    @property
    def count(self) -> int:
        """Numbers in all, n."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Floats:
        """The named tensors as one array: fp32 (n,).

        Raises:
            ModelError: a tensor is missing or has another shape; names it.
        """
        flat = np.empty(self.count, dtype=np.float32)
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ModelError(f"tensor '{name}' must have shape {shape}, found {found}")
            values = tensors[name].detach().to("cpu", torch.float32)
            flat[start : start + size] = values.reshape(-1).numpy()
            start += size
        return flat

    def unflatten(self, flat: Floats) -> dict[str, Tensor]:
        """Inverse of :meth:`flatten`; the tensors may share memory with ``flat``.

        Raises:
            ProtocolError: ``flat`` is not fp32 (n,).
        """
        if flat.shape != (self.count,) or flat.dtype != np.float32:
            raise ProtocolError(
                f"a change of {self.count} fp32 numbers is expected, found {flat.dtype} "
                f"{flat.shape}; sender and receiver train different tensors",
                RejectReason.SHAPE,
            )
        # numbers that lie in a read-only buffer are copied: torch knows no read-only tensors
        tensor = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
        parts = torch.split(tensor, list(self.sizes))
        return {
            name: part.view(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }


def layout_of(model: nn.Module, names: Iterable[str]) -> Layout:
    """The layout of the named parameters of a model.

    Raises:
        ModelError: the model has no parameter of that name, or none was named.
    """
    known = dict(model.named_parameters())
    chosen = tuple(names)
    missing = [name for name in chosen if name not in known]
    if missing or not chosen:
        raise ModelError(f"the backbone has no trainable tensor {missing[:3] or 'at all'}")
    return Layout(chosen, tuple(tuple(known[name].shape) for name in chosen))


def add(model: nn.Module, layout: Layout, flat: Floats) -> None:
    """Add decoded numbers, fp32 (n,), to the parameters in place.

    Raises:
        ModelError: a parameter is missing, has another shape or is not fp32.
        ProtocolError: ``flat`` does not fit the layout.
    """
    add_tensors(model, layout.unflatten(flat))


@torch.no_grad()
def add_tensors(model: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Add changes to the parameters of that name in place; raises ModelError as :func:`add`."""
    parameters = dict(model.named_parameters())
    for name, change in changes.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != change.shape or parameter.dtype != torch.float32:
            raise ModelError(f"the backbone has no fp32 tensor '{name}' of {tuple(change.shape)}")
    for name, change in changes.items():
        parameters[name].add_(change.to(parameters[name].device))
