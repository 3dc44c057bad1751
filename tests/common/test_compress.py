"""Compressed bodies: the same bytes come out, and no more of them than the receiver allows."""

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from common.compress import compress, expand
from common.errors import ProtocolError, RejectReason

LIMIT = 10_000


def array(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(data, np.uint8)


@given(st.binary(max_size=2000), st.integers(0, 3))
def test_bytes_come_back_and_never_grow(data: bytes, repeats: int) -> None:
    data *= 1 + repeats
    packed = compress(array(b"FFUP" + data))
    assert packed.size <= len(data) + 4
    assert expand(packed, LIMIT).tobytes() == b"FFUP" + data


def test_what_repeats_shrinks_and_noise_stays() -> None:
    assert compress(array(b"x" * LIMIT)).size < 100
    noise = np.random.default_rng(0).integers(0, 256, LIMIT).astype(np.uint8)
    assert compress(noise) is noise


@given(st.lists(st.tuples(st.integers(4, 300), st.integers(0, 255)), max_size=4), st.integers(0, 9))
def test_damaged_frames_are_refused_or_harmless(changes: list[tuple[int, int]], cut: int) -> None:
    frame = compress(array(bytes(range(64)) * 90)).copy()
    for place, value in changes:
        frame[place % frame.size] = value
    try:
        assert expand(frame[: frame.size - cut], LIMIT).size <= LIMIT
    except ProtocolError:
        return


def test_a_frame_that_is_too_large_is_refused_before_it_is_unpacked() -> None:
    bomb = array(zstandard.ZstdCompressor().compress(bytes(200_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="200000000 bytes") as caught:
            expand(bomb, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.reason is RejectReason.OVERSIZED


def test_a_frame_that_hides_its_size_is_refused() -> None:
    quiet = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(ProtocolError, match="holds"):
        expand(array(quiet), LIMIT)


def test_bytes_behind_a_frame_are_refused() -> None:
    frame = compress(array(b"x" * 1000)).tobytes()
    with pytest.raises(ProtocolError, match="damaged"):
        expand(array(frame + b"more"), LIMIT)
