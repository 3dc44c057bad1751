"""What units cost: multiply-accumulates, or seconds as a kind of device was measured to take.

A block with fewer heads or neurons costs less, whatever the others have: a backbone costs what the
dense one does, less what each of its blocks saves. Of MACs that is exact. Of time it is a model
(client/costs.py measures it): layers run one after the other, so what they save adds up; how far
it is from the truth shows ``fieldfed-client bench`` of the pruned backbone.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError, first_fault
from common.spec import ModelSpec

Savings = npt.NDArray[np.float64]
Ratio = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


@dataclass(frozen=True, eq=False)
class UnitCosts:
    """Of a dense backbone and its blocks, in one unit of measure, ``name``.

    Attributes:
        total: of the dense backbone.
        heads: (H+1,) what a block saves that keeps 0, 1, ..., H heads; it never rises.
        neurons: (M+1,) likewise of neurons.
        name: of what is counted, for people.
    """

    total: float
    heads: Savings
    neurons: Savings
    name: str

    def of(self, spec: ModelSpec, dense: ModelSpec) -> float:
        """What a backbone costs that was cut from ``dense``."""
        return self.total - float(
            _saved(self.heads, spec.heads, dense.heads)
            + _saved(self.neurons, spec.neurons, dense.neurons)
        )


def _saved(saved: Savings, left: tuple[int, ...], dense: tuple[int, ...]) -> float:
    return float((saved[list(left)] - saved[list(dense)]).sum())


class CostTable(BaseModel):
    """How long a backbone takes with fewer units in every block, beside the dense one.

    ``heads`` and ``neurons`` are ratios of whole forward passes by what each block keeps; what lies
    between two of them is interpolated, and what noise made slower with fewer counts as equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(max_length=200, description="for people")
    engine: str = Field(max_length=100)
    threads: int = Field(ge=1, le=4096)
    spec: ModelSpec
    dense_seconds: float = Field(gt=0, allow_inf_nan=False, description="of one image, median")
    heads: dict[int, Ratio]
    neurons: dict[int, Ratio]

    @model_validator(mode="after")
    def _of_this_backbone(self) -> Self:
        if not cost_alike(self.spec):
            raise ValueError("its blocks do not cost alike: it has to be a dense backbone")
        for kind, ratios, most in (
            ("heads", self.heads, self.spec.heads[0]),
            ("neurons", self.neurons, self.spec.neurons[0]),
        ):
            if not ratios or min(ratios) < 1 or max(ratios) >= most:
                raise ValueError(f"{kind} must be measured for some of 1 to {most - 1} in a block")
        return self

    @classmethod
    def load(cls, path: Path, dense: ModelSpec) -> Self:
        """Read a table of this dense backbone; raises ConfigError naming the file."""
        try:
            table = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"no table of costs at '{path}': {error.strerror}") from error
        except ValidationError as error:
            raise ConfigError(
                f"'{path}' is no table of costs: {first_fault(error, 'it')}"
            ) from error
        if _shape(table.spec) != _shape(dense):
            raise ConfigError(
                f"'{path}' was measured with {table.spec.name} at {table.spec.image_size} px, and "
                f"this network has {dense.name} at {dense.image_size} px; measure again with: "
                "fieldfed-client costs"
            )
        return table

    def costs(self) -> UnitCosts:
        """In seconds."""
        each = self.dense_seconds / self.spec.depth
        heads = _by_count(self.heads, self.spec.heads[0])
        neurons = _by_count(self.neurons, self.spec.neurons[0])
        return UnitCosts(self.dense_seconds, each * heads, each * neurons, "time")


def _by_count(ratios: dict[int, float], most: int) -> npt.NDArray[np.float64]:
    """Savings (most+1,) of a backbone, over the dense, whose blocks all keep so many units."""
    known = sorted((ratios | {most: 1.0}).items())
    counts, values = (np.array(one, np.float64) for one in zip(*known, strict=True))
    saved = 1 - np.interp(np.arange(most + 1), counts, values)
    # fewer units never take longer
    return np.maximum.accumulate(np.maximum(saved, 0.0)[::-1])[::-1]


def _shape(spec: ModelSpec) -> tuple[object, ...]:
    return spec.name, spec.image_size, spec.options, spec.heads, spec.neurons


def cost_alike(spec: ModelSpec) -> bool:
    """Whether all blocks of a backbone cost the same, as those of a dense one do."""
    alike = len(set(spec.heads)) == len(set(spec.neurons)) == 1
    return alike and not spec.kept_tokens and not spec.linear_blocks


@lru_cache(maxsize=16)
def unit_costs(dense: ModelSpec) -> tuple[int, int, int]:
    """MACs of a dense backbone, of one head and of one neuron; building it to count is slow.

    Raises:
        ConfigError: its blocks do not cost alike.
    """
    # here, so that reading or showing a mask needs no torch
    from common.backbone import head_macs, macs, neuron_macs, tokens

    if dense.kept_tokens or dense.linear_blocks:
        raise ConfigError(
            "a MACs budget needs blocks that cost alike; prune first, then sample tokens or make "
            "attention linear, or give a budget of heads"
        )
    token_count = tokens(dense)
    return macs(dense), head_macs(dense, token_count), neuron_macs(dense, token_count)


def mac_costs(dense: ModelSpec) -> UnitCosts:
    """In multiply-accumulates; raises ConfigError where its blocks do not cost alike."""
    total, head, neuron = unit_costs(dense)
    most = max(dense.heads), max(dense.neurons)
    heads, neurons = (np.arange(count, -1, -1, dtype=np.float64) for count in most)
    return UnitCosts(total, head * heads, neuron * neurons, "MACs")
