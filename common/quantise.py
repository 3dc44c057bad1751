"""Numbers as a few bits each: blocks share one scale, QSGD (Alistarh et al., 2017) with max-norm.

With b bits a number x of a block with scale s = max|x| / L, L = 2^(b-1) - 1, rounded up to fp32, is
sent as an integer q in -L..L and read as fp32(q * s):

    nearest      q = round half to even(x / s): at most s / 2 away
    stochastic   q = floor(x / s + u), u uniform in [0, 1): less than s away, and x on average

Both up to one fp32 rounding. Rounding s up keeps |q| <= L without clipping, in blocks of subnormal
numbers too. -L - 1 is refused: the code is symmetric. Codes of 4 and 2 bits lie several to a byte,
the first in the lowest bits; bits behind the last number are 0.
"""

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import ProtocolError

Floats: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.int8]
FewBits: TypeAlias = Literal[2, 4, 8]

FEW_BITS: tuple[FewBits, ...] = (2, 4, 8)


def levels(bits: int) -> int:
    """L, the largest code."""
    return int(2 ** (bits - 1) - 1)


def largest_scale(bits: int) -> np.float32:
    """The largest scale whose L-fold is still finite."""
    return np.float32(
        np.nextafter(np.float32(np.finfo(np.float32).max / levels(bits)), np.float32(0))
    )


def quantise(
    values: Floats, block: int, bits: int = 8, rng: np.random.Generator | None = None
) -> tuple[Floats, Codes]:
    """Scales fp32 (k,) and codes int8 (n,) of finite values (n,), k = ceil(n / block).

    Args:
        values: to be coded.
        block: numbers that share one scale.
        bits: per code.
        rng: draws u of stochastic rounding; None rounds to the nearest.
    """
    top, blocks = levels(bits), -(-values.size // block)
    padded = np.zeros((blocks, block), dtype=np.float32)
    padded.reshape(-1)[: values.size] = values
    exact = np.abs(padded).max(axis=1, initial=0).astype(np.float64) / top
    scales = exact.astype(np.float32)
    with np.errstate(over="ignore"):  # of the largest fp32 number, which is exact and stays
        above = np.nextafter(scales, np.float32(np.inf))
    scales = np.where(scales < exact, above, scales)
    scales = np.minimum(scales, largest_scale(bits))
    padded /= np.where(scales == 0, np.float32(1), scales)[:, None]
    if rng is None:
        np.rint(padded, out=padded)
    else:
        padded = np.floor(padded + rng.random(padded.shape)).astype(np.float32)
    # Only blocks at the very end of the fp32 range, whose scale was bounded, need the clip.
    np.clip(padded, -top, top, out=padded)
    return scales, padded.astype(np.int8).reshape(-1)[: values.size]


def dequantise(codes: Codes, scales: Floats, block: int) -> Floats:
    """fp32 (n,) of codes (n,) whose first is the first of its block."""
    values = codes.astype(np.float32)
    whole = values.size // block * block
    values[:whole].reshape(-1, block)[...] *= scales[: whole // block, None]
    values[whole:] *= scales[-1]
    return values


def packed_bytes(count: int, bits: int) -> int:
    """Length of ``count`` packed codes."""
    return -(-count * bits // 8)


def pack(codes: Codes, bits: int) -> bytes:
    """Codes (n,) as bytes, 8 / bits to a byte."""
    if bits == 8:
        return codes.tobytes()
    each = 8 // bits
    padded = np.zeros((-(-codes.size // each), each), np.uint8)
    padded.reshape(-1)[: codes.size] = codes.view(np.uint8) & (2**bits - 1)
    shifts = np.arange(each, dtype=np.uint8) * bits
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(padded << shifts, axis=1)
    return packed.tobytes()


def unpack(data: bytes, bits: int, count: int) -> Codes:
    """Inverse of :func:`pack`: int8 (count,) from ``packed_bytes(count, bits)`` bytes.

    Raises:
        ProtocolError: a code is -L - 1, or the bits behind the last number are not 0.
    """
    if bits == 8:
        codes = np.frombuffer(data, np.int8)
    else:
        each = 8 // bits
        shifts = np.arange(each, dtype=np.uint8) * bits
        raw = (np.frombuffer(data, np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
        if raw.reshape(-1)[count:].any():
            raise ProtocolError("the update has bits behind its last number")
        # sign-extended: shifted to the top of the byte and back as a signed number
        spare = np.uint8(8 - bits)
        codes = (raw.reshape(-1)[:count] << spare).view(np.int8) >> spare.astype(np.int8)
    top = levels(bits)
    if count and codes.min() < -top:
        raise ProtocolError(f"the update holds {-top - 1}, the code is -{top}..{top}")
    return codes
