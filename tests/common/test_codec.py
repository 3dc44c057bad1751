"""Update coding: exact bytes, bounds, slices, and what damaged bytes may do."""

import contextlib
import struct
import tracemalloc
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from common import codec, quantise
from common.errors import ModelError, ProtocolError, RejectReason
from common.layout import add, layout_of
from common.quantise import FewBits

Floats = npt.NDArray[np.float32]

BASE = "ab" * 32
FLOATS = arrays(
    np.float32,
    st.integers(0, 700),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
)
SMALL = st.floats(-1, 1, width=32)
BLOCKS = st.sampled_from([1, 2, 3, 64, 256, 1000])


def random_values(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def scales_of(payload: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    header = codec.read_header(payload)
    return np.frombuffer(payload.tobytes()[header.scales_at : header.values_at], np.float32)


def scale_of_each(payload: npt.NDArray[np.uint8], values: Floats) -> npt.NDArray[np.float64]:
    """The scale that each number was coded with; 0 for those left out."""
    header = codec.read_header(payload)
    scales = np.zeros(values.size)
    there = np.ones(values.size, np.bool_) if header.dense else values.view(np.uint32) != 0
    scales[there] = np.repeat(scales_of(payload), header.block)[: header.kept]
    return scales


# --- round trips ---------------------------------------------------------------------------------


@given(FLOATS, BLOCKS)
def test_eight_bits_round_trip_within_half_a_scale(values: Floats, block: int) -> None:
    payload = codec.encode(values, BASE, block=block)
    decoded = codec.decode(payload, base=BASE, count=values.size)
    scale = scale_of_each(payload, values)
    # one rounding to fp32 in the quotient and one in the product, on top of half a step
    slack = np.abs(values.astype(np.float64)) * 2.0**-22
    assert (np.abs(decoded.astype(np.float64) - values) <= scale / 2 + slack).all()


@given(FLOATS, st.sampled_from([4, 64, 256, 1000]), st.sampled_from([2, 4, 8]), st.booleans())
def test_few_bits_round_trip_within_half_a_scale_or_a_whole_one(
    values: Floats, block: int, bits: FewBits, stochastic: bool
) -> None:
    rng = np.random.default_rng(1) if stochastic else None
    payload = codec.encode(values, BASE, bits=bits, block=block, rng=rng)
    assert payload.size == codec.read_header(payload).payload_bytes
    decoded = codec.decode(payload, base=BASE, count=values.size)
    codec.check(payload, base=BASE, count=values.size)
    scale = scale_of_each(payload, values)
    slack = np.abs(values.astype(np.float64)) * 2.0**-22
    limit = scale * (1.0 if stochastic else 0.5) + slack
    assert (np.abs(decoded.astype(np.float64) - values) <= limit).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_right_on_average(bits: FewBits) -> None:
    values = random_values(64)
    rng, draws = np.random.default_rng(0), 4000
    total = np.zeros(64)
    for _ in range(draws):
        payload = codec.encode(values, BASE, bits=bits, block=64, rng=rng)
        total += codec.decode(payload, base=BASE, count=64)
    # the standard deviation of one draw is at most half a scale; five of the mean's
    slack = 5 * 0.5 * float(scales_of(payload)[0]) / draws**0.5
    np.testing.assert_allclose(total / draws, values, atol=slack, rtol=0)


def test_the_same_generator_gives_the_same_bytes() -> None:
    first, again, other = (
        codec.encode(random_values(900), BASE, bits=4, rng=np.random.default_rng(seed)).tobytes()
        for seed in (1, 1, 2)
    )
    assert first == again != other


@given(st.sampled_from([2, 4, 8]), st.integers(0, 70), st.integers(0, 2**32))
def test_packed_codes_come_back(bits: FewBits, count: int, seed: int) -> None:
    top = quantise.levels(bits)
    codes = np.random.default_rng(seed).integers(-top, top + 1, count).astype(np.int8)
    data = quantise.pack(codes, bits)
    assert len(data) == quantise.packed_bytes(count, bits)
    np.testing.assert_array_equal(quantise.unpack(data, bits, count), codes)


@given(FLOATS, BLOCKS)
def test_thirty_two_bits_are_exact(values: Floats, block: int) -> None:
    payload = codec.encode(values, BASE, bits=32, block=block)
    assert codec.decode(payload, base=BASE, count=values.size).tobytes() == values.tobytes()


@given(FLOATS)
def test_coding_what_was_decoded_stays_within_an_ulp(values: Floats) -> None:
    """What the decoder yields is representable: coding it again hardly moves it."""
    first = codec.encode(values, BASE, block=64)
    once = codec.decode(first, base=BASE, count=values.size)
    second = codec.encode(once, BASE, block=64)
    # a number that became 0 may be left out, and then others share a scale
    assume(codec.read_header(first).dense and codec.read_header(second).dense)
    twice = codec.decode(second, base=BASE, count=values.size)
    np.testing.assert_allclose(twice, once, rtol=1e-6, atol=1e-44)


def test_extremes_survive() -> None:
    largest = np.finfo(np.float32).max
    tiny = np.float32(1e-45)
    values = np.array([largest, -largest, tiny, -tiny, 0, 0], np.float32)
    decoded = codec.decode(codec.encode(values, BASE, block=2), base=BASE, count=6)
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded[:2], values[:2], rtol=1e-6)
    np.testing.assert_array_equal(decoded[2:], values[2:])


@pytest.mark.parametrize("bits", [8, 32])
def test_an_empty_update_is_a_header(bits: Literal[8, 32]) -> None:
    payload = codec.encode(np.empty(0, np.float32), BASE, bits=bits)
    assert payload.size == codec.HEADER_BYTES
    assert codec.decode(payload, base=BASE, count=0).size == 0


# --- golden vectors ------------------------------------------------------------------------------

# 127 gives scale 1, so the values can be read off; 0.5, 1.5, 2.5 round to the even neighbour.
GOLDEN_VALUES = np.array([127, 0.5, 1.5, 2.5, -2.5, -127, 0, 0, 63.5], np.float32)
GOLDEN_HEAD = "46465550020008000400000009000000000000000900000000000000" + BASE
# scales: 1.0, 1.0, and 0.5 = 63.5 / 127
GOLDEN_8 = GOLDEN_HEAD + "0000803f0000803f0000003f7f000202fe8100007f"
GOLDEN_32 = "46465550020020000400000002000000000000000200000000000000" + BASE + "0000803f000020c0"


def test_golden_eight_bits() -> None:
    payload = codec.encode(GOLDEN_VALUES, BASE, block=4)
    assert payload.tobytes().hex() == GOLDEN_8
    decoded = codec.decode(bytes.fromhex(GOLDEN_8), base=BASE, count=9)
    assert decoded.tolist() == [127, 0, 2, 2, -2, -127, 0, 0, 63.5]


def test_golden_four_and_two_bits() -> None:
    """Scales 1.0 and 0.5; codes 7 -3 2 0 | 0 -7, and 1 -1 0 1 | 1: the first in the low bits."""
    values = np.array([7, -3.2, 2.5, 0.5, 0, -3.5], np.float32)
    payload = codec.encode(values, BASE, bits=4, block=4)
    head = "46465550020004000400000006000000000000000600000000000000" + BASE
    assert payload.tobytes().hex() == head + "0000803f0000003f" + "d70290"
    assert codec.decode(payload, base=BASE, count=6).tolist() == [7, -3, 2, 0, 0, -3.5]
    values = np.array([1, -1, 0.25, 0.75, 0.5], np.float32)
    payload = codec.encode(values, BASE, bits=2, block=4)
    head = "46465550020002000400000005000000000000000500000000000000" + BASE
    assert payload.tobytes().hex() == head + "0000803f0000003f" + "4d01"
    assert codec.decode(payload, base=BASE, count=5).tolist() == [1, -1, 0, 1, 0.5]


@pytest.mark.parametrize(("bits", "last"), [(4, 0x18), (4, 0x20), (2, 0x02), (2, 0x05)])
def test_impossible_codes_and_stray_bits_are_refused(bits: FewBits, last: int) -> None:
    count = 1 + 8 // bits  # the last byte holds one code
    payload = codec.encode(np.ones(count, np.float32), BASE, bits=bits, block=4).copy()
    payload[-1] = last
    for look in (codec.decode, codec.check):
        with pytest.raises(ProtocolError, match=r"behind its last|the code is"):
            look(payload, base=BASE, count=count)


def test_golden_thirty_two_bits() -> None:
    values = np.array([1.0, -2.5], np.float32)
    assert codec.encode(values, BASE, bits=32, block=4).tobytes().hex() == GOLDEN_32
    decoded = codec.decode(bytes.fromhex(GOLDEN_32), base=BASE, count=2)
    assert decoded.tolist() == [1.0, -2.5]


def test_golden_scale_is_rounded_up() -> None:
    """0.1f / 127 lies between two fp32 numbers; the upper one is sent."""
    values = np.array([0.1], np.float32)
    scale = scales_of(codec.encode(values, BASE))[0]
    assert float(scale) * 127 >= float(values[0])
    assert float(np.nextafter(scale, np.float32(0))) * 127 < float(values[0])


def test_the_header_says_what_was_coded() -> None:
    payload = codec.encode(random_values(1000), BASE, block=64)
    assert codec.read_header(payload) == codec.Header(
        bits=8, block=64, count=1000, kept=1000, rank=0, base=BASE
    )
    assert codec.read_header(payload).payload_bytes == payload.size == 60 + 4 * 16 + 1000
    assert codec.read_header(payload[: codec.HEADER_BYTES]).count == 1000


# --- slices --------------------------------------------------------------------------------------


@given(
    arrays(np.float32, st.integers(1, 600), elements=SMALL),
    BLOCKS,
    st.sampled_from(codec.BITS),
    st.data(),
)
def test_slices_equal_the_whole(
    values: Floats, block: int, bits: codec.Bits, data: st.DataObject
) -> None:
    block *= 8 // min(bits, 8)  # whole bytes
    payload = codec.encode(values, BASE, bits=bits, block=block)
    whole = codec.decode(payload, base=BASE, count=values.size)
    start = data.draw(st.integers(0, values.size))
    stop = data.draw(st.integers(start, values.size))
    read, header = codec.reader_of(payload), codec.read_header(payload)
    part = codec.decode_slice(read, header, start, stop)
    assert part.tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 11)])
def test_slices_outside_are_refused(bounds: tuple[int, int]) -> None:
    payload = codec.encode(random_values(10), BASE)
    with pytest.raises(ProtocolError) as caught:
        codec.decode_slice(codec.reader_of(payload), codec.read_header(payload), *bounds)
    assert caught.value.reason is RejectReason.SHAPE


def test_a_slice_reads_only_its_blocks() -> None:
    payload = codec.encode(random_values(100_000), BASE)
    read: list[int] = []

    def counting(offset: int, length: int) -> bytes:
        read.append(length)
        return payload[offset : offset + length].tobytes()

    codec.decode_slice(counting, codec.read_header(payload), 1000, 1100)
    assert sum(read) <= 2 * (256 + 4)


# --- refusals ------------------------------------------------------------------------------------


def patched(payload: npt.NDArray[np.uint8], offset: int, data: bytes) -> bytes:
    raw = bytearray(payload.tobytes())
    raw[offset : offset + len(data)] = data
    return bytes(raw)


NAN, INF, NEGATIVE = (struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0))
FAULTS = [
    (0, b"XXXX", RejectReason.MALFORMED),
    (4, b"\x01\x00", RejectReason.PROTOCOL),
    (6, b"\x04", RejectReason.MALFORMED),
    (8, b"\x00\x00\x00\x00", RejectReason.MALFORMED),
    (8, b"\x01\x00\x01\x00", RejectReason.MALFORMED),
    (12, b"\x01", RejectReason.MALFORMED),
    (13, b"\xff", RejectReason.SHAPE),
    (12, b"\xff" * 8, RejectReason.SHAPE),
    (20, b"\x00", RejectReason.MALFORMED),
    (20, b"\xff" * 8, RejectReason.MALFORMED),
    (28, b"\x00", RejectReason.FOREIGN_BASE),
    (60, NAN, RejectReason.NOT_FINITE),
    (60, INF, RejectReason.NOT_FINITE),
    (60, struct.pack("<f", 3e38), RejectReason.NOT_FINITE),
    (60, NEGATIVE, RejectReason.MALFORMED),
    (1000, b"\x80", RejectReason.MALFORMED),
]


@pytest.mark.parametrize(("offset", "data", "reason"), FAULTS)
def test_a_damaged_payload_is_refused_with_its_reason(
    offset: int, data: bytes, reason: RejectReason
) -> None:
    payload = patched(codec.encode(random_values(1000), BASE), offset, data)
    with pytest.raises(ProtocolError) as caught:
        codec.decode(payload, base=BASE, count=1000)
    assert caught.value.reason is reason


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_is_refused(bits: Literal[8, 32], change: int) -> None:
    raw = codec.encode(random_values(1000), BASE, bits=bits).tobytes()
    wrong = raw[:-1] if change < 0 else raw + b"\x00"
    with pytest.raises(ProtocolError) as caught:
        codec.decode(wrong, base=BASE, count=1000)
    assert caught.value.reason is RejectReason.MALFORMED


def test_a_truncated_file_is_refused_by_slices() -> None:
    payload = codec.encode(random_values(1000), BASE)
    header = codec.read_header(payload)
    with pytest.raises(ProtocolError, match="in the middle"):
        codec.decode_slice(codec.reader_of(payload[:-1]), header, 0, 1000)


def test_raw_numbers_that_are_not_finite_are_refused() -> None:
    payload = patched(codec.encode(random_values(3), BASE, bits=32), 64, NAN)
    with pytest.raises(ProtocolError) as caught:
        codec.decode(payload, base=BASE, count=3)
    assert caught.value.reason is RejectReason.NOT_FINITE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_encoder_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.encode(np.array([0, value], np.float32), BASE)
    assert caught.value.reason is RejectReason.NOT_FINITE


@pytest.mark.parametrize("base", ["", "ab", "zz" * 32, "ab " * 32, "ab" * 33])
def test_the_encoder_refuses_what_is_no_digest(base: str) -> None:
    with pytest.raises(ProtocolError, match="64 hex digits"):
        codec.encode(random_values(2), base)


def test_the_encoder_refuses_other_shapes_and_types() -> None:
    for values in (np.zeros((2, 2), np.float32), np.zeros(4, np.float64)):
        with pytest.raises(ProtocolError):
            codec.encode(values, BASE)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        codec.encode(random_values(4), BASE, bits=3)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        codec.encode(random_values(4), BASE, block=0)
    with pytest.raises(ProtocolError, match="4 bits in blocks of 3"):
        codec.encode(random_values(4), BASE, bits=4, block=3)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes, count: int) -> None:
    for payload in (data, codec.MAGIC + b"\x01\x00\x08\x00" + data):
        with contextlib.suppress(ProtocolError):
            codec.decode(payload, base=None, count=count)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    st.sampled_from(codec.BITS),
)
def test_mutated_bytes_decode_to_finite_numbers_or_raise(
    changes: list[tuple[int, int]], bits: codec.Bits
) -> None:
    payload = codec.encode(random_values(300), BASE, bits=bits, block=64).copy()
    for place, value in changes:
        payload[place % payload.size] = value
    with contextlib.suppress(ProtocolError):
        assert np.isfinite(codec.decode(payload, base=None, count=300)).all()


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    st.sampled_from(codec.BITS),
    st.integers(-2, 2),
)
def test_a_check_refuses_what_the_decoder_refuses_and_nothing_else(
    changes: list[tuple[int, int]], bits: codec.Bits, cut: int
) -> None:
    payload = codec.encode(random_values(301), BASE, bits=bits, block=64).copy()
    for place, value in changes:
        payload[place % payload.size] = value
    payload = payload[: len(payload) - cut] if cut >= 0 else np.append(payload, payload[:1])
    reasons: list[RejectReason | None] = []
    for look in (codec.decode, codec.check):
        try:
            look(payload, base=BASE, count=301)
            reasons.append(None)
        except ProtocolError as error:
            reasons.append(error.reason)
    assert reasons[0] is reasons[1]


def test_a_lying_header_allocates_nothing() -> None:
    payload = patched(codec.encode(random_values(10), BASE), 12, struct.pack("<Q", 2**40))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            codec.decode(payload, base=BASE, count=10)
        with pytest.raises(ProtocolError):  # the liar's own count, but its bytes are not there
            codec.decode(payload, base=BASE, count=2**40)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# --- sparse updates ------------------------------------------------------------------------------


def sparse_values(count: int, kept: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    values = np.zeros(count, np.float32)
    values[rng.choice(count, kept, replace=False)] = random_values(kept, seed)
    return values


def test_golden_sparse() -> None:
    """Two numbers of 70,000, one in each run of 65,536, at offsets 2 and 1; codes 127 and 3."""
    values = np.zeros(70_000, np.float32)
    values[[2, 65_537]] = [127, 3]
    payload = codec.encode(values, BASE, block=4)
    head = "46465550020008000400000070110100000000000200000000000000" + BASE
    assert payload.tobytes().hex() == head + "0100000001000000" + "02000100" + "0000803f" + "7f03"
    assert np.array_equal(codec.decode(payload, base=BASE, count=70_000), values)


@given(st.integers(1, 200_000), st.floats(0, 1), st.sampled_from(codec.BITS), st.integers(0, 9))
def test_zeros_are_left_out_where_that_is_shorter(
    count: int, share: float, bits: codec.Bits, seed: int
) -> None:
    values = sparse_values(count, int(share * count), seed)
    payload = codec.encode(values, BASE, bits=bits)
    header = codec.read_header(payload)
    assert payload.size == header.payload_bytes <= codec.largest_payload(count)
    assert (
        payload.size
        <= codec.HEADER_BYTES + 4 * -(-count // 256) * (bits < 32) + count * bits / 8 + 1
    )
    codec.check(payload, base=BASE, count=count)
    decoded = codec.decode(payload, base=BASE, count=count)
    if bits == 32:
        assert np.array_equal(decoded, values)
    assert not decoded[values == 0].any()
    start, stop = sorted(np.random.default_rng(seed).integers(0, count + 1, 2).tolist())
    part = codec.decode_slice(codec.reader_of(payload), header, start, stop)
    assert np.array_equal(part, decoded[start:stop])


@given(st.integers(1, 5000), st.floats(1e-4, 1), st.integers(0, 9))
def test_the_largest_numbers_are_sent(count: int, top: float, seed: int) -> None:
    values = np.round(random_values(count, seed), 1)  # with ties
    decoded = codec.decode(codec.encode(values, BASE, bits=32, top=top), base=BASE, count=count)
    sent = decoded != 0
    assert np.array_equal(decoded[sent], values[sent])
    wanted = max(1, round(top * count))
    assert sent.sum() == min(wanted, int((values != 0).sum())) or not values[~sent].any()
    if sent.any() and not sent.all():
        assert np.abs(values[sent]).min() >= np.abs(values[~sent]).max()


@pytest.mark.parametrize("top", [0.0, -0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(top: float) -> None:
    with pytest.raises(ProtocolError, match="no coding"):
        codec.encode(random_values(10), BASE, top=top)


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (60, struct.pack("<I", 7), "as many"),  # of the first run
        (60, struct.pack("<I", 2**32 - 1), "as many"),
        (68, struct.pack("<H", 9), "ascend"),  # the first place above the second
        (70, struct.pack("<H", 5), "ascend"),  # twice the same place
        (72, struct.pack("<H", 65_535), "ascend"),  # behind the last number
    ],
)
def test_impossible_places_are_refused(offset: int, data: bytes, words: str) -> None:
    values = np.zeros(70_000, np.float32)
    values[[5, 8, 66_000]] = 1
    payload = patched(codec.encode(values, BASE), offset, data)
    for look in (codec.decode, codec.check):
        with pytest.raises(ProtocolError, match=words):
            look(payload, base=BASE, count=70_000)


def test_a_slice_of_a_sparse_update_reads_only_its_part() -> None:
    payload = codec.encode(sparse_values(2_000_000, 20_000), BASE)
    read: list[int] = []

    def counting(offset: int, length: int) -> bytes:
        read.append(length)
        return payload[offset : offset + length].tobytes()

    codec.decode_slice(counting, codec.read_header(payload), 1_000_000, 1_000_100)
    assert sum(read) < 0.1 * payload.size


def test_another_rank_is_refused() -> None:
    payload = codec.encode(random_values(10), BASE, rank=8)
    assert codec.read_header(payload).rank == 8
    codec.check(payload, base=BASE, count=10, rank=8)
    with pytest.raises(ProtocolError, match="rank 8, expected 4") as caught:
        codec.check(payload, base=BASE, count=10, rank=4)
    assert caught.value.reason is RejectReason.SHAPE


# --- layout --------------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def test_layout_flattens_in_the_given_order() -> None:
    model = small_model()
    layout = layout_of(model, ["1.weight", "0.bias", "0.weight"])
    assert layout.count == 4 + 4 + 12
    flat = layout.flatten(dict(model.named_parameters()))
    assert flat[:4].tolist() == [1, 1, 1, 1]
    back = layout.unflatten(flat)
    assert torch.equal(back["0.weight"], dict(model.named_parameters())["0.weight"])
    assert list(back) == ["1.weight", "0.bias", "0.weight"]


def test_apply_adds_what_was_decoded_and_nothing_else() -> None:
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layout = layout_of(model, ["0.bias", "1.bias"])
    change = codec.decode(codec.encode(random_values(8), BASE), base=BASE, count=8)
    add(model, layout, change)
    after = dict(model.named_parameters())
    expected = before["0.bias"].numpy() + change[:4]
    np.testing.assert_array_equal(after["0.bias"].detach().numpy(), expected)
    assert torch.equal(after["0.weight"], before["0.weight"])


def test_layouts_that_do_not_fit_are_refused() -> None:
    model = small_model()
    layout = layout_of(model, ["0.bias"])
    with pytest.raises(ModelError, match=r"2\.bias"):
        layout_of(model, ["0.bias", "2.bias"])
    with pytest.raises(ModelError):
        layout_of(model, [])
    with pytest.raises(ModelError, match=r"0\.bias"):
        layout.flatten({"0.bias": torch.zeros(5)})
    with pytest.raises(ModelError, match="nothing"):
        layout.flatten({})
    with pytest.raises(ProtocolError):
        add(model, layout, random_values(5))
    with pytest.raises(ModelError):
        add(nn.Linear(3, 4), layout, random_values(4))
