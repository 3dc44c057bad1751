"""Noise that hides a farm: the Gaussian mechanism on what a farm sends, on the farm itself.

A vector is cut to a public L2 norm C and Gaussian noise of standard deviation sigma = z * C is
added to every number (Dwork and Roth, 2014, appendix A). What follows (coding, residuals, all that
the server does) can take nothing back. What it is worth is in common/accountant.py.

**Secret noise that can be repeated.** Noise from the run's seed could be subtracted by whoever
knows that seed. It comes from a key that never leaves the farm instead:

    stream = SHAKE-256(HMAC-SHA256(key, what is answered | parameters | SHA-256(values)))

A farm that does the same work twice, after a crash say, sends the same noise with the same values,
so that nothing is gained by asking again. Other values or parameters have other noise: the
difference of two replies shows no difference of values. The guarantee is computational, as
good as SHAKE-256 and the secrecy of the key.

**Floating point.** Sums of floating-point numbers and noise have gaps that betray the summand
(Mironov, 2012). Here values are truncated towards zero, which lengthens nothing, to whole multiples
of a grid step g, the power of two with sigma / 2^17 < g <= sigma / 2^16; noise is rounded to the
same grid; both are added as integers, exactly. That is the rounding of (integer + Gaussian), so it
is as private as the Gaussian itself, and every multiple of g can come of any values. The draws are
made without rejection (Box and Muller, 1958), with 53 significant bits at every radius. Their last
bits are what remains of the attack: they move the edges of a grid step by less than 2^-30 of its
width, which epsilon does not count.
"""

import hashlib
import hmac
import json
import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import QualityError

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]

KEY_BYTES = 32
GRID_BITS = 16
SHIFT = 6.0
"""Noisy scores are lifted by so many sigma: one in a billion is still below 0, and is cut there."""
_SAFETY = 1 - 1e-9  # what the rounding of a norm may hide
_PAIRS_AT_ONCE = 1 << 18


def privatise(values: Floats, *, clip: float | None, noise: float, key: bytes, what: str) -> Floats:
    """An update, cut to length ``clip`` and hidden in noise; call it once, on the fresh change.

    Args:
        values: fp32 (n,).
        clip: C; ``None``: not cut, and no noise either.
        noise: z, the noise multiplier; 0: cut only.
        key: the farm's secret, ``KEY_BYTES`` long.
        what: the part of which reply this is, so that two of them never share their noise.

    Returns:
        fp32 (n,).

    Raises:
        QualityError: a number is not finite.
    """
    if clip is None:
        return values
    return _release(values, clip, noise, key, what).astype(np.float32)


def privatise_scores(shares: Floats, *, clip: float, noise: float, key: bytes, what: str) -> Floats:
    """Scores that sum to 1, hidden in noise, as scores that sum to 1 again.

    What is released is how far the shares are from equal ones, cut to an L2 norm of ``clip`` /
    sqrt(U), at most 1: so ``clip`` is the coefficient of variation (deviation over mean) that
    survives. Of the result only order and spacing mean anything: it is an increasing affine
    function, the same for every farm, of shares plus noise, so a mean over farms ranks units as
    the mean of their shares does, up to noise.

    Args:
        shares: fp32 (U,), not negative, sum 1.
        clip: coefficient of variation.
        noise: z; 0: the shares as they are.
        key: as in :func:`privatise`.
        what: as there.

    Returns:
        fp32 (U,), not negative, sum 1.

    Raises:
        QualityError: a number is not finite.
    """
    if noise == 0:
        return shares
    count = len(shares)
    radius = min(clip / math.sqrt(count), 1.0)
    noisy = _release(shares.astype(np.float64) - 1 / count, radius, noise, key, what)
    # true deviations sum to 0, so the common part is noise alone
    lifted = noisy - noisy.mean() + 1 / count + SHIFT * noise * radius
    positive = np.maximum(lifted, 0)
    return np.asarray(positive / positive.sum(), dtype=np.float32)


def length(values: npt.NDArray[np.floating]) -> float:
    """L2 norm, in float64."""
    exact = values.astype(np.float64)
    return float(np.sqrt(np.square(exact).sum()))


def _release(
    values: npt.NDArray[np.floating], radius: float, noise: float, key: bytes, what: str
) -> Doubles:
    """Cut to ``radius``, with noise of standard deviation ``noise * radius``: float64 (n,)."""
    norm = length(values)
    if not math.isfinite(norm):
        raise QualityError("what would be sent is not finite: local training has diverged")
    cut = values.astype(np.float64)
    if norm > radius * _SAFETY:
        cut *= radius * _SAFETY / norm
    if noise == 0:
        return cut
    sigma = noise * radius
    step = 2.0 ** (math.frexp(sigma)[1] - 1 - GRID_BITS)
    seed = _seed(key, what, (radius, noise), values)
    drawn = np.rint(normals(seed, len(cut)) * (sigma / step))
    return np.asarray((np.trunc(cut / step) + drawn) * step)


def _seed(
    key: bytes, what: str, parameters: tuple[float, float], values: npt.NDArray[np.floating]
) -> bytes:
    plain = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    text = json.dumps([what, *map(float.hex, parameters), plain])
    return hmac.digest(key, text.encode(), "sha256")


def normals(seed: bytes, count: int) -> Doubles:
    """Standard normal numbers from a secret seed, float64 (count,): as unpredictable as it is."""
    parts = []
    for number, start in enumerate(range(0, count, 2 * _PAIRS_AT_ONCE)):
        pairs = min(-(-(count - start) // 2), _PAIRS_AT_ONCE)
        stream = hashlib.shake_256(seed + number.to_bytes(8, "little")).digest(24 * pairs)
        high, low, turn = np.frombuffer(stream, "<u8").reshape(pairs, 3).T
        # 128 bits, so that even the smallest of them has 53 significant ones: see Mironov above
        uniform = (high + (low + 0.5) * 2.0**-64) * 2.0**-64
        radius = np.sqrt(np.maximum(-2 * np.log(uniform), 0))
        angle = (turn >> np.uint64(11)) * (2 * np.pi * 2.0**-53)
        parts.append(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1))
    return np.concatenate([*parts, np.empty(0)])[:count]
