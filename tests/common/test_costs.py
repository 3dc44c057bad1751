"""A budget of time: what a table says is met, and where it says what MACs say, so is the mask."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.backbone import dense_spec, head_macs, macs, neuron_macs, tokens
from common.budget import Budget, choose_mask
from common.costs import CostTable, mac_costs
from common.errors import ConfigError
from common.mask import Mask
from common.scores import UnitScores
from common.spec import ModelSpec

SPEC = dense_spec("vit_tiny_patch16_224", 64, {"depth": 3})  # 3 heads and 768 neurons per block
DENSE = Mask.dense(SPEC)
seeds = st.integers(0, 2**32 - 1)


def table(
    heads: dict[int, float], neurons: dict[int, float], spec: ModelSpec = SPEC, **changes: object
) -> CostTable:
    fields = {"device": "a Pi", "engine": "onnxruntime", "threads": 1, "dense_seconds": 0.25}
    return CostTable.model_validate(
        fields | {"spec": spec, "heads": heads, "neurons": neurons} | changes
    )


def scores_for(mask: Mask, seed: int) -> UnitScores:
    rng = np.random.default_rng(seed)
    return UnitScores(
        tuple(rng.random(len(kept), np.float32) for kept in mask.heads),
        tuple(rng.random(len(kept), np.float32) for kept in mask.neurons),
    )


ratios = st.floats(0.3, 1.1)
tables = st.builds(
    lambda heads, neurons: table(heads, neurons),
    st.fixed_dictionaries({1: ratios, 2: ratios}),
    st.dictionaries(st.integers(1, 767), ratios, min_size=1, max_size=8),
)


# --- what a table says ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(tables)
def test_fewer_units_never_take_longer(found: CostTable) -> None:
    costs = found.costs()
    for saved, most in ((costs.heads, 3), (costs.neurons, 768)):
        assert saved.shape == (most + 1,)
        assert saved[most] == 0
        assert (np.diff(saved) <= 0).all()


def test_what_was_measured_is_what_is_said_and_the_rest_lies_between() -> None:
    found = table({1: 0.8, 2: 0.9}, {192: 0.4, 384: 0.6})
    costs = found.costs()

    def share(heads: int, *neurons: int) -> float:
        return costs.of(SPEC.with_units((heads,) * 3, neurons), SPEC) / 0.25

    assert share(3, 768, 768, 768) == 1
    assert share(1, 768, 768, 768) == pytest.approx(0.8)
    assert share(3, 384, 384, 384) == pytest.approx(0.6)
    assert share(2, 192, 192, 192) == pytest.approx(0.3)  # what layers save adds up
    assert share(3, 288, 288, 288) == pytest.approx(0.5)
    assert share(3, 768, 768, 384) == pytest.approx(1 - 0.4 / 3)
    assert share(3, 8, 8, 8) == pytest.approx(0.4)  # nothing is promised beyond


def test_macs_are_those_of_the_parts() -> None:
    costs, count = mac_costs(SPEC), tokens(SPEC)
    cut = SPEC.with_units((1, 2, 3), (100, 768, 8))
    gone = 3 * head_macs(SPEC, count) + (668 + 760) * neuron_macs(SPEC, count)
    assert costs.total == macs(SPEC)
    assert costs.of(cut, SPEC) == macs(SPEC) - gone


# --- the mask ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=seeds, found=tables, share=st.floats(0.3, 1), start=st.floats(0.7, 1))
def test_the_time_is_met_or_refused(
    seed: int, found: CostTable, share: float, start: float
) -> None:
    current = choose_mask(scores_for(DENSE, seed), DENSE, SPEC, Budget(macs_kept=start))
    costs, scores = found.costs(), scores_for(current, seed)
    least = costs.of(SPEC.with_units((1,) * 3, (8,) * 3), SPEC)
    budget = Budget(time_kept=share, table=found)
    if least > share * 0.25:
        with pytest.raises(ConfigError, match=r"time_kept=.* of the dense time"):
            choose_mask(scores, current, SPEC, budget)
        return
    mask = choose_mask(scores, current, SPEC, budget)
    assert mask.is_within(current)
    spec = mask.apply_to(SPEC)
    assert costs.of(spec, SPEC) <= share * 0.25 + 1e-9
    assert min(spec.heads) >= 1
    assert min(spec.neurons) >= 8
    if costs.of(current.apply_to(SPEC), SPEC) <= share * 0.25:
        assert mask == current


@settings(deadline=None, max_examples=30)
@given(seed=seeds, share=st.floats(0.35, 0.99), split=st.floats(0.1, 3))
def test_where_time_goes_by_macs_the_mask_does_too(seed: int, share: float, split: float) -> None:
    total, count = macs(SPEC), tokens(SPEC)
    head, neuron = head_macs(SPEC, count), neuron_macs(SPEC, count)
    linear = table(
        {kept: 1 - 3 * (3 - kept) * head / total for kept in (1, 2)},
        {kept: 1 - 3 * (768 - kept) * neuron / total for kept in (1, 500)},
    )
    scores = scores_for(DENSE, seed)
    by_time = Budget(time_kept=share, table=linear, heads_per_neurons=split)
    by_macs = Budget(macs_kept=share, heads_per_neurons=split)
    mask = choose_mask(scores, DENSE, SPEC, by_time)
    other = choose_mask(scores, DENSE, SPEC, by_macs)
    assert mask.heads == other.heads
    # one neuron may tip over where both are as good as equal
    assert abs(sum(map(len, mask.neurons)) - sum(map(len, other.neurons))) <= 1


def test_heads_that_save_nothing_are_not_what_pays() -> None:
    found = table({1: 1.0, 2: 1.0}, {1: 0.2})
    mask = choose_mask(scores_for(DENSE, 0), DENSE, SPEC, Budget(time_kept=0.6, table=found))
    assert found.costs().of(mask.apply_to(SPEC), SPEC) <= 0.6 * 0.25
    assert sum(map(len, mask.neurons)) < 0.55 * 3 * 768


def test_budgets_that_make_no_sense_are_refused() -> None:
    found = table({1: 0.8}, {8: 0.5})
    with pytest.raises(ConfigError, match="needs a table"):
        Budget(time_kept=0.5)
    with pytest.raises(ConfigError, match="needs a table"):
        Budget(macs_kept=0.5, table=found)
    with pytest.raises(ConfigError, match="without heads"):
        Budget(time_kept=0.5, table=found, whole_attention=True)
    with pytest.raises(ConfigError, match="time_kept must be above 0"):
        Budget(time_kept=1.5, table=found)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(ConfigError, match=r"no table of costs at .*costs\.json"):
        CostTable.load(path, SPEC)
    whole = table({1: 0.8}, {8: 0.5}).model_dump_json()
    path.write_text(whole)
    assert CostTable.load(path, SPEC).heads == {1: 0.8}
    for broken in (whole[:-20], "[]", whole.replace('"heads":{"1":', '"heads":{"3":')):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=r"costs\.json' is no table of costs"):
            CostTable.load(path, SPEC)


def test_a_table_of_another_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(table({1: 0.8}, {8: 0.5}).model_dump_json())
    for other in (
        dense_spec("vit_tiny_patch16_224", 96, {"depth": 3}),
        dense_spec("vit_tiny_patch16_224", 64, {"depth": 4}),
    ):
        with pytest.raises(ConfigError, match="measure again with: fieldfed-client costs"):
            CostTable.load(path, other)


def test_a_pruned_backbone_is_no_measure() -> None:
    with pytest.raises(ValueError, match="dense backbone"):
        table({1: 0.8}, {8: 0.5}, SPEC.with_units((1, 2, 3), SPEC.neurons))
