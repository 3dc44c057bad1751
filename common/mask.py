"""Which heads and neurons are kept.

A mask names units by their index in the dense backbone, so masks of different prune events
compare; ``Keep`` names them by their index in the model that is being cut. How a mask is chosen is
in common/budget.py.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from common.errors import ModelError, ProtocolError
from common.spec import ModelSpec

Indices = npt.NDArray[np.int64]
Blocks = tuple[tuple[int, ...], ...]


class _PackedBlock(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    of: int = Field(ge=1, le=65536)
    kept: str = Field(pattern=r"^[0-9a-f]*$", max_length=16384)


class _PackedMask(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    heads: Annotated[list[_PackedBlock], Field(min_length=1, max_length=1024)]
    neurons: Annotated[list[_PackedBlock], Field(min_length=1, max_length=1024)]


@dataclass(frozen=True, eq=False)
class Keep:
    """Kept units per block, ascending indices in the coordinates of the model to be cut."""

    heads: tuple[Indices, ...]
    neurons: tuple[Indices, ...]


@dataclass(frozen=True)
class Mask:
    """Kept units per block, ascending indices in the dense backbone, and the dense counts.

    A block may keep no head, when its attention is gone as a whole, but it keeps neurons.

    Raises:
        ProtocolError: a block keeps no neuron, or no block a head, or an index is out of range,
            repeated or unsorted.
    """

    heads: Blocks
    neurons: Blocks
    dense_heads: tuple[int, ...]
    dense_neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        _require_blocks(self.heads, self.dense_heads, "heads", least=0)
        _require_blocks(self.neurons, self.dense_neurons, "neurons", least=1)
        if not any(self.heads):
            raise ProtocolError("a mask must keep one head at least: tokens would never meet")
        if len(self.heads) != len(self.neurons):
            raise ProtocolError("a mask must name heads and neurons of the same blocks")

    @classmethod
    def dense(cls, spec: ModelSpec) -> "Mask":
        """The mask that keeps every unit of ``spec``."""
        return cls(
            tuple(tuple(range(count)) for count in spec.heads),
            tuple(tuple(range(count)) for count in spec.neurons),
            spec.heads,
            spec.neurons,
        )

    @property
    def is_dense(self) -> bool:
        """Whether every unit is kept."""
        kept = (tuple(map(len, self.heads)), tuple(map(len, self.neurons)))
        return kept == (self.dense_heads, self.dense_neurons)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Mask":
        """Inverse of :meth:`to_json`; raises ProtocolError on anything else."""
        try:
            packed = _PackedMask.model_validate_json(text)
            return cls(
                tuple(_unpacked(block) for block in packed.heads),
                tuple(_unpacked(block) for block in packed.neurons),
                tuple(block.of for block in packed.heads),
                tuple(block.of for block in packed.neurons),
            )
        except ValueError as error:
            raise ProtocolError(f"a mask cannot be read: {str(error)[:200]}") from error

    def to_json(self) -> str:
        """Canonical JSON: per block the dense count and the kept units as bits in hex."""
        packed = {
            "version": 1,
            "heads": _packed(self.heads, self.dense_heads),
            "neurons": _packed(self.neurons, self.dense_neurons),
        }
        return json.dumps(packed, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON: the identity of the mask."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def is_within(self, other: "Mask") -> bool:
        """Whether every unit kept here is kept in ``other``, of the same dense backbone."""
        if (self.dense_heads, self.dense_neurons) != (other.dense_heads, other.dense_neurons):
            return False
        mine, theirs = (*self.heads, *self.neurons), (*other.heads, *other.neurons)
        return all(set(a) <= set(b) for a, b in zip(mine, theirs, strict=True))

    def apply_to(self, dense_spec: ModelSpec) -> ModelSpec:
        """The spec of the dense backbone once it is cut; raises ModelError for another backbone."""
        if (self.dense_heads, self.dense_neurons) != (dense_spec.heads, dense_spec.neurons):
            raise ModelError(
                f"the mask is for {self.dense_heads} heads per block, {dense_spec.name} has "
                f"{dense_spec.heads}, or their neurons differ; take the mask of this backbone"
            )
        return dense_spec.with_units(_counts(self.heads), _counts(self.neurons))

    def keep_in(self, parent: "Mask") -> Keep:
        """Index arrays into a model cut by ``parent``; ModelError unless within it."""
        if not self.is_within(parent):
            raise ModelError("the mask keeps units that the model has lost; restore a candidate")

        def located(mine: Blocks, theirs: Blocks) -> tuple[Indices, ...]:
            pairs = zip(mine, theirs, strict=True)
            return tuple(np.searchsorted(b, a).astype(np.int64) for a, b in pairs)

        return Keep(located(self.heads, parent.heads), located(self.neurons, parent.neurons))

    @property
    def heads_kept_ratio(self) -> float:
        """Share of the dense backbone's heads that is kept."""
        return sum(_counts(self.heads)) / sum(self.dense_heads)

    @property
    def neurons_kept_ratio(self) -> float:
        """Share of the dense backbone's neurons that is kept."""
        return sum(_counts(self.neurons)) / sum(self.dense_neurons)

    def describe(self) -> str:
        """One line per block: kept heads filled, dropped ones hollow; neurons as count and share.

        ``block  3  heads ●●○●○● 4/6   neurons   768/1536  50 %``
        """
        wide = max(self.dense_heads)
        lines = []
        for block, kept in enumerate(self.heads):
            heads, neurons = self.dense_heads[block], self.dense_neurons[block]
            picture = "".join("●" if head in kept else "○" for head in range(heads))
            left = len(self.neurons[block])
            lines.append(
                f"block {block:2d}  heads {picture:<{wide}} {len(kept):2d}/{heads:<2d}  "
                f"neurons {left:5d}/{neurons}  {100 * left / neurons:3.0f} %"
            )
        return "\n".join(lines)


def _counts(blocks: Blocks) -> tuple[int, ...]:
    return tuple(len(block) for block in blocks)


def _require_blocks(blocks: Blocks, dense: Sequence[int], kind: str, least: int) -> None:
    if not blocks or len(blocks) != len(dense):
        raise ProtocolError(f"a mask names {len(blocks)} blocks of {kind}, {len(dense)} expected")
    for number, (kept, count) in enumerate(zip(blocks, dense, strict=True)):
        index = np.asarray(kept, dtype=np.int64)
        inside = not kept or (index[0] >= 0 and index[-1] < count)
        if len(kept) < least or not inside or (np.diff(index) <= 0).any():
            raise ProtocolError(
                f"the mask's {kind} of block {number} must be ascending, at least {least}, "
                f"and below {count}"
            )


def _packed(blocks: Blocks, dense: Sequence[int]) -> list[dict[str, int | str]]:
    packed: list[dict[str, int | str]] = []
    for kept, count in zip(blocks, dense, strict=True):
        bits = np.zeros(count, np.bool_)
        bits[list(kept)] = True
        packed.append({"of": count, "kept": np.packbits(bits).tobytes().hex()})
    return packed


def _unpacked(block: _PackedBlock) -> tuple[int, ...]:
    raw = np.frombuffer(bytes.fromhex(block.kept), np.uint8)
    bits = np.unpackbits(raw)
    if len(raw) != math.ceil(block.of / 8) or bits[block.of :].any():
        raise ValueError(f"{len(raw)} bytes do not spell a choice among {block.of} units")
    return tuple(np.flatnonzero(bits).tolist())
