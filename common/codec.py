"""Update coding: a change of the trainable tensors as ONE flat array of bytes.

Shapes: n numbers, of which m are kept, in k = ceil(m / block) blocks. All numbers are
little-endian, because every machine in the field is; a big-endian one converts.

    offset  bytes  field     why it is there
    0       4      magic     b"FFUP": bytes that are something else are told apart at once
    4       2      version   uint16, now 2: another version is refused by name, never guessed at
    6       1      bits      uint8, 2, 4, 8 or 32 per number
    7       1      rank      uint8, 0: numbers of named parameters; else of factors of that rank
                             (common/trainable.py), which have the same flat shape
    8       4      block     uint32, 1..65536: numbers that share one scale; bounds every slice;
                             a whole number of bytes
    12      8      count     uint64, n: checked against the layout before anything is allocated
    20      8      kept      uint64, m <= n: how many numbers follow; the others are 0
    28      32     base      sha256 of the backbone the change is added to: a change of another
                             backbone has the same shape and would be wrong silently
    60      ...    places    where they belong, as common/places.py packs it; absent with m = n
    ...     4*k    scales    float32, finite, >= 0; absent with bits=32
    ...            values    codes as common/quantise.py packs them, ceil(m * bits / 8) bytes, or
                             4*m bytes of float32 with bits=32

The values come last and in order so that numbers [start, stop) are found by arithmetic alone: an
aggregate reads a slice of each reply and never a whole one. Zeros are left out when that is
shorter, so one array of numbers has one encoding.

The canonical candidate is what the decoder yields: numbers are dequantised to fp32 and stored,
and only then added. A fused multiply-add would round once instead of twice, on some processors
only, and the digests of two farms would differ.
"""

import struct
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common import places, quantise
from common.errors import ProtocolError, RejectReason

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Read: TypeAlias = places.Read

Bits: TypeAlias = Literal[2, 4, 8, 32]

BITS: tuple[Bits, ...] = (2, 4, 8, 32)
DEFAULT_BITS: Bits = 8
"""Enough to round to the nearest; fewer need stochastic rounding."""
MAGIC = b"FFUP"
VERSION = 2
HEADER_BYTES = 60
MAX_BLOCK = 65536

_HEADER = struct.Struct("<4sHBBIQQ32s")
_FLOAT = np.dtype("<f4")
_CHECKED_AT_ONCE = 1 << 20


# --- encode --------------------------------------------------------------------------------------


def encode(
    values: Floats,
    base: str,
    *,
    bits: Bits = DEFAULT_BITS,
    block: int = 256,
    rng: np.random.Generator | None = None,
    top: float = 1.0,
    rank: int = 0,
) -> Bytes:
    """Code the change of a backbone.

    Args:
        values: fp32 (n,), finite.
        base: digest of the backbone the change is added to, 64 hex digits.
        bits: 2, 4, 8: block-quantised; 32: exact.
        block: numbers that share one scale.
        rng: for stochastic rounding; None rounds to the nearest.
        top: share of the numbers that is sent, the largest by magnitude; the others count as 0.
        rank: of the factors that the numbers belong to, 0..255; 0: they are plain parameters.

    Returns:
        uint8, a whole payload.

    Raises:
        ProtocolError: a number is not finite, or an argument is not as described.
    """
    if values.ndim != 1 or values.dtype != np.float32:
        raise ProtocolError("only a one-dimensional fp32 array can be coded", RejectReason.SHAPE)
    if not (_possible(bits, block) and 0 <= rank <= 255 and 0 < top <= 1):
        raise ProtocolError(
            f"no coding of the top {top:g} with {bits} bits in blocks of {block}, rank {rank}"
        )
    if not np.isfinite(values).all():
        raise ProtocolError("an update holds NaN or infinity", RejectReason.NOT_FINITE)
    if top < 1:
        values = np.where(_largest(values, top), values, np.float32(0))
    kept = np.flatnonzero(values.view(np.uint32))  # not +0: exact numbers keep the sign of -0
    header = Header(bits, block, values.size, kept.size, rank, base)
    dense = Header(bits, block, values.size, values.size, rank, base)
    if header.payload_bytes >= dense.payload_bytes:
        header, kept = dense, np.arange(values.size)
    where = b"" if header.dense else places.pack(kept, values.size)
    if not header.dense:
        values = values[kept]
    if bits == 32:
        body = values.astype(_FLOAT).tobytes()
    else:
        scales, codes = quantise.quantise(values, block, bits, rng)
        body = scales.astype(_FLOAT).tobytes() + quantise.pack(codes, bits)
    return np.frombuffer(_packed_header(header) + where + body, dtype=np.uint8)


def _largest(values: Floats, top: float) -> npt.NDArray[np.bool_]:
    """Which numbers are the largest share of all; of equal ones the first."""
    size = np.abs(values)
    wanted = max(1, round(top * values.size)) if values.size else 0
    if not 0 < wanted < values.size:
        return np.ones(values.size, dtype=np.bool_)
    limit = np.partition(size, values.size - wanted)[values.size - wanted]
    chosen: npt.NDArray[np.bool_] = size > limit
    equal = np.flatnonzero(size == limit)
    chosen[equal[: wanted - int(chosen.sum())]] = True
    return chosen


def _packed_header(header: "Header") -> bytes:
    return _HEADER.pack(
        *(MAGIC, VERSION, header.bits, header.rank, header.block, header.count, header.kept),
        _raw_digest(header.base),
    )


def _possible(bits: int, block: int) -> bool:
    """Whether there is a coding of so many bits whose blocks are whole bytes."""
    return bits in BITS and 1 <= block <= MAX_BLOCK and block * bits % 8 == 0


def _raw_digest(base: str) -> bytes:
    try:
        raw = bytes.fromhex(base)
    except ValueError:
        raw = b""
    if len(raw) != 32 or len(base) != 64:
        raise ProtocolError(f"a base digest is 64 hex digits, not '{base[:80]}'")
    return raw


# --- decode --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a payload says of itself."""

    bits: int
    block: int
    count: int
    kept: int
    rank: int
    base: str

    @property
    def dense(self) -> bool:
        """Whether every number is there."""
        return self.kept == self.count

    @property
    def blocks(self) -> int:
        """Blocks, k."""
        return -(-self.kept // self.block)

    @property
    def scales_at(self) -> int:
        """Offset of the first scale, in bytes."""
        return HEADER_BYTES + (0 if self.dense else places.packed_bytes(self.count, self.kept))

    @property
    def values_at(self) -> int:
        """Offset of the first value, in bytes."""
        return self.scales_at + (0 if self.bits == 32 else 4 * self.blocks)

    @property
    def payload_bytes(self) -> int:
        """Length of the whole payload."""
        return self.values_at + quantise.packed_bytes(self.kept, self.bits)


def largest_payload(count: int) -> int:
    """Bytes that an update of ``count`` numbers has at most, however it is coded."""
    return HEADER_BYTES + places.packed_bytes(count, count) + 8 * count


def read_header(payload: Bytes | bytes) -> Header:
    """Read the first ``HEADER_BYTES`` bytes; the rest need not be there.

    Raises:
        ProtocolError: not a coded update (MALFORMED) or of another version (PROTOCOL).
    """
    if len(payload) < HEADER_BYTES:
        raise ProtocolError(f"a coded update has at least {HEADER_BYTES} bytes, not {len(payload)}")
    magic, version, bits, rank, block, count, kept, base = _HEADER.unpack(
        bytes(payload[:HEADER_BYTES])
    )
    if magic != MAGIC:
        raise ProtocolError("not a coded update: it does not start with FFUP")
    if version != VERSION:
        raise ProtocolError(
            f"update coding version {version}, this program reads {VERSION}; "
            "install the same fieldfed version on both sides",
            RejectReason.PROTOCOL,
        )
    if not _possible(bits, block) or kept > count:
        raise ProtocolError(
            f"damaged update header: {bits} bits in blocks of {block}, {kept} of {count} numbers"
        )
    return Header(bits, block, count, kept, rank, base.hex())


def check_header(header: Header, *, base: str | None, count: int, size: int | None = None) -> None:
    """Check a header against what is expected, before anything is allocated.

    Args:
        header: of the payload.
        base: digest that the change must be added to; ``None``: any.
        count: numbers that the receiver's layout has.
        size: length of the payload in bytes, when known.

    Raises:
        ProtocolError: FOREIGN_BASE, SHAPE, or MALFORMED for a wrong length.
    """
    if base is not None and header.base != base:
        raise ProtocolError(
            f"the update changes backbone {header.base[:12]}, expected {base[:12]}",
            RejectReason.FOREIGN_BASE,
        )
    if header.count != count:
        raise ProtocolError(
            f"the update has {header.count} numbers, expected {count}", RejectReason.SHAPE
        )
    if size is not None and size != header.payload_bytes:
        raise ProtocolError(
            f"the update has {size} bytes, its header promises {header.payload_bytes}"
        )


def decode(payload: Bytes | bytes, *, base: str | None, count: int) -> Floats:
    """Decode a whole payload, uint8, to fp32 (count,).

    Raises:
        ProtocolError: with the reason: wrong magic or length (MALFORMED), version (PROTOCOL),
            base (FOREIGN_BASE), count (SHAPE), or a number that is not finite (NOT_FINITE).
    """
    header = read_header(payload)
    check_header(header, base=base, count=count, size=len(payload))
    return decode_slice(reader_of(payload), header, 0, count)


def check(payload: Bytes | bytes, *, base: str | None, count: int, rank: int = 0) -> None:
    """Refuse what :func:`decode` would refuse, and another rank, without decoding anything.

    Raises:
        ProtocolError: as :func:`decode` does.
    """
    header = read_header(payload)
    check_header(header, base=base, count=count, size=len(payload))
    if header.rank != rank:
        raise ProtocolError(
            f"the update is of rank {header.rank}, expected {rank}", RejectReason.SHAPE
        )
    read = reader_of(payload)
    if not header.dense:
        places.find(_places_of(read), count, header.kept, 0, count)
    if header.bits != 32 and header.kept:
        _scales(read, header, 0, header.blocks)
    at_once = header.block * max(1, _CHECKED_AT_ONCE // header.block)
    for start in range(0, header.kept, at_once):
        stop = min(start + at_once, header.kept)
        if header.bits == 32:
            _raw_slice(read, header, start, stop)
        else:
            _codes(read, header, start, stop)


def reader_of(payload: Bytes | bytes) -> Read:
    """A payload in memory as the ``read`` of :func:`decode_slice`."""
    return lambda offset, length: bytes(payload[offset : offset + length])


def decode_slice(read: Read, header: Header, start: int, stop: int) -> Floats:
    """Numbers [start, stop) of a payload: fp32 (stop - start,), equal to the slice of the whole.

    Reads and allocates for the blocks that the slice touches, whatever the payload's length.

    Args:
        read: ``read(offset, length)`` yields that many bytes of the payload.
        header: of the same payload.
        start: first number.
        stop: one past the last number.

    Raises:
        ProtocolError: the slice lies outside, bytes are missing, or numbers are not finite.
    """
    if not 0 <= start <= stop <= header.count:
        raise ProtocolError(
            f"no numbers {start}..{stop} in an update of {header.count}", RejectReason.SHAPE
        )
    if start == stop or header.dense:
        return _kept_slice(read, header, start, stop)
    first, where = places.find(_places_of(read), header.count, header.kept, start, stop)
    values = np.zeros(stop - start, dtype=np.float32)
    values[where - start] = _kept_slice(read, header, first, first + where.size)
    return values


def _places_of(read: Read) -> Read:
    return lambda offset, length: read(HEADER_BYTES + offset, length)


def _kept_slice(read: Read, header: Header, start: int, stop: int) -> Floats:
    """Kept numbers [start, stop)."""
    if start == stop:
        return np.empty(0, dtype=np.float32)
    if header.bits == 32:
        return _raw_slice(read, header, start, stop)
    first, last = start // header.block, -(-stop // header.block)
    begin, end = first * header.block, min(last * header.block, header.kept)
    scales = _scales(read, header, first, last)
    codes = _codes(read, header, begin, end)
    return quantise.dequantise(codes, scales, header.block)[start - begin : stop - begin]


def _raw_slice(read: Read, header: Header, start: int, stop: int) -> Floats:
    data = _read_exactly(read, header.values_at + 4 * start, 4 * (stop - start))
    values = np.frombuffer(data, dtype=_FLOAT).astype(np.float32)
    if not np.isfinite(values).all():
        raise ProtocolError("the update holds NaN or infinity", RejectReason.NOT_FINITE)
    return values


def _codes(read: Read, header: Header, begin: int, end: int) -> quantise.Codes:
    """Codes of kept numbers [begin, end); ``begin`` is the first of its block."""
    offset = header.values_at + begin * header.bits // 8
    data = _read_exactly(read, offset, quantise.packed_bytes(end - begin, header.bits))
    return quantise.unpack(data, header.bits, end - begin)


def _scales(read: Read, header: Header, first: int, last: int) -> Floats:
    data = _read_exactly(read, header.scales_at + 4 * first, 4 * (last - first))
    scales = np.frombuffer(data, dtype=_FLOAT).astype(np.float32)
    # the decoder yields finite numbers or refuses
    if not (np.isfinite(scales) & (scales <= quantise.largest_scale(header.bits))).all():
        raise ProtocolError("a scale of the update is not finite", RejectReason.NOT_FINITE)
    if (scales < 0).any():
        raise ProtocolError("a scale of the update is negative")
    return scales


def _read_exactly(read: Read, offset: int, length: int) -> bytes:
    data = read(offset, length)
    if len(data) != length:
        raise ProtocolError(f"the update ends at byte {offset + len(data)}, in the middle")
    return data
