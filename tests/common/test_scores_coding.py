"""Coded neuron scores keep their order and their small values; nonsense is refused."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import ConfigError, ProtocolError, RejectReason
from common.scores import (
    HEADER,
    OCTAVES,
    RELATIVE_ERROR,
    Floats,
    UnitScores,
    decode_neurons,
    encode_neurons,
    invariance,
    median_tau,
)
from common.spec import ModelSpec

SPEC = ModelSpec(name="drawn", image_size=32, heads=(2, 1), neurons=(3, 2), head_width=4, width=8)
importances = arrays.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.floats(0, 2**-20, width=32)),
)


@settings(deadline=None)
@given(values=importances)
def test_order_is_never_inverted(values: Floats) -> None:
    coded = encode_neurons(values)
    assert coded.dtype == np.uint8
    assert len(coded) == HEADER.size + len(values)
    order = np.argsort(values, kind="stable")
    assert (np.diff(decode_neurons(coded, len(values))[order]) >= 0).all()


@settings(deadline=None)
@given(values=importances)
def test_relative_error_is_bounded(values: Floats) -> None:
    again = decode_neurons(encode_neurons(values), len(values)).astype(np.float64)
    exact = values.astype(np.float64)
    near = (exact > exact.max() * 2**-OCTAVES) & (exact > 2 * np.finfo(np.float32).tiny)
    assert (np.abs(again - exact)[near] <= RELATIVE_ERROR * exact[near]).all()
    assert (np.abs(again - exact) <= exact.max() * 2 ** (1 - OCTAVES)).all() or near.any()
    assert (again[exact == 0] == 0).all()


def test_the_step_adapts_to_the_spread_at_hand() -> None:
    values = np.geomspace(1e-3, 1e-2, 500).astype(np.float32)
    again = decode_neurons(encode_neurons(values), 500)
    assert np.abs(again / values - 1).max() < 0.005
    assert len(np.unique(again)) == 255
    assert again.max() == values.max()


def test_realistic_importances_keep_the_median_cut() -> None:
    values = np.random.default_rng(0).lognormal(-10, 1.5, 18_432).astype(np.float32)
    values /= values.sum()
    again = decode_neurons(encode_neurons(values), len(values))
    kept, kept_again = values >= np.median(values), again >= np.median(again)
    assert (kept != kept_again).mean() < 0.02


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.25, 0.25]])
def test_equal_values_come_back_exactly(values: list[float]) -> None:
    flat = np.array(values, np.float32)
    np.testing.assert_array_equal(decode_neurons(encode_neurons(flat), 2), flat)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1])
def test_encoding_refuses_what_is_no_importance(value: float) -> None:
    with pytest.raises(ProtocolError) as caught:
        encode_neurons(np.array([0.1, value], np.float32))
    assert caught.value.reason == RejectReason.NOT_FINITE
    with pytest.raises(ProtocolError):
        encode_neurons(np.ones((2, 2), np.float32))


def test_decoding_refuses_wrong_types_lengths_and_headers() -> None:
    good = encode_neurons(np.array([0.5, 0.25], np.float32))
    bads: list[Any] = [good[:-1], good.astype(np.int64), good[None], np.zeros(0, np.uint8)]
    for bad in bads:
        with pytest.raises(ProtocolError) as caught:
            decode_neurons(bad, 2)
        assert caught.value.reason == RejectReason.SHAPE
    headers = [(1, np.nan, 0.1), (1, -1.0, 0.1), (1, 1.0, np.inf), (1, 1.0, 9.0), (1, 0.0, 0.0)]
    for header in (*headers, (2, 1.0, 0.1)):
        packed = np.frombuffer(HEADER.pack(*header), np.uint8)
        with pytest.raises(ProtocolError):
            decode_neurons(np.concatenate([packed, np.array([3, 9], np.uint8)]), 2)


@settings(deadline=None)
@given(raw=st.binary(max_size=40), count=st.integers(0, 40))
def test_garbage_raises_protocol_error_only(raw: bytes, count: int) -> None:
    try:
        values = decode_neurons(np.frombuffer(raw, np.uint8), count)
    except ProtocolError:
        return
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_flat_and_blocks() -> None:
    heads, neurons = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.float32)
    scores = UnitScores.from_flat(heads, neurons, SPEC)
    assert [block.tolist() for block in scores.heads] == [[0, 1], [2]]
    assert [block.tolist() for block in scores.neurons] == [[0, 1, 2], [3, 4]]
    np.testing.assert_array_equal(scores.flat_heads(), heads)
    np.testing.assert_array_equal(scores.flat_neurons(), neurons)
    with pytest.raises(ProtocolError) as caught:
        UnitScores.from_flat(neurons, heads, SPEC)
    assert caught.value.reason == RejectReason.SHAPE
    with pytest.raises(ProtocolError):
        UnitScores.from_flat(heads * np.float32(np.nan), neurons, SPEC)


# --- invariance -----------------------------------------------------------------------------------


def test_invariance() -> None:
    mmd2 = np.array([-0.1, 0.0, 0.2, 0.4])
    np.testing.assert_allclose(invariance(mmd2, 0.2), [1, 1, math.exp(-1), math.exp(-2)])
    assert median_tau(mmd2) == pytest.approx(0.1)
    assert median_tau(np.full(4, -1.0)) > 0
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="tau"):
            invariance(mmd2, tau)
