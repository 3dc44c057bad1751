"""What is said of a head is what farms sent and what the mask did."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from common.backbone import read_spec
from common.errors import ConfigError, StateError
from common.mask import Mask
from server.cli import app
from server.cuts import CLOSEST, cuts
from server.explain import Case, explain
from server.models import Models
from server.store import opened_run
from tests.lab.network import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("explain"), count=2, criterion="taha", prune_heads=0.4)
    lab.run()
    return lab


def case(lab: Lab, block: int, head: int) -> Case:
    with opened_run(lab.server_dir) as (store, run):
        dense = read_spec(Models(lab.server_dir).path(run.base))
        return explain(store, run, dense, block, head)


def final_mask(lab: Lab) -> Mask:
    with opened_run(lab.server_dir) as (store, run):
        last = store.last_committed(run.run)
        assert last is not None
        return Mask.from_json(store.mask(last[1].mask))


def test_every_head_is_told_what_became_of_it(lab: Lab) -> None:
    mask = final_mask(lab)
    gone = 0
    for block, count in enumerate(mask.dense_heads):
        for head in range(count):
            told = case(lab, block, head)
            assert told.kept == (head in mask.heads[block])
            assert told.fate.startswith("kept" if told.kept else "removed after round 1: ")
            assert told.criterion == "taha"
            (hearing,) = told.hearings
            assert (hearing.heads, hearing.left) == (12, 7)
            together = next(one for one in hearing.opinions if one.farm is None)
            assert together.importance is not None  # before what others can say was taken off
            if not told.kept:
                gone += 1
                assert f": {together.rank} of 12" in told.fate
    assert gone == 5


def test_scores_are_importance_times_invariance(lab: Lab) -> None:
    def of(name: str, farm: str) -> npt.NDArray[np.float64]:
        found = []
        for block in range(3):
            for head in range(4):
                (hearing,) = case(lab, block, head).hearings
                (one,) = [one for one in hearing.opinions if one.farm == farm]
                found.append(getattr(one, name))
        return np.array(found, dtype=np.float64)

    for farm in ("farm0", "farm1"):
        product = of("importance", farm) * of("invariance", farm)
        np.testing.assert_allclose(of("score", farm), product / product.mean(), rtol=1e-3)
        assert sorted(of("rank", farm)) == list(range(1, 13))
        assert of("score", farm).mean() == pytest.approx(1, abs=1e-4)


def test_the_picture_of_a_cut_shows_the_same(lab: Lab) -> None:
    with opened_run(lab.server_dir) as (store, run):
        (cut,) = cuts(store, run)
    assert (cut.round, cut.heads, cut.left, cut.undone) == (1, 12, 7, False)
    assert sum(row.removed for row in cut.rows) == 5
    assert len(cut.rows) == 5 + CLOSEST
    assert [row.together for row in cut.rows] == sorted(row.together for row in cut.rows)
    for row in cut.rows:
        told = case(lab, row.block, row.head)
        assert row.removed != told.kept
        scores = {one.farm: one.score for one in told.hearings[0].opinions}
        assert row.together == pytest.approx(scores.pop(None))
        assert row.farms == pytest.approx(scores)
    gone = [row.together for row in cut.rows if row.removed]
    stayed = [row.together for row in cut.rows if not row.removed]
    assert max(gone) <= cut.threshold <= max(stayed)
    assert not [one for one in stayed if max(gone) < one < cut.threshold]


def test_the_commands_say_the_same(lab: Lab) -> None:
    runner, folder = CliRunner(), str(lab.server_dir)
    shown = runner.invoke(app, ["mask", "show", folder])
    assert shown.exit_code == 0, shown.output
    assert "block  0" in shown.output
    assert "run 1: 58.3% of heads, 100.0% of neurons" in shown.output
    told = runner.invoke(app, ["mask", "explain", folder, "1", "2"])
    assert told.exit_code == 0, told.output
    assert case(lab, 1, 2).fate.split(":")[0] in told.output.replace("\n", " ")
    assert "farm0" in told.output
    plain = runner.invoke(app, ["mask", "explain", folder, "1", "2", "--json"])
    values = json.loads(plain.output)
    assert values["fate"] == case(lab, 1, 2).fate
    assert len(values["hearings"][0]["opinions"]) == 3


def test_what_is_not_there_is_refused(lab: Lab, tmp_path: Path) -> None:
    for block, head in ((3, 0), (-1, 0), (0, 4)):
        with pytest.raises(ConfigError, match="blocks are 0 to 2, heads 0 to 3"):
            case(lab, block, head)
    with pytest.raises(StateError, match="no run"), opened_run(tmp_path):
        pass
