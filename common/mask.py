"""Which heads and neurons are kept: masks, budgets, and the choice of a mask by score.

A mask names units by their index in the dense backbone, so masks of different prune events
compare; ``Keep`` names them by their index in the model that is being cut. Choosing is greedy
within each kind of unit. Heads and neurons are not ranked on one scale (a head costs as much as
139 neurons of a ViT-S and would always lose); ``heads_per_neurons`` couples their drop shares.

Shapes: H_l heads and M_l neurons of block l.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from common.errors import ConfigError, ModelError, ProtocolError, RejectReason
from common.scores import UnitScores
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

    Raises:
        ProtocolError: a block keeps nothing, or an index is out of range, repeated or unsorted.
    """

    heads: Blocks
    neurons: Blocks
    dense_heads: tuple[int, ...]
    dense_neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        _require_blocks(self.heads, self.dense_heads, "heads")
        _require_blocks(self.neurons, self.dense_neurons, "neurons")
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


def _require_blocks(blocks: Blocks, dense: Sequence[int], kind: str) -> None:
    if not blocks or len(blocks) != len(dense):
        raise ProtocolError(f"a mask names {len(blocks)} blocks of {kind}, {len(dense)} expected")
    for number, (kept, count) in enumerate(zip(blocks, dense, strict=True)):
        index = np.asarray(kept, dtype=np.int64)
        if not kept or index[0] < 0 or index[-1] >= count or (np.diff(index) <= 0).any():
            raise ProtocolError(
                f"the mask's {kind} of block {number} must be ascending, at least one, "
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


# --- budget ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What may be kept, relative to the DENSE backbone: give ``heads_kept`` or ``macs_kept``.

    Args:
        heads_kept: share of heads, in (0, 1]; neurons stay.
        macs_kept: share of multiply-accumulates, in (0, 1].
        heads_per_neurons: share of heads dropped per share of neurons dropped, for ``macs_kept``.
        min_heads: kept per block at least (all, where a block has fewer).
        min_neurons: likewise.

    Raises:
        ConfigError: a value out of range, or not exactly one budget.
    """

    heads_kept: float | None = None
    macs_kept: float | None = None
    heads_per_neurons: float = 0.7
    min_heads: int = 1
    min_neurons: int = 8

    def __post_init__(self) -> None:
        if (self.heads_kept is None) == (self.macs_kept is None):
            raise ConfigError("a budget needs either heads_kept or macs_kept, and not both")
        for name in ("heads_kept", "macs_kept"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {share}")
        if not 0 < self.heads_per_neurons < math.inf:
            raise ConfigError(f"heads_per_neurons must be above 0, not {self.heads_per_neurons}")
        if self.min_heads < 1 or self.min_neurons < 1:
            raise ConfigError("min_heads and min_neurons must be at least 1 per block")


@dataclass(frozen=True)
class _Candidates:
    """Units of one kind that may go, as (block, position) in the order in which they go."""

    order: list[tuple[int, int]]
    left: int
    dense: int

    @property
    def dropped(self) -> int:
        """Units that earlier events have dropped."""
        return self.dense - self.left


def _candidates(scores: Iterable[npt.NDArray[np.float32]], minimum: int, dense: int) -> _Candidates:
    """All but each block's best ``minimum``, lowest score first; of equals the later goes first."""
    order: list[tuple[float, int, int]] = []
    left = 0
    for block, values in enumerate(scores):
        left += len(values)
        best_first = np.argsort(-values.astype(np.float64), kind="stable")
        order += [(float(values[i]), -block, -int(i)) for i in best_first[minimum:]]
    return _Candidates([(-block, -i) for _, block, i in sorted(order)], left, dense)


def choose_mask(scores: UnitScores, current: Mask, dense: ModelSpec, budget: Budget) -> Mask:
    """The mask within ``current`` that keeps the most score under a budget.

    With ``heads_kept`` exactly ``round(share * dense heads)`` heads stay. With ``macs_kept`` the
    cost never exceeds the budget, and one more unit would: every number of dropped heads implies
    the fewest neurons that must go too, and the pair closest to ``heads_per_neurons`` is taken.
    Where ``current`` already meets the budget it is returned unchanged.

    Args:
        scores: of the units of the current model, so of ``current``'s shape.
        current: what is left now.
        dense: the spec that the budget refers to.
        budget: shares and per-block minimums.

    Raises:
        ConfigError: the per-block minimums do not allow the budget.
        ModelError: ``current`` is not a mask of ``dense``.
        ProtocolError: the scores are for other units, or not finite.
    """
    spec = current.apply_to(dense)
    _require_scores(scores, spec)
    heads = _candidates(scores.heads, budget.min_heads, sum(dense.heads))
    neurons = _candidates(scores.neurons, budget.min_neurons, sum(dense.neurons))
    if budget.heads_kept is not None:
        drop_heads, drop_neurons = _heads_to_drop(heads, budget), 0
    else:
        drop_heads, drop_neurons = _units_to_drop(heads, neurons, dense, budget)
    return Mask(
        _without(current.heads, heads.order[:drop_heads]),
        _without(current.neurons, neurons.order[:drop_neurons]),
        current.dense_heads,
        current.dense_neurons,
    )


def _require_scores(scores: UnitScores, spec: ModelSpec) -> None:
    shapes = tuple(map(len, scores.heads)), tuple(map(len, scores.neurons))
    if shapes != (spec.heads, spec.neurons):
        raise ProtocolError(
            f"scores for {shapes[0]} heads per block, the model has {spec.heads}, or the neurons "
            "differ; score the model that is to be cut",
            RejectReason.SHAPE,
        )
    if not all(np.isfinite(values).all() for values in (*scores.heads, *scores.neurons)):
        raise ProtocolError("unit scores are not finite", RejectReason.NOT_FINITE)


def _heads_to_drop(heads: _Candidates, budget: Budget) -> int:
    assert budget.heads_kept is not None
    target = round(budget.heads_kept * heads.dense)
    drop = max(heads.left - target, 0)
    if drop > len(heads.order):
        raise ConfigError(
            f"heads_kept={budget.heads_kept:g} leaves {target} heads, but min_heads="
            f"{budget.min_heads} per block holds {heads.left - len(heads.order)}; raise heads_kept"
        )
    return drop


@lru_cache(maxsize=16)
def unit_costs(dense: ModelSpec) -> tuple[int, int, int]:
    """MACs of a dense backbone, of one head and of one neuron; building it to count is slow."""
    # here, so that reading or showing a mask needs no torch
    from common.backbone import head_macs, macs, neuron_macs, tokens

    token_count = tokens(dense)
    return macs(dense), head_macs(dense, token_count), neuron_macs(dense, token_count)


def _units_to_drop(
    heads: _Candidates, neurons: _Candidates, dense: ModelSpec, budget: Budget
) -> tuple[int, int]:
    assert budget.macs_kept is not None
    total, head_cost, neuron_cost = unit_costs(dense)
    now = total - heads.dropped * head_cost - neurons.dropped * neuron_cost
    excess = now - math.floor(budget.macs_kept * total)
    if excess <= 0:
        return 0, 0
    pairs = [
        (h, max(-(-(excess - h * head_cost) // neuron_cost), 0))
        for h in range(min(len(heads.order), -(-excess // head_cost)) + 1)
    ]
    possible = [(h, n) for h, n in pairs if n <= len(neurons.order)]
    if not possible:
        least = now - len(heads.order) * head_cost - len(neurons.order) * neuron_cost
        raise ConfigError(
            f"macs_kept={budget.macs_kept:g} cannot be met: min_heads={budget.min_heads} and "
            f"min_neurons={budget.min_neurons} per block hold {least / total:.3f} of the dense "
            "MACs; raise macs_kept or lower the minimums"
        )

    def imbalance(pair: tuple[int, int]) -> float:
        head_share = (heads.dropped + pair[0]) / heads.dense
        neuron_share = (neurons.dropped + pair[1]) / neurons.dense
        return abs(head_share - budget.heads_per_neurons * neuron_share)

    return min(possible, key=imbalance)


def _without(blocks: Blocks, dropped: list[tuple[int, int]]) -> Blocks:
    gone = set(dropped)
    return tuple(
        tuple(unit for position, unit in enumerate(kept) if (block, position) not in gone)
        for block, kept in enumerate(blocks)
    )
