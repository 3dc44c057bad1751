"""Where the numbers of a sparse update belong: m ascending places below n, 2 bytes each.

    counts   uint32 (r,)  places within each run of 65,536 numbers, r = ceil(n / 65,536)
    offsets  uint16 (m,)  places from the beginning of their run, ascending within it

The counts tell where the offsets of a run lie, so that a slice is found without reading the rest.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import ProtocolError

Indices: TypeAlias = npt.NDArray[np.int64]
Read: TypeAlias = Callable[[int, int], bytes]

RUN = 65_536


def packed_bytes(count: int, kept: int) -> int:
    """Length of ``kept`` packed places below ``count``."""
    return 4 * -(-count // RUN) + 2 * kept


def pack(places: Indices, count: int) -> bytes:
    """Ascending places (m,) below ``count`` as bytes."""
    runs = places // RUN
    counts = np.bincount(runs, minlength=-(-count // RUN))
    return counts.astype("<u4").tobytes() + (places - runs * RUN).astype("<u2").tobytes()


def find(read: Read, count: int, kept: int, start: int, stop: int) -> tuple[int, Indices]:
    """The places within [start, stop), and how many lie before them.

    Args:
        read: ``read(offset, length)`` yields bytes of what :func:`pack` made.
        count: n.
        kept: m.
        start: first number, below ``stop``.
        stop: one past the last number, at most n.

    Raises:
        ProtocolError: bytes are missing, or are no ascending places below n.
    """
    runs = -(-count // RUN)
    counts = _numbers(read, 0, runs, "<u4")
    room = np.minimum(RUN, count - RUN * np.arange(runs))
    if (counts > room).any() or counts.sum() != kept:
        raise ProtocolError("the places of the update are not as many as its header promises")
    ends = np.concatenate([[0], np.cumsum(counts)])
    first, last = start // RUN, -(-stop // RUN)
    before, behind = int(ends[first]), int(ends[last])
    offsets = _numbers(read, 4 * runs + 2 * before, behind - before, "<u2")
    places = offsets + RUN * np.repeat(np.arange(first, last), counts[first:last])
    # runs follow each other, so ascending within each is ascending in all
    if (np.diff(places) <= 0).any() or (places.size and places[-1] >= count):
        raise ProtocolError("the places of the update do not ascend")
    left, right = np.searchsorted(places, [start, stop])
    return before + int(left), places[left:right]


def _numbers(read: Read, offset: int, count: int, dtype: str) -> Indices:
    length = count * np.dtype(dtype).itemsize
    data = read(offset, length)
    if len(data) != length:
        raise ProtocolError("the update ends in the middle of its places")
    return np.frombuffer(data, dtype).astype(np.int64)
