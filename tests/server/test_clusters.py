"""Farms that disagree on heads, and what a mask of their own would keep for them."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from common.budget import Budget, choose_mask
from common.config import ServerConfig
from common.errors import StateError
from common.mask import Mask
from common.plan import PlanConfig
from common.scores import UnitScores
from common.spec import ModelSpec
from server.cli import app
from server.clusters import Clusters, clusters, grouped, words
from server.settings import RunSettings
from server.store import CandidateRow, ScoreRow, Store
from tests.lab.network import Lab

Floats = npt.NDArray[np.float32]
SPEC = ModelSpec(name="any", image_size=32, heads=(4, 4), neurons=(8, 8), head_width=8, width=32)
DENSE = Mask.dense(SPEC)
LEFT: Floats = np.array([8, 7, 6, 5, 1, 2, 3, 4], np.float32) / np.float32(36)
"""Heads of the first block matter; the farms of the other kind see it the other way round."""
RIGHT: Floats = LEFT[::-1].copy()


def run_of(folder: Path, farms: dict[str, Floats], counted: Floats | None = None) -> Store:
    """A store after one round that removed half of the heads by the mean of the farms' scores."""
    store = Store.open(folder / "fieldfed.db")
    plan = PlanConfig(prune_heads=0.5, kappa=0.0)
    text = RunSettings(config=ServerConfig(plan=plan)).model_dump_json()
    run = store.start_run(text, 0, "a" * 64, DENSE.to_json())
    for node, farm in enumerate(farms, start=1):
        store.upsert_farm(run, node, farm, 100, 2)
    agreed = np.mean(list(farms.values()), axis=0).astype(np.float32)
    lowered = agreed if counted is None else counted
    neurons = tuple(np.zeros(8, np.float32) for _ in SPEC.heads)
    mask = choose_mask(
        UnitScores(tuple(np.split(lowered, 2)), neurons), DENSE, SPEC, Budget(heads_kept=0.5)
    )
    store.open_round(
        run, 1, kind="align", base="a" * 64, mask=DENSE.digest, quorum=1, deadline=0, scored=True
    )
    rows = [ScoreRow(None, DENSE.digest, lowered, importance=agreed)]
    rows += [ScoreRow(farm, DENSE.digest, heads, importance=heads) for farm, heads in farms.items()]
    store.commit_round(
        run,
        1,
        candidate=CandidateRow("b" * 64, "a" * 64, mask.digest, "{}", 1, 1, "nowhere"),
        mask_json=mask.to_json(),
        scores=rows,
        macs_ratio=0.5,
        heads_kept_ratio=0.5,
        mean_accuracy=0.5,
    )
    return store


def found_in(folder: Path, farms: dict[str, Floats], threshold: float = 0.5) -> Clusters:
    with run_of(folder, farms) as store:
        return clusters(store, store.run(1), SPEC, threshold)


def test_two_camps_are_found_and_each_would_keep_its_own_heads(tmp_path: Path) -> None:
    farms = {
        "apple": LEFT,
        "maize": RIGHT,
        "pear": LEFT * np.float32(0.9) + np.float32(0.0125),
        "rice": RIGHT,
    }
    found = found_in(tmp_path, farms)
    assert [one.farms for one in found.found] == [("apple", "pear"), ("maize", "rice")]
    left, right = found.found
    assert left.mask.heads == ((0, 1, 2), (3,)), "a head of every block stays"
    assert right.mask.heads == ((0,), (1, 2, 3))
    assert left.agreement == pytest.approx(1)
    assert found.agreement < 0
    for one in found.found:
        assert sum(map(len, one.mask.heads)) == found.kept == 4
        assert one.gain > 0.05
    # by hand: apple keeps 8 + 7 + 6 + 4 of 36 with its own mask
    alone = found_in(tmp_path / "two", {"apple": LEFT, "rice": RIGHT})
    assert alone.found[0].own == pytest.approx(25 / 36)
    assert "2 groups below 0.5 of each other" in words(found)
    assert "apple, pear: keeps" in words(found)
    assert words(found).endswith("the run keeps the shared mask")


def test_farms_that_agree_are_one_group_with_the_shared_mask(tmp_path: Path) -> None:
    found = found_in(tmp_path, {"apple": LEFT, "pear": LEFT, "plum": LEFT})
    (one,) = found.found
    assert one.farms == ("apple", "pear", "plum")
    assert one.gain == pytest.approx(0)
    assert one.other == 0
    assert words(found).endswith("all farms agree (at least 0.5): the shared mask is theirs")


def test_the_threshold_decides(tmp_path: Path) -> None:
    farms = {"apple": LEFT, "rice": RIGHT}
    assert len(found_in(tmp_path / "one", farms, -1).found) == 1
    assert len(found_in(tmp_path / "two", farms, -0.5).found) == 2


def test_heads_that_others_can_stand_in_for_are_lowered_for_groups_too(tmp_path: Path) -> None:
    """One head matters most to all and can be said by others: no group keeps it."""
    farms = {"apple": LEFT, "pear": LEFT}
    counted = LEFT * np.array([0.0, 1, 1, 1, 1, 1, 1, 1], np.float32)
    with run_of(tmp_path, farms, counted) as store:
        found = clusters(store, store.run(1), SPEC)
    assert 0 not in found.found[0].mask.heads[0]
    assert found.found[0].gain == pytest.approx(0)


def test_without_a_cut_or_without_scores_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="fewer than two farms"):
        found_in(tmp_path / "one", {"apple": LEFT})
    with Store.open(tmp_path / "fieldfed.db") as store:
        text = RunSettings(config=ServerConfig()).model_dump_json()
        run = store.start_run(text, 0, "a" * 64, DENSE.to_json())
        with pytest.raises(StateError, match="has removed no heads"):
            clusters(store, store.run(run), SPEC)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 6), threshold=st.floats(-1, 1))
def test_groups_are_a_partition_and_do_not_depend_on_the_order(
    seed: int, count: int, threshold: float
) -> None:
    rng = np.random.default_rng(seed)
    names = [f"farm{number}" for number in range(count)]
    scores = {
        name: UnitScores((rng.random(5).astype(np.float32), rng.random(4).astype(np.float32)), ())
        for name in names
    }
    found = grouped(scores, threshold)
    assert sorted(farm for group in found for farm in group) == names
    shuffled = {name: scores[name] for name in rng.permutation(names).tolist()}
    assert grouped(shuffled, threshold) == found
    assert len(grouped(scores, -1.01)) == 1
    assert len(grouped(scores, 1.01)) == count


def test_the_command_writes_a_mask_for_each_group(tmp_path: Path) -> None:
    options = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 8}
    lab = Lab(tmp_path, 2, {"backbone": {"options": options, "epochs": 0}}, prune_heads=0.5)
    lab.run(plan=lab.config.plan.model_copy(update={"rounds": 2}))
    runner, folder, out = CliRunner(), str(lab.server_dir), tmp_path / "masks"
    asked = ["mask", "clusters", folder, "--threshold", "1", "--out", str(out), "--json"]
    told = runner.invoke(app, asked)
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert sorted(one["farms"] for one in found["found"]) == [["farm0"], ["farm1"]]
    for number in (1, 2):
        mask = Mask.from_json((out / f"mask-{number}.json").read_text())
        assert sum(map(len, mask.heads)) == found["kept"] == 4
    assert all(one["own"] >= 0 for one in found["found"])
    plain = runner.invoke(app, ["mask", "clusters", folder])
    assert plain.exit_code == 0, plain.output
    assert plain.output.startswith("run 1, round 1: 4 of 8 heads kept, rank correlation")
