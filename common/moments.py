"""Second moments on their way from a farm to the server, which sums them to make up for a cut.

A farm sends, for the layers that a cut will touch, what common/surgery.py collects over its own fit
images: per layer the root mean square of each channel, fp32, and the correlations of each pair of
channels (about zero), fp16, the upper triangle row by row. Nothing in it is larger than the layers
of the backbone make it, and no number of tokens is claimed: the server counts every farm alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from common import codec
from common.backbone import tokens
from common.codec import Bytes
from common.errors import ProtocolError, RejectReason
from common.messages import Extent
from common.spec import ModelSpec
from common.surgery import Moments


def pack(moments: Moments, extent: Extent) -> Bytes:
    """As bytes; raises ValueError where nothing was seen."""
    return np.concatenate([_packed(one) for one in _chosen(moments, extent)])


def unpack(body: Bytes, spec: ModelSpec, extent: Extent, weight: float) -> Moments:
    """As sums over ``weight`` tokens; with extent "heads" nothing of layers that read neurons.

    Raises:
        ProtocolError: not what a farm sends of this backbone.
    """
    found = [weight * _unpacked(part, side) for part, side in _parts(body, spec, extent)]
    return Moments(tuple(found[: spec.depth]), tuple(found[spec.depth :]))


def check(body: Bytes, spec: ModelSpec, extent: Extent) -> None:
    """Raises ProtocolError as :func:`unpack` does, and takes no memory for it."""
    for part, side in _parts(body, spec, extent):
        _read(part, side)


def together(one: Moments | None, other: Moments) -> Moments:
    """Sums of both; who says nothing of neurons adds nothing there."""
    if one is None:
        return other
    return Moments(_summed(one.heads, other.heads), _summed(one.neurons, other.neurons))


def with_farms(
    source: Moments | None,
    sent: Iterable[Bytes],
    spec: ModelSpec,
    extent: Extent,
    images: Sequence[int],
) -> Moments | None:
    """Moments of the source images, if any, and of what farms sent.

    Every farm counts alike, as in the mean of their accuracies, so that a large one does not speak
    for all; together they count as many tokens as their images have.

    Args:
        source: sums over the source images; None: there are none.
        sent: by each farm, read one at a time.
        spec: of the backbone that they looked at.
        extent: which layers they sent.
        images: of each farm.

    Raises:
        ProtocolError: not what a farm sends of this backbone.
    """
    found, weight = source, fmean(images) * tokens(spec)
    for body in sent:
        found = together(found, unpack(body, spec, extent, weight))
    return found


def _summed(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not (one and other):
        return one or other
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _chosen(moments: Moments, extent: Extent) -> tuple[Tensor, ...]:
    return moments.heads + (moments.neurons if extent == "all" else ())


def _sides(spec: ModelSpec, extent: Extent) -> list[int]:
    heads = [count * spec.head_width + 1 for count in spec.heads]
    return heads + ([count + 1 for count in spec.neurons] if extent == "all" else [])


def _parts(body: Bytes, spec: ModelSpec, extent: Extent) -> Iterator[tuple[Bytes, int]]:
    """The bytes of each layer, and how many channels it has, with the constant."""
    sides = _sides(spec, extent)
    if len(body) != sum(map(_length, sides)):
        raise ProtocolError(
            f"moments of {len(body)} bytes, not {sum(map(_length, sides))}", RejectReason.SHAPE
        )
    at = 0
    for side in sides:
        yield body[at : at + _length(side)], side
        at += _length(side)


def _length(side: int) -> int:
    return 4 * side + 2 * (side * (side - 1) // 2)


def _packed(sums: Tensor) -> Bytes:
    tokens = float(sums[-1, -1])
    if tokens <= 0:
        raise ValueError("moments of no token")
    mean = sums.numpy() / tokens
    size = np.sqrt(np.maximum(mean.diagonal(), 0))
    scale = np.where(size > 0, size, 1.0)
    correlation = np.clip(mean / np.outer(scale, scale), -1, 1)
    upper = correlation[np.triu_indices(len(mean), 1)]
    parts = size.astype("<f4").tobytes(), upper.astype("<f2").tobytes()
    return np.frombuffer(b"".join(parts), np.uint8)


def _unpacked(body: Bytes, side: int) -> Tensor:
    size, upper = _read(body, side)
    mean = np.eye(side)
    mean[np.triu_indices(side, 1)] = upper
    mean = mean + mean.T - np.eye(side)
    mean *= np.outer(size, size)
    return torch.from_numpy(mean)


def _read(body: Bytes, side: int) -> tuple[codec.Floats, codec.Floats]:
    """Root mean squares (side,) and correlations, both fp32."""
    size = body[: 4 * side].view("<f4")
    upper = body[4 * side :].view("<f2").astype(np.float32)
    if not (np.isfinite(size).all() and np.isfinite(upper).all()):
        raise ProtocolError("moments are not finite", RejectReason.NOT_FINITE)
    if (size < 0).any() or size[-1] != 1 or (np.abs(upper) > 1).any():
        raise ProtocolError("moments that no images have", RejectReason.SHAPE)
    return size.astype(np.float32), upper
