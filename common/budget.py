"""What may be kept, and the choice of a mask by score.

Choosing is greedy within each kind of unit. Heads and neurons are not ranked on one scale (a head
costs as much as 139 neurons of a ViT-S and would always lose); ``heads_per_neurons`` couples their
drop shares.

Shapes: H_l heads and M_l neurons of block l.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.costs import CostTable, Savings, UnitCosts, mac_costs
from common.errors import ConfigError, ProtocolError, RejectReason
from common.mask import Blocks, Mask
from common.scores import UnitScores
from common.spec import ModelSpec

KINDS = ("heads_kept", "macs_kept", "time_kept")


@dataclass(frozen=True)
class Budget:
    """What may be kept, relative to the DENSE backbone: give one of the first three.

    Args:
        heads_kept: share of heads, in (0, 1]; neurons stay.
        macs_kept: share of multiply-accumulates, in (0, 1].
        time_kept: share of the time that a forward pass takes on the device of ``table``.
        heads_per_neurons: share of heads dropped per share of neurons dropped, but for
            ``heads_kept``.
        min_heads: kept per block at least (all, where a block has fewer).
        min_neurons: likewise.
        whole_attention: a block may lose all of its heads, whatever ``min_heads`` says; the best
            head of all stays.
        neuron_multiple: a block that loses neurons keeps a multiple of so many: hardware works in
            such portions, and a count between two of them is no faster than the next.
        table: of ``time_kept``.

    Raises:
        ConfigError: a value out of range, or not exactly one budget.
    """

    heads_kept: float | None = None
    macs_kept: float | None = None
    time_kept: float | None = None
    heads_per_neurons: float = 0.7
    min_heads: int = 1
    min_neurons: int = 8
    neuron_multiple: int = 1
    whole_attention: bool = False
    table: CostTable | None = None

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in KINDS}
        if sum(share is not None for share in shares.values()) != 1:
            raise ConfigError(f"a budget needs one of {', '.join(KINDS)}, and no other")
        if (self.time_kept is None) != (self.table is None):
            raise ConfigError("time_kept needs a table of costs, and no other budget does")
        if self.table is not None and self.whole_attention:
            raise ConfigError("no table of costs says what a block without heads takes")
        for name, share in shares.items():
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {share}")
        if not 0 < self.heads_per_neurons < math.inf:
            raise ConfigError(f"heads_per_neurons must be above 0, not {self.heads_per_neurons}")
        if self.min_heads < 1 or self.min_neurons < 1 or self.neuron_multiple < 1:
            raise ConfigError("min_heads, min_neurons and neuron_multiple must be at least 1")

    @property
    def cost_kept(self) -> float:
        """The share of what is counted that may be kept, where that is not heads."""
        share = self.macs_kept if self.time_kept is None else self.time_kept
        assert share is not None
        return share

    @property
    def setting(self) -> str:
        """In words."""
        name = next(name for name in KINDS if getattr(self, name) is not None)
        return f"{name}={getattr(self, name):g}"

    def costs_of(self, dense: ModelSpec) -> UnitCosts:
        """What is counted, of a dense backbone; raises ConfigError as :func:`mac_costs` does."""
        return mac_costs(dense) if self.table is None else self.table.costs()

    @property
    def heads_per_block(self) -> int:
        """What a block keeps at least."""
        return 0 if self.whole_attention else self.min_heads

    @property
    def neurons_per_block(self) -> int:
        """What a block keeps at least: ``min_neurons``, up to the next multiple."""
        return -(-self.min_neurons // self.neuron_multiple) * self.neuron_multiple


@dataclass(frozen=True)
class _Candidates:
    """Units of one kind that may go, as (block, positions) in the order in which they go."""

    order: Sequence[tuple[int, tuple[int, ...]]]
    left: int
    dense: int

    @property
    def dropped(self) -> int:
        """Units that earlier events have dropped."""
        return self.dense - self.left

    def sums(self) -> npt.NDArray[np.int64]:
        """Units that go with the first 0, 1, 2, ... entries of ``order``."""
        return np.cumsum([0, *(len(positions) for _, positions in self.order)])

    def first(self, count: int) -> list[tuple[int, int]]:
        """(block, position) of all units in the first entries of ``order``."""
        return [(block, one) for block, positions in self.order[:count] for one in positions]


def _candidates(
    scores: Iterable[npt.NDArray[np.float32]], least: int, dense: int, multiple: int = 1
) -> _Candidates:
    """All but each block's best ``least``, lowest score first; of equals the later goes first.

    They go one by one or, with ``multiple``, in the portions that leave multiples, which count by
    the mean score of their units.
    """
    order: list[tuple[float, int, int, tuple[int, ...]]] = []
    left = 0
    for block, values in enumerate(scores):
        left += len(values)
        worst_first = np.argsort(-values.astype(np.float64), kind="stable")[::-1]
        start = 0
        while len(values) - start > least:
            size = (len(values) - start) % multiple or multiple
            portion = worst_first[start : start + size]
            mean = float(values[portion].mean(dtype=np.float64))
            order.append((mean, -block, start, tuple(map(int, portion))))
            start += size
    return _Candidates([(-block, portion) for _, block, _, portion in sorted(order)], left, dense)


def choose_mask(scores: UnitScores, current: Mask, dense: ModelSpec, budget: Budget) -> Mask:
    """The mask within ``current`` that keeps the most score under a budget.

    With ``heads_kept`` exactly ``round(share * dense heads)`` heads stay. With the others the
    cost never exceeds the budget, and one more unit would (a portion of neurons is one): every
    number of dropped heads implies the fewest neurons that must go too, and the pair closest to
    ``heads_per_neurons`` is taken. Where ``current`` already meets the budget it is returned
    unchanged.

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
    heads = _candidates(scores.heads, budget.heads_per_block, sum(dense.heads))
    if len(heads.order) == heads.left:
        heads = replace(heads, order=heads.order[:-1])  # never all
    neurons = _candidates(
        scores.neurons, budget.neurons_per_block, sum(dense.neurons), budget.neuron_multiple
    )
    if budget.heads_kept is not None:
        drop_heads, drop_neurons = _heads_to_drop(heads, budget), 0
    else:
        drop_heads, drop_neurons = _units_to_drop(heads, neurons, spec, dense, budget)
    return Mask(
        _without(current.heads, heads.first(drop_heads)),
        _without(current.neurons, neurons.first(drop_neurons)),
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
            f"{budget.heads_per_block} per block holds {heads.left - len(heads.order)}; "
            "raise heads_kept"
        )
    return drop


def _units_to_drop(
    heads: _Candidates, neurons: _Candidates, spec: ModelSpec, dense: ModelSpec, budget: Budget
) -> tuple[int, int]:
    """How many entries of both orders go."""
    costs, share = budget.costs_of(dense), budget.cost_kept
    heads_saved = _saved(heads, spec.heads, costs.heads)
    neurons_saved = _saved(neurons, spec.neurons, costs.neurons)
    now, limit = costs.of(spec, dense), share * costs.total
    excess = now - limit
    if excess <= 0:
        return 0, 0
    enough = min(int(np.searchsorted(heads_saved, excess)), len(heads.order))
    pairs = [
        (h, int(np.searchsorted(neurons_saved, max(excess - heads_saved[h], 0))))
        for h in range(enough + 1)
    ]
    possible = [(h, n) for h, n in pairs if n <= len(neurons.order)]
    if not possible:
        least = now - float(heads_saved[-1]) - float(neurons_saved[-1])
        raise ConfigError(
            f"{budget.setting} cannot be met: min_heads={budget.heads_per_block} and "
            f"min_neurons={budget.min_neurons} per block hold {least / costs.total:.3f} of the "
            f"dense {costs.name}; raise it or lower the minimums"
        )
    sums = neurons.sums()

    def imbalance(pair: tuple[int, int]) -> float:
        head_share = (heads.dropped + pair[0]) / heads.dense
        neuron_share = (neurons.dropped + int(sums[pair[1]])) / neurons.dense
        return abs(head_share - budget.heads_per_neurons * neuron_share)

    return min(possible, key=imbalance)


def _saved(candidates: _Candidates, counts: Sequence[int], saved: Savings) -> Savings:
    """What is saved with the first 0, 1, 2, ... entries of an order."""
    left = list(counts)
    steps = np.zeros(len(candidates.order) + 1, saved.dtype)
    for at, (block, portion) in enumerate(candidates.order, start=1):
        before, left[block] = left[block], left[block] - len(portion)
        steps[at] = saved[left[block]] - saved[before]
    return np.cumsum(steps)


def _without(blocks: Blocks, dropped: list[tuple[int, int]]) -> Blocks:
    gone = set(dropped)
    return tuple(
        tuple(unit for position, unit in enumerate(kept) if (block, position) not in gone)
        for block, kept in enumerate(blocks)
    )
