"""Scores of many farms -> one score per unit.

Shapes: F farms, U units of one kind (all heads, or all neurons, over the blocks).

A farm's head score is its transferability T = importance * invariance^a, normalised to sum 1;
a neuron's is its importance. The consensus is (1 - kappa) * mean + kappa * max over farms: the
maximum keeps what a single species cannot do without. In the mean a farm weighs sqrt(examples),
at most three times the median of those, so that one large farm does not speak for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common import scores as unit_scores
from common.errors import ConfigError, ProtocolError, RejectReason, StateError
from common.scores import UnitScores
from common.spec import ModelSpec

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Rule: TypeAlias = Literal["mean", "median", "trimmed"]
Centre: TypeAlias = Callable[[Floats, Doubles], Doubles]

WEIGHT_CAP = 3.0
TRIM_SHARE = 0.2


# --- one farm ------------------------------------------------------------------------------------


def farm_scores(
    head_importance: Floats,
    head_mmd2: Floats,
    neuron_importance: Floats,
    tau: float,
    exponent: float,
    spec: ModelSpec,
) -> UnitScores:
    """What a farm sent, as scores of the units of ``spec``, each kind summing to 1.

    Args:
        head_importance: fp32 (sum of heads,), not negative.
        head_mmd2: fp32 (sum of heads,), unbiased, so it may be below 0.
        neuron_importance: fp32 (sum of neurons,), decoded, not negative.
        tau: scale of the invariance exp(-max(mmd2, 0) / tau).
        exponent: a; 0 is plain importance.
        spec: the backbone that was scored.

    Raises:
        ProtocolError: a length is wrong (SHAPE), a number is not finite (NOT_FINITE) or an
            importance is negative (MALFORMED).
    """
    heads, neurons = sum(spec.heads), sum(spec.neurons)
    importance = _checked("head_importance", head_importance, heads)
    mmd2 = _checked("head_mmd2", head_mmd2, heads, signed=True)
    transferability = importance * _relative_invariance(importance, mmd2, tau) ** exponent
    flat_neurons = _checked("neuron_importance", neuron_importance, neurons)
    return UnitScores.from_flat(
        _normalised(transferability).astype(np.float32),
        _normalised(flat_neurons).astype(np.float32),
        spec,
    )


def _relative_invariance(importance: Doubles, mmd2: Doubles, tau: float) -> Doubles:
    """Invariance over that of the most invariant head that matters: (U,).

    Scores are normalised, so a common factor is free; taking it out keeps a distant species from
    losing every head to underflow.
    """
    distance = np.maximum(mmd2, 0)
    matters = importance > 0
    nearest = distance[matters].min() if matters.any() else 0.0
    return np.asarray(unit_scores.invariance(distance - nearest, tau), dtype=np.float64)


def _checked(name: str, values: Floats, count: int, signed: bool = False) -> Doubles:
    if values.shape != (count,):
        raise ProtocolError(
            f"{name} has shape {values.shape}, the backbone has {count}", RejectReason.SHAPE
        )
    if not np.isfinite(values).all():
        raise ProtocolError(f"{name} holds NaN or infinity", RejectReason.NOT_FINITE)
    if not signed and (values < 0).any():
        raise ProtocolError(f"{name} holds a negative number")
    return values.astype(np.float64)


def _normalised(values: Doubles) -> Doubles:
    """Sum 1; a farm for which nothing matters has no preference."""
    total = values.sum()
    return values / total if total > 0 else np.full_like(values, 1 / values.size)


# --- many farms ----------------------------------------------------------------------------------


def consensus(
    farms: Sequence[tuple[int, UnitScores]], kappa: float, rule: Rule = "mean"
) -> UnitScores:
    """One score per unit; the order of the farms does not change a bit of it.

    Args:
        farms: (examples, scores) of each farm, all of the same backbone.
        kappa: share of the maximum over farms, 0..1; the rest is the centre.
        rule: the centre: weighted mean, or coordinate-wise median or mean without the lowest and
            highest fifth, both of which count every farm once and resist lying ones (kappa 0
            then, for the maximum does not).

    Returns:
        fp32 scores; with kappa above 0 they need not sum to 1.

    Raises:
        StateError: there is no farm.
        ConfigError: kappa is outside 0..1 or the rule is unknown.
        ProtocolError: farms scored different backbones.
    """
    if not farms:
        raise StateError("no farm sent scores; nothing can be pruned by consensus")
    if not 0 <= kappa <= 1 or rule not in _CENTRES:
        raise ConfigError(f"plan.kappa must be 0..1 and plan.consensus known: {kappa}, {rule}")
    ordered = sorted(farms, key=_sort_key)
    weights = _weights([examples for examples, _ in ordered])
    parts = [
        Part(weight, scores, scores) for weight, (_, scores) in zip(weights, ordered, strict=True)
    ]
    return pooled(parts, kappa, rule)


@dataclass(frozen=True)
class Part:
    """What one farm, or all farms of a region together, say: weight, mean and maximum of scores."""

    weight: float
    mean: UnitScores
    most: UnitScores


def pooled(parts: Sequence[Part], kappa: float, rule: Rule = "mean") -> UnitScores:
    """One score per unit from parts in an order of the caller's; arguments as :func:`consensus`.

    Means of means with the sums of their weights, and the maximum of maxima, are those over all
    farms: a network in regions agrees on what the same farms in one would. Median and trimmed mean
    are not made of such parts; over regions they are those of the regions' means.

    Raises:
        ProtocolError: farms scored different backbones.
    """
    shapes = {_shape(scores) for part in parts for scores in (part.mean, part.most)}
    if len(shapes) > 1:
        raise ProtocolError("farms scored different backbones", RejectReason.FOREIGN_MASK)
    weights = np.array([part.weight for part in parts], dtype=np.float64)
    shares = weights / weights.sum()
    most_H, most_N = (
        reduce(np.maximum, (flat(part.most) for part in parts))
        for flat in (UnitScores.flat_heads, UnitScores.flat_neurons)
    )
    heads = _merge([part.mean.flat_heads() for part in parts], most_H, shares, kappa, rule)
    neurons = _merge([part.mean.flat_neurons() for part in parts], most_N, shares, kappa, rule)
    head_counts, neuron_counts = shapes.pop()
    return UnitScores(_split(heads, head_counts), _split(neurons, neuron_counts))


def _shape(scores: UnitScores) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(map(len, scores.heads)), tuple(map(len, scores.neurons))


def _sort_key(farm: tuple[int, UnitScores]) -> tuple[int, bytes, bytes]:
    """Floating-point sums depend on their order: farms are added in one that is their own."""
    examples, scores = farm
    return examples, scores.flat_heads().tobytes(), scores.flat_neurons().tobytes()


def total_weight(examples: Sequence[int]) -> float:
    """What farms weigh together: sqrt(examples), each capped by *their* median."""
    return float(_weights(examples).sum())


def _weights(examples: Sequence[int]) -> Doubles:
    """sqrt(examples), capped: (F,)."""
    roots = np.sqrt(np.array(examples, dtype=np.float64))
    return np.asarray(np.minimum(roots, WEIGHT_CAP * np.median(roots)))


def _merge(
    rows: Sequence[Floats], most: Floats, shares: Doubles, kappa: float, rule: Rule
) -> Floats:
    """Scores (U,) of each farm, their maximum (U,), shares (F,) that sum to 1 -> (U,)."""
    merged = (1 - kappa) * _CENTRES[rule](np.stack(rows), shares) + kappa * most
    return np.asarray(merged, dtype=np.float32)


def _mean(scores: Floats, weights: Doubles) -> Doubles:
    """(F,U) and (F,) -> (U,), added in the order of the rows."""
    total = np.zeros(scores.shape[1], dtype=np.float64)
    for weight, row in zip(weights, scores, strict=True):
        total += weight * row
    return total


def _median(scores: Floats, _: Doubles) -> Doubles:
    return np.median(scores, axis=0).astype(np.float64)


def _trimmed(scores: Floats, _: Doubles) -> Doubles:
    farms = scores.shape[0]
    cut = max(1, int(TRIM_SHARE * farms)) if farms >= 3 else 0
    kept = np.sort(scores, axis=0)[cut : farms - cut]
    return np.asarray(kept.mean(axis=0, dtype=np.float64))


_CENTRES: dict[str, Centre] = {"mean": _mean, "median": _median, "trimmed": _trimmed}


def _split(flat: Floats, counts: tuple[int, ...]) -> tuple[Floats, ...]:
    return tuple(np.split(flat, np.cumsum(counts)[:-1]))


# --- figures over farms --------------------------------------------------------------------------


def rank_correlation(farms: Sequence[UnitScores]) -> float:
    """Do farms agree on heads? Mean of Spearman's rank correlation over pairs of farms, -1..1.

    Ties share their mean rank. A farm that ranks nothing (all heads equal) correlates 0 with
    every other. One farm alone agrees with itself: 1.
    """
    if len(farms) < 2:
        return 1.0
    unit_FU = np.stack([_standard_ranks(scores.flat_heads()) for scores in farms])
    gram_FF = unit_FU @ unit_FU.T
    return float(gram_FF[np.triu_indices(len(farms), k=1)].mean())


def _standard_ranks(values: Floats) -> Doubles:
    """Ranks with mean 0 and length 1, or all 0 when every value is the same: (U,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    centred = ranks - ranks.mean()
    length = np.sqrt(np.square(centred).sum())
    return np.asarray(centred / length if length > 0 else np.zeros_like(centred))


def median_tau(farms: Sequence[Floats]) -> float:
    """The scale of the invariance: median over heads of the shift that farms see on average.

    Args:
        farms: head_mmd2 of each farm, fp32 (U,), in any order.

    Returns:
        Above 0.

    Raises:
        StateError: there is no farm.
    """
    if not farms:
        raise StateError("no farm sent scores; the invariance scale cannot be chosen")
    # sorted per head, for the sum must not depend on the order of the farms
    mean_U = np.sort(np.stack(farms), axis=0).mean(axis=0, dtype=np.float64)
    return unit_scores.median_tau(mean_U)
