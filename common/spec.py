"""ModelSpec: all that is needed to rebuild a (pruned) backbone before its tensors are loaded.

A spec is frozen, hashable and JSON; it never carries code. Units are counted block by block:
``heads[l]`` attention heads of ``head_width`` channels, ``neurons[l]`` MLP neurons. A StudentSpec
is the same for a convolutional network that learns from a backbone (common/student.py).
"""

import json
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open

from common.errors import ModelError

Triple = tuple[float, float, float]
_ADDED = ("kept_tokens", "merge_tokens", "linear_blocks")
Count = Annotated[int, Field(ge=1, le=65536)]
Heads = Annotated[int, Field(ge=0, le=65536)]
"""Of a block; with none its attention is gone (common/silent.py)."""


class ModelSpec(BaseModel):
    """The shape of a backbone: a timm architecture and the units that are left of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="timm architecture, for example vit_small_patch14_dinov2")
    image_size: int = Field(ge=16, le=2048, description="side of the square input in pixels")
    options: tuple[tuple[str, int], ...] = Field(
        default=(), description="timm constructor overrides, for example (('depth', 6),)"
    )
    heads: tuple[Heads, ...] = Field(description="attention heads, block by block")
    neurons: tuple[Count, ...] = Field(description="MLP neurons, block by block")
    head_width: Count
    width: Count = Field(description="embedding width, also the length of a feature vector")
    kept_tokens: tuple[Count, ...] = Field(
        default=(), description="patch tokens that leave each block; empty: all of them"
    )
    merge_tokens: bool = Field(
        default=False, description="tokens that go are merged into the most similar, not dropped"
    )
    linear_blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="numbers of the blocks whose attention is linear"
    )
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _same_depth(self) -> "ModelSpec":
        if not self.heads or len(self.heads) != len(self.neurons):
            raise ValueError("heads and neurons must name the same, non-zero number of blocks")
        return self

    @model_validator(mode="after")
    def _possible_attention(self) -> "ModelSpec":
        kept, linear = self.kept_tokens, self.linear_blocks
        if kept and (len(kept) != self.depth or list(kept) != sorted(kept, reverse=True)):
            raise ValueError("kept_tokens names a number for every block, never a rising one")
        if list(linear) != sorted(set(linear)) or any(one >= self.depth for one in linear):
            raise ValueError(f"linear_blocks must be ascending and below {self.depth}")
        if kept and 0 in self.heads:
            raise ValueError("tokens are sampled by attention, which every block must have then")
        return self

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.heads)

    def with_units(self, heads: tuple[int, ...], neurons: tuple[int, ...]) -> "ModelSpec":
        """The same architecture with other unit counts, validated again."""
        return ModelSpec.model_validate(self.model_dump() | {"heads": heads, "neurons": neurons})

    def to_json(self) -> str:
        """Canonical JSON: the same spec always gives the same text.

        What was added to specs later is left out where it is not used: an identity stays the same.
        """
        unused = {name for name in _ADDED if not getattr(self, name)}
        return self.model_dump_json(exclude=unused)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelSpec":
        """Parse and validate; raises ``pydantic.ValidationError``."""
        return cls.model_validate_json(text)


class StudentSpec(BaseModel):
    """A convolutional network of timm, whole, that takes the images its teacher takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Literal["student"] = "student"
    name: str = Field(description="timm architecture, for example mobilenetv3_small_100")
    image_size: int = Field(ge=16, le=2048, description="side of the square input in pixels")
    width: Count = Field(description="length of a feature vector")
    mean: Triple
    std: Triple

    def to_json(self) -> str:
        """Canonical JSON: the same spec always gives the same text."""
        return self.model_dump_json()


Spec: TypeAlias = ModelSpec | StudentSpec


def spec_of_text(text: str) -> Spec:
    """The spec that a JSON text is; raises ``ValueError`` as ``ModelSpec.from_json`` does."""
    values = json.loads(text)
    student = isinstance(values, dict) and "network" in values
    return (StudentSpec if student else ModelSpec).model_validate_json(text)


def saved_spec(path: Path) -> ModelSpec:
    """Only the spec of a saved backbone, without its tensors.

    Raises:
        ModelError: the file cannot be read or carries none; names it.
    """
    try:
        with safe_open(path, framework="np") as file:
            return ModelSpec.from_json((file.metadata() or {})["spec"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(f"'{path}' carries no backbone spec: {str(error)[:200]}") from error
