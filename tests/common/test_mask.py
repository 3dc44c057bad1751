"""Masks travel strictly; budgets are met exactly, within minimums, and only ever shrink."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.backbone import dense_spec, head_macs, macs, neuron_macs, tokens
from common.budget import Budget, choose_mask
from common.errors import ConfigError, ModelError, ProtocolError, RejectReason
from common.mask import Mask
from common.scores import UnitScores

SPEC = dense_spec("vit_tiny_patch16_224", 64, {"depth": 3})  # 3 heads and 768 neurons per block
DENSE = Mask.dense(SPEC)
TOKENS = tokens(SPEC)
HEAD, NEURON, TOTAL = head_macs(SPEC, TOKENS), neuron_macs(SPEC, TOKENS), macs(SPEC)
seeds = st.integers(0, 2**32 - 1)


def scores_for(mask: Mask, seed: int) -> UnitScores:
    rng = np.random.default_rng(seed)
    return UnitScores(
        tuple(rng.random(len(kept), np.float32) for kept in mask.heads),
        tuple(rng.random(len(kept), np.float32) for kept in mask.neurons),
    )


def random_mask(seed: int, within: Mask = DENSE) -> Mask:
    rng = np.random.default_rng(seed)

    def some(kept: tuple[int, ...]) -> tuple[int, ...]:
        count = int(rng.integers(1, len(kept) + 1))
        return tuple(sorted(rng.choice(kept, count, replace=False).tolist()))

    return Mask(
        tuple(map(some, within.heads)),
        tuple(map(some, within.neurons)),
        within.dense_heads,
        within.dense_neurons,
    )


def cost(mask: Mask) -> int:
    """From the parts; that they add up to the whole is asserted once, below."""
    gone_heads = sum(SPEC.heads) - sum(map(len, mask.heads))
    gone_neurons = sum(SPEC.neurons) - sum(map(len, mask.neurons))
    return TOTAL - gone_heads * HEAD - gone_neurons * NEURON


def test_cost_is_that_of_the_pruned_backbone() -> None:
    mask = choose_mask(scores_for(DENSE, 0), DENSE, SPEC, Budget(macs_kept=0.57))
    assert cost(mask) == macs(mask.apply_to(SPEC))
    assert 0.57 * TOTAL - NEURON < cost(mask) <= 0.57 * TOTAL


# --- masks ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_json_round_trip(seed: int) -> None:
    mask = random_mask(seed)
    again = Mask.from_json(mask.to_json())
    assert again == mask
    assert hash(again) == hash(mask)
    assert again.digest == mask.digest
    assert mask.digest != DENSE.digest or mask == DENSE
    assert len(mask.to_json()) < 1000


def test_digest_is_stable() -> None:
    mask = Mask(((0, 2),), ((1,),), (3,), (2,))
    packed = '{"heads":[{"kept":"a0","of":3}],"neurons":[{"kept":"40","of":2}],"version":1}'
    assert mask.to_json() == packed
    assert mask.digest == "7989564d672f9bcad54eb0e22d1d544559e753ba9c0812421b0e7b612f27af39"


@pytest.mark.parametrize(
    "heads",
    [
        [{"of": 3, "kept": "00"}],  # nothing kept in any block
        [{"of": 3, "kept": "b0"}],  # a bit beyond the last head
        [{"of": 3, "kept": "a000"}],
        [{"of": 3, "kept": ""}],
        [{"of": 3, "kept": "A0"}],
        [{"of": 3, "kept": "a"}],
        [{"of": 3.0, "kept": "a0"}],
        [{"of": 0, "kept": ""}],
        [{"of": 3, "kept": "a0", "more": 1}],
        [{"of": 3, "kept": "a0"}] * 2,  # more blocks than neurons have
        [],
        None,
    ],
)
def test_strange_json_is_refused(heads: object) -> None:
    neurons = [{"of": 2, "kept": "40"}]
    with pytest.raises(ProtocolError):
        Mask.from_json(json.dumps({"version": 1, "heads": heads, "neurons": neurons}))


@settings(deadline=None)
@given(text=st.one_of(st.binary(max_size=60), st.text(max_size=60)))
def test_garbage_raises_protocol_error_only(text: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        Mask.from_json(text)


@pytest.mark.parametrize("heads", [((1, 0),), ((0, 0),), ((3,),), ((-1,),), ((),), ()])
def test_impossible_masks_are_refused(heads: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ProtocolError):
        Mask(heads, ((0,),), (3,), (2,))


@settings(deadline=None, max_examples=30)
@given(outer=seeds, inner=seeds)
def test_keep_in_names_the_same_units_in_the_parent(outer: int, inner: int) -> None:
    parent = random_mask(outer)
    child = random_mask(inner, parent)
    assert child.is_within(parent)
    assert child.is_within(child)
    assert not parent.is_within(child) or parent == child
    keep = child.keep_in(parent)
    for kept, within, names in zip(
        (*keep.heads, *keep.neurons),
        (*parent.heads, *parent.neurons),
        (*child.heads, *child.neurons),
        strict=True,
    ):
        assert kept.dtype == np.int64
        assert tuple(np.array(within)[kept].tolist()) == names


def test_masks_of_other_backbones_do_not_mix() -> None:
    other = dense_spec("vit_tiny_patch16_224", 64, {"depth": 2})
    assert not Mask.dense(other).is_within(DENSE)
    for wrong in (lambda: DENSE.apply_to(other), lambda: Mask.dense(other).keep_in(DENSE)):
        with pytest.raises(ModelError):
            wrong()


def test_ratios_and_description() -> None:
    mask = Mask(((0, 2), (1,)), ((0, 1, 2, 3), (5,)), (3, 3), (8, 8))
    assert mask.heads_kept_ratio == 0.5
    assert mask.neurons_kept_ratio == 5 / 16
    first, second = mask.describe().splitlines()
    assert "●○●" in first
    assert "2/3" in first
    assert "4/8   50 %" in first
    assert "○●○" in second


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_shares_outside_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="heads_kept must be above 0 and at most 1"):
        Budget(heads_kept=share)
    with pytest.raises(ConfigError, match="macs_kept must be above 0 and at most 1"):
        Budget(macs_kept=share)


def test_other_nonsense_is_refused() -> None:
    for share in (None, 0.5):
        with pytest.raises(ConfigError, match="and no other"):
            Budget(heads_kept=share, macs_kept=share)
    with pytest.raises(ConfigError, match="heads_per_neurons"):
        Budget(macs_kept=0.5, heads_per_neurons=0)
    with pytest.raises(ConfigError, match="min_heads"):
        Budget(macs_kept=0.5, min_heads=0)


# --- the choice -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=seeds, share=st.floats(0.34, 1))
def test_heads_are_counted_exactly_and_neurons_stay(seed: int, share: float) -> None:
    mask = choose_mask(scores_for(DENSE, seed), DENSE, SPEC, Budget(heads_kept=share))
    assert sum(map(len, mask.heads)) == round(share * 9)
    assert mask.neurons == DENSE.neurons
    assert min(map(len, mask.heads)) >= 1


def test_kept_heads_have_the_largest_score_that_minimums_allow() -> None:
    heads = ([0.1, 0.2, 0.3], [0.9, 0.8, 0.7], [0.6, 0.5, 0.4])
    scores = UnitScores(tuple(np.array(h, np.float32) for h in heads), scores_for(DENSE, 0).neurons)
    mask = choose_mask(scores, DENSE, SPEC, Budget(heads_kept=5 / 9))
    assert mask.heads == ((2,), (0, 1, 2), (0,))


def test_ties_are_broken_by_block_then_index() -> None:
    equal = UnitScores(
        tuple(np.ones(3, np.float32) for _ in range(3)),
        tuple(np.ones(768, np.float32) for _ in range(3)),
    )
    mask = choose_mask(equal, DENSE, SPEC, Budget(heads_kept=5 / 9))
    assert mask.heads == ((0, 1, 2), (0,), (0,))


@settings(deadline=None, max_examples=30)
@given(
    seed=seeds,
    share=st.floats(0.21, 1),
    ratio=st.floats(0.05, 5),
    start=st.floats(0.5, 1),
)
def test_macs_are_met_to_the_unit(seed: int, share: float, ratio: float, start: float) -> None:
    current = choose_mask(
        scores_for(DENSE, seed), DENSE, SPEC, Budget(macs_kept=start, heads_per_neurons=ratio)
    )
    budget = Budget(macs_kept=share, heads_per_neurons=ratio)
    mask = choose_mask(scores_for(current, seed), current, SPEC, budget)
    assert mask.is_within(current)
    assert cost(mask) <= share * TOTAL or mask == current
    if mask == current:
        assert cost(current) <= share * TOTAL
        return
    at_minimum = all(len(kept) == 8 for kept in mask.neurons)
    untouched = mask.neurons == current.neurons
    unit = HEAD if at_minimum or untouched else NEURON
    assert cost(mask) + unit > share * TOTAL
    assert min(map(len, mask.heads)) >= 1
    assert min(map(len, mask.neurons)) >= 8


@settings(deadline=None, max_examples=30)
@given(
    seed=seeds,
    share=st.floats(0.4, 1),
    start=st.floats(0.5, 1),
    multiple=st.sampled_from([8, 16, 32, 100]),
)
def test_neurons_go_in_portions_and_the_budget_is_met_to_one(
    seed: int, share: float, start: float, multiple: int
) -> None:
    current = choose_mask(scores_for(DENSE, seed), DENSE, SPEC, Budget(macs_kept=start))
    budget = Budget(macs_kept=share, neuron_multiple=multiple)
    mask = choose_mask(scores_for(current, seed), current, SPEC, budget)
    assert mask.is_within(current)
    assert cost(mask) <= share * TOTAL
    changed = False
    for before, after in zip(current.neurons, mask.neurons, strict=True):
        changed |= after != before
        assert after == before or len(after) % multiple == 0
        assert len(after) >= min(len(before), budget.neurons_per_block)
    if changed and any(len(kept) > budget.neurons_per_block for kept in mask.neurons):
        assert cost(mask) + multiple * NEURON > share * TOTAL


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.45, 0.95), ratio=st.floats(0.3, 1.2))
def test_drop_shares_keep_their_exchange_rate(share: float, ratio: float) -> None:
    budget = Budget(macs_kept=share, heads_per_neurons=ratio)
    mask = choose_mask(scores_for(DENSE, 0), DENSE, SPEC, budget)
    assume(sum(map(len, mask.heads)) > 3)
    dropped_heads, dropped_neurons = 1 - mask.heads_kept_ratio, 1 - mask.neurons_kept_ratio
    one_head = (1 + ratio * HEAD * 9 / (NEURON * 768 * 3)) / 9
    assert abs(dropped_heads - ratio * dropped_neurons) <= one_head


@settings(deadline=None, max_examples=20)
@given(seed=seeds, share=st.floats(0.3, 0.9))
def test_kept_neurons_outscore_dropped_ones(seed: int, share: float) -> None:
    scores = scores_for(DENSE, seed)
    mask = choose_mask(scores, DENSE, SPEC, Budget(macs_kept=share))
    assume(min(map(len, mask.neurons)) > 8)
    kept = np.concatenate([v[list(k)] for v, k in zip(scores.neurons, mask.neurons, strict=True)])
    flat = np.sort(scores.flat_neurons())[::-1]
    np.testing.assert_array_equal(np.sort(kept)[::-1], flat[: len(kept)])


@settings(deadline=None, max_examples=20)
@given(seed=seeds, order=st.permutations(range(3)), share=st.floats(0.4, 1))
def test_permuting_heads_permutes_the_mask(seed: int, order: list[int], share: float) -> None:
    scores = scores_for(DENSE, seed)
    permuted = UnitScores(tuple(block[order] for block in scores.heads), scores.neurons)
    budget = Budget(macs_kept=share)
    a = choose_mask(scores, DENSE, SPEC, budget)
    b = choose_mask(permuted, DENSE, SPEC, budget)
    assert a.neurons == b.neurons
    for kept, kept_permuted in zip(a.heads, b.heads, strict=True):
        assert {order[i] for i in kept_permuted} == set(kept)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_a_schedule_only_shrinks_and_one_changes_nothing(seed: int) -> None:
    masks = [DENSE]
    for step, share in enumerate((1.0, 0.8, 0.8, 0.9, 0.5)):
        scores = scores_for(masks[-1], seed + step)
        masks.append(choose_mask(scores, masks[-1], SPEC, Budget(macs_kept=share)))
    assert masks[1] == DENSE
    assert masks[3] == masks[2] == masks[4]
    assert all(late.is_within(early) for early, late in pairwise(masks))
    assert choose_mask(scores_for(DENSE, seed), DENSE, SPEC, Budget(heads_kept=1.0)) == DENSE


def test_minimums_hold_or_are_named() -> None:
    scores = scores_for(DENSE, 0)
    budget = Budget(heads_kept=0.6, min_heads=2)
    with pytest.raises(ConfigError, match="min_heads=2"):
        choose_mask(scores, DENSE, SPEC, budget)
    with pytest.raises(ConfigError, match="min_neurons=500"):
        choose_mask(scores, DENSE, SPEC, Budget(macs_kept=0.3, min_neurons=500))
    few = random_mask(3)
    assert (
        choose_mask(
            scores_for(few, 0), few, SPEC, Budget(heads_kept=1.0, min_heads=3, min_neurons=9999)
        )
        == few
    )
    mask = choose_mask(scores, DENSE, SPEC, Budget(macs_kept=0.6, min_heads=2, min_neurons=300))
    assert min(map(len, mask.heads)) >= 2
    assert min(map(len, mask.neurons)) >= 300


def test_foreign_or_broken_scores_are_refused() -> None:
    few = random_mask(3)
    with pytest.raises(ProtocolError) as caught:
        choose_mask(scores_for(few, 0), DENSE, SPEC, Budget(heads_kept=0.5))
    assert caught.value.reason == RejectReason.SHAPE
    broken = scores_for(DENSE, 0)
    broken.heads[1][0] = np.nan
    with pytest.raises(ProtocolError) as caught:
        choose_mask(broken, DENSE, SPEC, Budget(heads_kept=0.5))
    assert caught.value.reason == RejectReason.NOT_FINITE
