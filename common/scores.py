"""Scores of units, and their coding for the uplink.

Importances are non-negative, sum to 1 over all neurons of a backbone and span orders of
magnitude; about half of the neurons get pruned, so the small ones must stay apart. They are
therefore coded on a logarithmic scale, one byte each. Little-endian layout of a coded array:

    offset 0   uint8    version, 1
    offset 1   float32  scale: the largest value
    offset 5   float32  step: octaves between neighbouring codes
    offset 9   uint8    one code per value: 0 is zero, c is scale * 2 ** (-step * (255 - c))

The step spans the values at hand, at most ``OCTAVES``; what lies further below the largest value
becomes zero. Every other value comes back within ``RELATIVE_ERROR``; order is never inverted.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, ProtocolError, RejectReason
from common.spec import ModelSpec

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

VERSION = 1
HEADER = struct.Struct("<Bff")
OCTAVES = 24.0
STEPS = 254
RELATIVE_ERROR = 2 ** (OCTAVES / STEPS / 2) - 1 + 1e-5
"""Half a step, 3.3 %, and what fp32 rounds (subnormal values excepted)."""


@dataclass(frozen=True, eq=False)
class UnitScores:
    """One score per unit of the current, maybe pruned, backbone: larger is kept rather.

    ``heads[l]`` is (H_l,) and ``neurons[l]`` is (M_l,), both float32.
    """

    heads: tuple[Floats, ...]
    neurons: tuple[Floats, ...]

    def flat_heads(self) -> Floats:
        """All head scores in block order, (U,)."""
        return np.concatenate(self.heads)

    def flat_neurons(self) -> Floats:
        """All neuron scores in block order, (V,)."""
        return np.concatenate(self.neurons)

    @classmethod
    def from_flat(cls, heads: Floats, neurons: Floats, spec: ModelSpec) -> "UnitScores":
        """Split (U,) and (V,) into the blocks of ``spec``.

        Raises:
            ProtocolError: the lengths are not those of the spec, or a score is not finite.
        """
        return cls(
            _split(heads, spec.heads, "head scores"),
            _split(neurons, spec.neurons, "neuron scores"),
        )


def _split(flat: Floats, counts: tuple[int, ...], what: str) -> tuple[Floats, ...]:
    if flat.shape != (sum(counts),):
        raise ProtocolError(
            f"{what} of shape {flat.shape}, but the backbone has {sum(counts)} such units; "
            "score the backbone that the round names",
            RejectReason.SHAPE,
        )
    if not np.isfinite(flat).all():
        raise ProtocolError(f"{what} hold a value that is not finite", RejectReason.NOT_FINITE)
    bounds = np.cumsum((0, *counts))
    return tuple(flat[a:b].astype(np.float32) for a, b in pairwise(bounds))


def encode_neurons(flat: Floats) -> Codes:
    """Code importances (V,) as ``HEADER.size + V`` bytes.

    Raises:
        ProtocolError: not one-dimensional, or a value is negative or not finite.
    """
    if flat.ndim != 1:
        raise ProtocolError(
            f"neuron scores must have one dimension, not {flat.ndim}", RejectReason.SHAPE
        )
    values = flat.astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ProtocolError(
            "neuron scores must be finite and not negative", RejectReason.NOT_FINITE
        )
    positive = values > 0
    codes = np.zeros(values.shape, np.uint8)
    scale, step = 0.0, 0.0
    if positive.any():
        scale = float(values.max())
        octaves = np.log2(scale) - np.log2(values[positive])
        near = octaves <= OCTAVES
        step = float(np.float32(octaves[near].max() / STEPS))
        down = np.rint(octaves / step) if step > 0 else np.zeros_like(octaves)
        codes[positive] = np.where(near, 255 - np.minimum(down, STEPS), 0)
    header = np.frombuffer(HEADER.pack(VERSION, scale, step), np.uint8)
    return np.concatenate([header, codes])


def decode_neurons(coded: Codes, count: int) -> Floats:
    """Inverse of :func:`encode_neurons` up to its error: (HEADER.size + count,) -> (count,).

    Raises:
        ProtocolError: wrong type, length or version, or a header out of range.
    """
    if coded.dtype != np.uint8 or coded.shape != (HEADER.size + count,):
        raise ProtocolError(
            f"coded neuron scores are {coded.dtype} of shape {coded.shape}, expected uint8 of "
            f"shape ({HEADER.size + count},) for {count} neurons",
            RejectReason.SHAPE,
        )
    version, scale, step = HEADER.unpack(coded[: HEADER.size].tobytes())
    if version != VERSION:
        raise ProtocolError(
            f"neuron scores are coded in version {version}, this program reads {VERSION}; "
            "update the older side",
            RejectReason.PROTOCOL,
        )
    codes = coded[HEADER.size :]
    in_range = np.isfinite(scale) and scale >= 0 and 0 <= step <= OCTAVES / STEPS * 1.001
    if not in_range or (scale == 0 and codes.any()):
        raise ProtocolError(
            f"coded neuron scores carry an impossible header (scale {scale}, step {step})"
        )
    values = (scale * np.exp2(-step * (255 - np.arange(256.0)))).astype(np.float32)
    values[0] = 0.0
    decoded: Floats = values[codes]
    return decoded


def invariance(mmd2: npt.NDArray[Any], tau: float) -> npt.NDArray[Any]:
    """exp(-max(mmd2, 0) / tau), elementwise: 1 where a head does not tell the species apart.

    Raises:
        ConfigError: tau is not positive.
    """
    if not tau > 0:
        raise ConfigError(f"tau must be positive, not {tau}")
    return np.asarray(np.exp(-np.maximum(mmd2, 0) / tau))


def median_tau(mmd2: npt.NDArray[Any]) -> float:
    """The default tau: the median over heads, kept positive where most heads agree."""
    return max(float(np.median(np.maximum(mmd2, 0))), 1e-6)
