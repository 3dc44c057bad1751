"""Robust rules: what they are by their formulas, and what lying farms can do to them."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.config import Aggregation
from common.errors import ConfigError
from server.aggregate import aggregate

Floats = npt.NDArray[np.float32]
Robust = Literal["median", "trimmed", "krum"]
ROBUST: tuple[Robust, ...] = get_args(Robust)
BASE = "aa" * 32


class Update:
    def __init__(self, node: int, values: Floats) -> None:
        self.node, self.farm = node, f"farm{node:03d}"
        self._payload = codec.encode(values, BASE, bits=32).tobytes()

    def read(self, offset: int, length: int) -> bytes:
        return self._payload[offset : offset + length]


def merged(
    rows: Floats,
    rule: Aggregation,
    liars: float = 0.2,
    weights: list[float] | None = None,
    chunk: int = 1 << 20,
    clip: float | None = None,
) -> Floats:
    updates = [Update(node, row) for node, row in enumerate(rows)]
    shares = weights or [1.0] * len(rows)
    return aggregate(
        updates, shares, count=rows.shape[1], chunk=chunk, clip=clip, rule=rule, liars=liars
    )


def drawn(farms: int, count: int = 60, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((farms, count)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_the_median_is_the_median(farms: int, count: int, seed: int) -> None:
    rows = drawn(farms, count, seed)
    np.testing.assert_allclose(merged(rows, "median"), np.median(rows, axis=0), rtol=1e-6)


@given(st.integers(3, 12), st.floats(0, 0.49), st.integers(0, 99))
def test_the_trimmed_mean_leaves_out_both_ends(farms: int, liars: float, seed: int) -> None:
    rows = drawn(farms, seed=seed)
    cut = min(int(np.ceil(liars * farms)), (farms - 1) // 2)
    ends = np.sort(rows, axis=0)
    expected = ends[cut : farms - cut].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(merged(rows, "trimmed", liars), expected, rtol=1e-5, atol=1e-6)


# from five farms: with one neighbour, a pair of nearest farms has equal distances
@given(st.integers(5, 9), st.integers(0, 99))
def test_krum_is_its_definition(farms: int, seed: int) -> None:
    rows, wrong = drawn(farms, seed=seed).astype(np.float64), int(np.ceil(0.2 * farms))
    weights = [float(1 + node) for node in range(farms)]
    totals = []
    for row in range(farms):
        others = [float(((rows[row] - other) ** 2).sum()) for other in np.delete(rows, row, axis=0)]
        totals.append(sum(sorted(others)[: farms - wrong - 2]))
    kept = np.argsort(totals)[: farms - wrong]
    expected = np.average(rows[kept], axis=0, weights=np.array(weights)[kept])
    found = merged(rows.astype(np.float32), "krum", weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ROBUST)
@given(order=st.permutations(range(7)), chunk=st.sampled_from([1, 50, 1000]))
def test_neither_arrival_nor_memory_change_a_result(
    rule: Robust, order: list[int], chunk: int
) -> None:
    rows = drawn(7)
    updates = [Update(node, row) for node, row in enumerate(rows)]
    found = aggregate(
        [updates[i] for i in order], [1.0] * 7, count=60, chunk=chunk, rule=rule, clip=2.0
    )
    np.testing.assert_allclose(found, merged(rows, rule, clip=2.0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("attack", ["huge", "flipped", "equal"])
def test_two_liars_of_ten_do_not_steer(rule: Robust, attack: str) -> None:
    """Where the mean without clipping is steered, a robust rule stays near the honest mean."""
    rng = np.random.default_rng(5)
    truth = rng.standard_normal(400)
    rows = (truth + 0.3 * rng.standard_normal((10, 400))).astype(np.float32)
    honest = rows[2:].mean(axis=0)
    rows[:2] = {"huge": 100 * rows[:2], "flipped": -5 * rows[:2], "equal": np.full((2, 400), 9.0)}[
        attack
    ]
    error = np.linalg.norm(merged(rows, rule) - honest) / np.linalg.norm(honest)
    plain = np.linalg.norm(merged(rows, "mean") - honest) / np.linalg.norm(honest)
    assert error < 0.2 < plain


@pytest.mark.parametrize("rule", get_args(Aggregation))
@pytest.mark.parametrize("farms", [1, 2, 3])
def test_few_farms_are_merged_all_the_same(rule: Aggregation, farms: int) -> None:
    row = drawn(1)[0]
    same = np.stack([row] * farms)
    np.testing.assert_allclose(merged(same, rule, liars=0.49), row, rtol=1e-6)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("liars", [-0.1, 0.5, 1.0])
def test_more_liars_than_honest_farms_are_refused(liars: float, rule: Robust) -> None:
    with pytest.raises(ConfigError, match="less than 0"):
        merged(drawn(5), rule, liars=liars)


def test_an_unknown_rule_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="aggregation 'best'"):
        merged(drawn(3), "best")  # type: ignore[arg-type]
