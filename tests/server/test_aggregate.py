"""Aggregation: a weighted mean, whatever the order, the chunks and the number of replies."""

import tracemalloc
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.errors import ConfigError, ProtocolError, RejectReason, StateError
from server.aggregate import aggregate

Floats = npt.NDArray[np.float32]

BASE = "aa" * 32


class Reply:
    def __init__(
        self, node: int, values: Floats, bits: Literal[8, 32] = 32, block: int = 256
    ) -> None:
        self.node, self.farm = node, f"farm{node:03d}"
        self.payload = codec.encode(values, BASE, bits=bits, block=block).tobytes()

    def read(self, offset: int, length: int) -> bytes:
        return self.payload[offset : offset + length]


def drawn(farms: int, count: int, seed: int = 0) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(count).astype(np.float32) for _ in range(farms)]


def mean_of(values: Sequence[Floats], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    return np.average(np.stack(values).astype(np.float64), axis=0, weights=weights)


@given(
    st.integers(1, 6), st.integers(1, 700), st.sampled_from([1, 7, 64, 1 << 20]), st.integers(0, 99)
)
def test_it_is_the_weighted_mean(farms: int, count: int, chunk: int, seed: int) -> None:
    values = drawn(farms, count, seed)
    weights = [float(10 * (i + 1)) for i in range(farms)]
    readers = [Reply(node, x) for node, x in enumerate(values)]
    found = aggregate(readers, weights, count=count, base=BASE, chunk=chunk)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, mean_of(values, weights), rtol=1e-6, atol=1e-7)


@given(st.permutations(range(6)), st.sampled_from([5, 256, 1000]))
def test_neither_arrival_nor_chunks_change_a_bit(order: list[int], chunk: int) -> None:
    readers = [Reply(i, x, bits=8) for i, x in enumerate(drawn(6, 1000))]
    weights = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    expected = aggregate(readers, weights, count=1000)
    found = aggregate(
        [readers[i] for i in order], [weights[i] for i in order], count=1000, chunk=chunk
    )
    assert found.tobytes() == expected.tobytes()


def test_it_averages_what_the_decoder_yields() -> None:
    values = drawn(3, 500)
    readers = [Reply(i, x, bits=8, block=64 * (i + 1)) for i, x in enumerate(values)]
    decoded = [codec.decode(reader.payload, base=BASE, count=500) for reader in readers]
    found = aggregate(readers, [1, 1, 1], count=500, chunk=100)
    np.testing.assert_allclose(found, mean_of(decoded, [1, 1, 1]), rtol=1e-6, atol=1e-7)


def test_one_farm_alone_is_its_own_mean() -> None:
    (values,) = drawn(1, 300)
    np.testing.assert_array_equal(aggregate([Reply(1, values)], [17], count=300), values)


def test_memory_does_not_grow_with_the_number_of_replies() -> None:
    count, chunk = 200_000, 10_000
    reply = Reply(0, drawn(1, count)[0], bits=8)

    class Shared:
        def __init__(self, node: int) -> None:
            self.node, self.farm = node, f"farm{node:03d}"

        def read(self, offset: int, length: int) -> bytes:
            return reply.read(offset, length)

    def peak(farms: int) -> int:
        readers = [Shared(node) for node in range(farms)]
        tracemalloc.start()
        try:
            aggregate(readers, [1.0] * farms, count=count, chunk=chunk)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1) < 4 * count + 60 * chunk
    assert peak(30) < peak(2) + 100_000  # a reader and a header each, no numbers


def test_a_large_update_is_clipped_to_the_median() -> None:
    small, other = np.full(400, 0.1, np.float32), np.full(400, -0.1, np.float32)
    huge = np.full(400, 100, np.float32)
    readers = [Reply(i, x) for i, x in enumerate([small, other, huge])]
    found = aggregate(readers, [1, 1, 1], count=400, clip=2.0)
    np.testing.assert_allclose(found, np.full(400, 0.2 / 3), rtol=1e-5)
    free = aggregate(readers, [1, 1, 1], count=400)
    np.testing.assert_allclose(free, np.full(400, 100 / 3), rtol=1e-5)


def test_a_generous_clip_changes_nothing() -> None:
    readers = [Reply(i, x) for i, x in enumerate(drawn(4, 300))]
    clipped = aggregate(readers, [1, 2, 3, 4], count=300, clip=3.0)
    assert clipped.tobytes() == aggregate(readers, [1, 2, 3, 4], count=300).tobytes()


def test_updates_of_zeros_survive_clipping() -> None:
    readers = [Reply(i, np.zeros(10, np.float32)) for i in range(2)]
    np.testing.assert_array_equal(aggregate(readers, [1, 1], count=10, clip=1.0), np.zeros(10))


def test_what_cannot_be_aggregated_is_refused() -> None:
    reader = Reply(1, drawn(1, 10)[0])
    with pytest.raises(StateError, match="no reply"):
        aggregate([], [], count=10)
    with pytest.raises(StateError, match="twice"):
        aggregate([reader, reader], [1, 1], count=10)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(StateError, match="node 1 has weight"):
            aggregate([reader], [weight], count=10)
    with pytest.raises(ConfigError):
        aggregate([reader], [1], count=10, clip=0)
    with pytest.raises(ProtocolError, match="node 1") as caught:
        aggregate([reader], [1], count=11)
    assert caught.value.reason is RejectReason.SHAPE
    with pytest.raises(ProtocolError, match="node 1") as caught:
        aggregate([reader], [1], count=10, base="bb" * 32)
    assert caught.value.reason is RejectReason.FOREIGN_BASE
