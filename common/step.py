"""What leads from one candidate to the next: an update and, at a prune event, a cut.

    ordinary step    a coded update (common/codec.py), the mean of what the farms learned
    step with a cut  a safetensors file

        update           uint8  the coded update, added first
        heads, neurons   int32  units that are kept, in the base's coordinates, block behind block
        change           uint8  coded change of some tensors after the cut, against the same base
        metadata "cut"          JSON: kept heads and neurons per block, names of these tensors

Kilobytes where the smaller backbone has megabytes: what is not changed is never sent again. The
candidate is what comes out here, so server and farms reach the same digest.
"""

import json
from dataclasses import dataclass
from typing import Annotated, overload

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common import codec
from common.backbone import parameters
from common.codec import Bytes
from common.compress import compress, expand
from common.errors import ModelError, ProtocolError, RejectReason
from common.layout import add, layout_of
from common.mask import Indices, Keep
from common.networks import Network
from common.spec import ModelSpec, Spec, StudentSpec
from common.student import Student
from common.surgery import prune
from common.tensors import header_of
from common.trainable import TrainableSet, trainable_set

MAX_BYTES = 2_000_000_000


def most_bytes(model: nn.Module) -> int:
    """What a change of a network has at most: each number as fp32, and where it belongs."""
    return 8 * parameters(model) + 1_000_000


_Count = Annotated[int, Field(ge=1, le=2**20)]
_Counts = Annotated[list[_Count], Field(min_length=1, max_length=1024)]


class _About(BaseModel):
    """The metadata of a step with a cut."""

    model_config = ConfigDict(extra="forbid", strict=True)

    heads: Annotated[
        list[Annotated[int, Field(ge=0, le=2**20)]], Field(min_length=1, max_length=1024)
    ]
    neurons: _Counts
    names: Annotated[list[str], Field(max_length=4096)]


@dataclass(frozen=True, eq=False)
class Cut:
    """Kept units, and the coded change of the named tensors that makes up for the others."""

    keep: Keep
    names: tuple[str, ...]
    change: Bytes

    @classmethod
    def between(
        cls, plain: VisionTransformer, compensated: VisionTransformer, keep: Keep, base: str
    ) -> "Cut":
        """The cut of which ``plain`` is the bare result, coded with 8 bits per changed number."""
        bare, better = dict(plain.named_parameters()), dict(compensated.named_parameters())
        names = tuple(
            name
            for name in sorted(better)
            if better[name].data_ptr() != bare[name].data_ptr()
            and not torch.equal(better[name], bare[name])
        )
        flat = np.empty(0, np.float32)
        if names:
            layout = layout_of(plain, names)
            flat = layout.flatten(better) - layout.flatten(bare)
        return cls(keep, names, codec.encode(flat, base))

    def compensate(self, model: VisionTransformer) -> None:
        """Add the change to a model that is cut already.

        Raises:
            ModelError: the model has no such tensor.
            ProtocolError: the change is damaged.
        """
        if self.names:
            layout = layout_of(model, self.names)
            add(model, layout, codec.decode(self.change, base=None, count=layout.count))


@dataclass(frozen=True, eq=False)
class Step:
    """A coded update and perhaps a cut; ``base`` is the digest of the candidate it is added to."""

    update: Bytes
    cut: Cut | None = None

    @property
    def base(self) -> str:
        """Digest of the candidate that the step is added to."""
        return codec.read_header(self.update).base

    @overload
    def apply(
        self, model: VisionTransformer, spec: ModelSpec
    ) -> tuple[VisionTransformer, ModelSpec]: ...

    @overload
    def apply(self, model: Student, spec: StudentSpec) -> tuple[Student, StudentSpec]: ...

    @overload
    def apply(self, model: Network, spec: Spec) -> tuple[Network, Spec]: ...

    def apply(self, model: Network, spec: Spec) -> tuple[Network, Spec]:
        """The next candidate; ``model`` is used up.

        Raises:
            ProtocolError: the step does not fit the model, or is damaged.
        """
        trained = _trained(model, codec.read_header(self.update))
        count = trained.layout.count
        trained.add(model, codec.decode(self.update, base=self.base, count=count))
        if self.cut is None:
            return model, spec
        if not isinstance(model, VisionTransformer) or not isinstance(spec, ModelSpec):
            raise ProtocolError("a cut of a student, which has no heads", RejectReason.SHAPE)
        try:
            smaller, smaller_spec = prune(model, spec, self.cut.keep)
            self.cut.compensate(smaller)
        except ModelError as error:
            raise ProtocolError(f"a cut does not fit: {error}", RejectReason.SHAPE) from error
        return smaller, smaller_spec

    def to_bytes(self) -> Bytes:
        """As it is stored and sent, compressed where that is shorter."""
        if self.cut is None:
            return compress(self.update)
        keep = self.cut.keep
        about = {
            "heads": [len(kept) for kept in keep.heads],
            "neurons": [len(kept) for kept in keep.neurons],
            "names": list(self.cut.names),
        }
        arrays = {
            "update": self.update,
            "change": self.cut.change,
            "heads": np.concatenate(keep.heads).astype("<i4"),
            "neurons": np.concatenate(keep.neurons).astype("<i4"),
        }
        data = save(arrays, metadata={"cut": json.dumps(about)})
        return compress(np.frombuffer(data, np.uint8))

    @classmethod
    def from_bytes(cls, data: Bytes, limit: int = MAX_BYTES) -> "Step":
        """Inverse of :meth:`to_bytes`.

        Raises:
            ProtocolError: these bytes are no step, or hold more than ``limit`` bytes.
        """
        data = expand(data, limit)
        if bytes(data[: len(codec.MAGIC)]) == codec.MAGIC:
            return cls(data)
        try:
            raw = data.tobytes()
            header, _ = header_of(raw)
            about = _About.model_validate_json(header["__metadata__"]["cut"])
            arrays = load(raw)
            heads, neurons = arrays["heads"], arrays["neurons"]
            keep = Keep(_split(heads, about.heads), _split(neurons, about.neurons))
            cut = Cut(keep, tuple(about.names), arrays["change"])
            return cls(arrays["update"], cut)
        except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"not a step to a candidate: {str(error)[:200]}") from error


def _split(flat: Indices, counts: list[int]) -> tuple[Indices, ...]:
    if flat.ndim != 1 or len(flat) != sum(counts):
        raise ValueError(f"{flat.shape} kept units, but {sum(counts)} are announced")
    parts = np.split(flat.astype(np.int64), np.cumsum(counts)[:-1])
    return tuple(parts)


def _trained(model: nn.Module, header: codec.Header) -> TrainableSet:
    """What an update changes: its rank and the count of its numbers tell the sets apart."""
    for kind in ("lora",) if header.rank else ("bias", "attention", "full"):
        chosen = trainable_set(model, kind, header.rank)
        if chosen.layout.count == header.count:
            return chosen
    raise ProtocolError(
        f"{header.count} numbers are no set of parameters of this backbone", RejectReason.SHAPE
    )
