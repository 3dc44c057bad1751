"""Update coding: a change of the trainable tensors as ONE flat array of bytes.

Shapes: n numbers, k = ceil(n / block) blocks, m bytes. All numbers are little-endian, because
every machine in the field is; a big-endian one converts.

    offset  bytes  field     why it is there
    0       4      magic     b"FFUP": bytes that are something else are told apart at once
    4       2      version   uint16, now 1: another version is refused by name, never guessed at
    6       1      bits      uint8, 2, 4, 8 or 32 per number
    7       1      reserved  0: one value has one encoding, so that digests of payloads agree
    8       4      block     uint32, 1..65536: numbers that share one scale; bounds every slice;
                             a whole number of bytes
    12      8      count     uint64, n: checked against the layout before anything is allocated
    20      32     base      sha256 of the backbone the change is added to: a change of another
                             backbone has the same shape and would be wrong silently
    52      4*k    scales    float32, finite, >= 0; absent with bits=32
    ...            values    codes as common/quantise.py packs them, ceil(n * bits / 8) bytes, or
                             4*n bytes of float32 with bits=32

The scales come before the values so that numbers [start, stop) are found by arithmetic alone:
an aggregate reads a slice of each reply and never a whole one.

The canonical candidate is what the decoder yields: numbers are dequantised to fp32 and stored,
and only then added. A fused multiply-add would round once instead of twice, on some processors
only, and the digests of two farms would differ.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common import quantise
from common.errors import ModelError, ProtocolError, RejectReason

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Read: TypeAlias = Callable[[int, int], bytes]

Bits: TypeAlias = Literal[2, 4, 8, 32]

BITS: tuple[Bits, ...] = (2, 4, 8, 32)
DEFAULT_BITS: Bits = 8
"""Enough to round to the nearest; fewer need stochastic rounding."""
MAGIC = b"FFUP"
VERSION = 1
HEADER_BYTES = 52
MAX_BLOCK = 65536

_HEADER = struct.Struct("<4sHBBIQ32s")
_FLOAT = np.dtype("<f4")
_CHECKED_AT_ONCE = 1 << 20


# --- layout --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trainable tensors, in the order in which they are laid out flat."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers per tensor."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    @property
    def count(self) -> int:
        """Numbers in all, n."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Floats:
        """The named tensors as one array: fp32 (n,).

        Raises:
            ModelError: a tensor is missing or has another shape; names it.
        """
        flat = np.empty(self.count, dtype=np.float32)
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ModelError(f"tensor '{name}' must have shape {shape}, found {found}")
            values = tensors[name].detach().to("cpu", torch.float32)
            flat[start : start + size] = values.reshape(-1).numpy()
            start += size
        return flat

    def unflatten(self, flat: Floats) -> dict[str, Tensor]:
        """Inverse of :meth:`flatten`; the tensors may share memory with ``flat``.

        Raises:
            ProtocolError: ``flat`` is not fp32 (n,).
        """
        if flat.shape != (self.count,) or flat.dtype != np.float32:
            raise ProtocolError(
                f"a change of {self.count} fp32 numbers is expected, found {flat.dtype} "
                f"{flat.shape}; sender and receiver train different tensors",
                RejectReason.SHAPE,
            )
        # numbers that lie in a read-only buffer are copied: torch knows no read-only tensors
        tensor = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
        parts = torch.split(tensor, list(self.sizes))
        return {
            name: part.view(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }


def layout_of(model: nn.Module, names: Iterable[str]) -> Layout:
    """The layout of the named parameters of a model.

    Raises:
        ModelError: the model has no parameter of that name, or none was named.
    """
    known = dict(model.named_parameters())
    chosen = tuple(names)
    missing = [name for name in chosen if name not in known]
    if missing or not chosen:
        raise ModelError(f"the backbone has no trainable tensor {missing[:3] or 'at all'}")
    return Layout(chosen, tuple(tuple(known[name].shape) for name in chosen))


@torch.no_grad()
def apply(model: nn.Module, layout: Layout, flat: Floats) -> None:
    """Add decoded numbers, fp32 (n,), to the parameters in place.

    Raises:
        ModelError: a parameter is missing, has another shape or is not fp32.
        ProtocolError: ``flat`` does not fit the layout.
    """
    parameters = dict(model.named_parameters())
    changes = layout.unflatten(flat)
    for name, change in changes.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != change.shape or parameter.dtype != torch.float32:
            raise ModelError(f"the backbone has no fp32 tensor '{name}' of {tuple(change.shape)}")
    for name, change in changes.items():
        parameters[name].add_(change.to(parameters[name].device))


# --- encode --------------------------------------------------------------------------------------


def encode(
    values: Floats,
    base: str,
    *,
    bits: Bits = DEFAULT_BITS,
    block: int = 256,
    rng: np.random.Generator | None = None,
) -> Bytes:
    """Code the change of a backbone.

    Args:
        values: fp32 (n,), finite.
        base: digest of the backbone the change is added to, 64 hex digits.
        bits: 2, 4, 8: block-quantised; 32: exact.
        block: numbers that share one scale.
        rng: for stochastic rounding; None rounds to the nearest.

    Returns:
        uint8 (m,).

    Raises:
        ProtocolError: a number is not finite, or an argument is not as described.
    """
    if values.ndim != 1 or values.dtype != np.float32:
        raise ProtocolError("only a one-dimensional fp32 array can be coded", RejectReason.SHAPE)
    if not _possible(bits, block):
        raise ProtocolError(f"no update coding with {bits} bits in blocks of {block}")
    if not np.isfinite(values).all():
        raise ProtocolError("an update holds NaN or infinity", RejectReason.NOT_FINITE)
    header = _HEADER.pack(MAGIC, VERSION, bits, 0, block, values.size, _raw_digest(base))
    if bits == 32:
        body = values.astype(_FLOAT).tobytes()
    else:
        scales, codes = quantise.quantise(values, block, bits, rng)
        body = scales.astype(_FLOAT).tobytes() + quantise.pack(codes, bits)
    return np.frombuffer(header + body, dtype=np.uint8)


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
    base: str

    @property
    def blocks(self) -> int:
        """Blocks, k."""
        return -(-self.count // self.block)

    @property
    def values_at(self) -> int:
        """Offset of the first value, in bytes."""
        return HEADER_BYTES + (0 if self.bits == 32 else 4 * self.blocks)

    @property
    def payload_bytes(self) -> int:
        """Length of the whole payload, m."""
        return self.values_at + quantise.packed_bytes(self.count, self.bits)


def read_header(payload: Bytes | bytes) -> Header:
    """Read the first ``HEADER_BYTES`` bytes; the rest need not be there.

    Raises:
        ProtocolError: not a coded update (MALFORMED) or of another version (PROTOCOL).
    """
    if len(payload) < HEADER_BYTES:
        raise ProtocolError(f"a coded update has at least {HEADER_BYTES} bytes, not {len(payload)}")
    magic, version, bits, reserved, block, count, base = _HEADER.unpack(
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
    if reserved != 0 or not _possible(bits, block):
        raise ProtocolError(f"damaged update header: {bits} bits in blocks of {block}")
    return Header(bits, block, count, base.hex())


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
    """Decode a whole payload, uint8 (m,), to fp32 (count,).

    Raises:
        ProtocolError: with the reason: wrong magic or length (MALFORMED), version (PROTOCOL),
            base (FOREIGN_BASE), count (SHAPE), or a number that is not finite (NOT_FINITE).
    """
    header = read_header(payload)
    check_header(header, base=base, count=count, size=len(payload))
    return decode_slice(reader_of(payload), header, 0, count)


def check(payload: Bytes | bytes, *, base: str | None, count: int) -> None:
    """Refuse what :func:`decode` would refuse, without decoding anything.

    Raises:
        ProtocolError: as :func:`decode` does.
    """
    header = read_header(payload)
    check_header(header, base=base, count=count, size=len(payload))
    read = reader_of(payload)
    if header.bits != 32 and count:
        _scales(read, header, 0, header.blocks)
    at_once = header.block * max(1, _CHECKED_AT_ONCE // header.block)
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
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
    if start == stop:
        return np.empty(0, dtype=np.float32)
    if header.bits == 32:
        return _raw_slice(read, header, start, stop)
    first, last = start // header.block, -(-stop // header.block)
    begin, end = first * header.block, min(last * header.block, header.count)
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
    """Codes of numbers [begin, end); ``begin`` is the first of its block."""
    offset = header.values_at + begin * header.bits // 8
    data = _read_exactly(read, offset, quantise.packed_bytes(end - begin, header.bits))
    return quantise.unpack(data, header.bits, end - begin)


def _scales(read: Read, header: Header, first: int, last: int) -> Floats:
    data = _read_exactly(read, HEADER_BYTES + 4 * first, 4 * (last - first))
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
