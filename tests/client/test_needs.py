"""A farm asks whether heads are gone that it needs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.cli import app as farm_app
from client.needs import compared, needs
from client.state import FarmState
from common import backbone
from common.errors import ConfigError, StateError
from common.images import FarmFolder, open_folder
from common.mask import Mask
from common.removals import Removals, RemovedHead
from server.cli import app as server_app
from server.removals import newest_whole
from server.store import opened_run
from tests.lab.network import Lab, draw_folder

SPEC = backbone.dense_spec(
    "vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 8}
)
DENSE = Mask.dense(SPEC)
SMALL: dict[str, Any] = {"backbone": {"options": dict(SPEC.options), "epochs": 0}}
BASE = "b" * 64


def without(*units: tuple[int, int], mask: Mask = DENSE) -> Mask:
    heads = tuple(
        tuple(head for head in kept if (block, head) not in units)
        for block, kept in enumerate(mask.heads)
    )
    return replace(mask, heads=heads)


def removals_of(kept: Mask, base: str = BASE) -> Removals:
    gone = [
        RemovedHead(block=block, head=head, round=2, score=0.5, rank=7, heads=8)
        for block, heads in enumerate(DENSE.heads)
        for head in heads
        if head not in kept.heads[block]
    ]
    return Removals(
        network="lab",
        run=1,
        criterion="taylor",
        mask=kept.digest,
        masks={one.digest: one.to_json() for one in (DENSE, kept)},
        backbones={base: DENSE.digest},
        removed=tuple(gone),
    )


@given(
    st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8),
    st.sets(st.integers(0, 7), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_only_what_is_gone_and_would_have_been_kept_is_needed(
    worth: list[float], gone: set[int]
) -> None:
    units = {(at // 4, at % 4): value for at, value in enumerate(worth)}
    lost = [unit for at, unit in enumerate(units) if at in gone]
    if {block for block, _ in units} != {block for block, _ in units.keys() - set(lost)}:
        return  # a block keeps a head
    found = compared(removals_of(without(*lost)), DENSE, worth, BASE, "taylor")
    best = sorted(units, key=lambda unit: -units[unit])[: 8 - len(gone)]
    mean = sum(worth) / 8
    expected = {unit for unit in lost if unit in best and units[unit] > mean}
    assert {(one.block, one.head) for one in found.needed} == expected
    assert found.judged == len(gone)
    assert found.unjudged == 0
    if sum(worth) > 0:
        left = sum(value for unit, value in units.items() if unit not in lost)
        assert found.agreement == pytest.approx(left / sum(worth), rel=1e-9)


# --- on a farm's images --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> tuple[FarmFolder, FarmState, str]:
    """Images, and a state that holds a dense backbone."""
    root = tmp_path_factory.mktemp("farm")
    state = FarmState(root / "state")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = backbone.build(SPEC)
    digest = backbone.digest(model, SPEC)
    state.save_backbone(digest, model, SPEC)
    return open_folder(draw_folder(root / "data", 3, 14, 1)), state, digest


def ranked(farm: tuple[FarmFolder, FarmState, str]) -> list[tuple[int, int]]:
    """Heads by what they are worth to the farm, the best first, as ``needs`` itself finds."""
    folder, state, digest = farm
    units = [(block, head) for block, heads in enumerate(DENSE.heads) for head in heads]
    best: list[tuple[int, tuple[int, int]]] = []
    for unit in units:  # of a single head that is gone, its rank is told where it is needed
        found = needs(removals_of(without(unit), digest), folder, state)
        best += [(one.rank, unit) for one in found.needed]
    return [unit for _, unit in sorted(best)]


def test_a_farm_whose_scores_favour_what_is_gone_is_told_and_one_that_agrees_is_not(
    farm: tuple[FarmFolder, FarmState, str],
) -> None:
    folder, state, digest = farm
    favourites = ranked(farm)
    assert 1 <= len(favourites) < 8, "some heads are worth more than the mean head"
    best = favourites[0]
    told = needs(removals_of(without(best), digest), folder, state)
    (one,) = told.needed
    assert (one.block, one.head) == best
    assert one.rank == 1
    assert one.score > 1
    words = told.words()
    assert words.startswith("one head that this farm needs gone, of 1 that were judged")
    assert (
        f"block {best[0]} head {best[1]}: {one.score:.2f} times the mean head and 1 of 8" in words
    )
    assert "7 of 8 to all farms together, removed after round 2" in words
    units = [(block, head) for block, heads in enumerate(DENSE.heads) for head in heads]
    other = next(unit for unit in units if unit not in favourites)
    agreed = needs(removals_of(without(other), digest), folder, state)
    assert agreed.judged == 1
    assert agreed.needed == ()
    assert agreed.agreement > told.agreement
    assert agreed.words().startswith("no head that this farm needs gone")


def test_heads_that_the_backbone_at_hand_lacks_are_not_judged(
    farm: tuple[FarmFolder, FarmState, str], tmp_path: Path
) -> None:
    folder, _, _ = farm
    once, twice = without((0, 0)), without((0, 0), (1, 1))
    model = backbone.build(once.apply_to(SPEC))
    digest = backbone.digest(model, once.apply_to(SPEC))
    state = FarmState(tmp_path)
    state.save_backbone(digest, model, once.apply_to(SPEC))
    removals = removals_of(twice).model_copy(
        update={
            "masks": {one.digest: one.to_json() for one in (DENSE, once, twice)},
            "backbones": {BASE: DENSE.digest, digest: once.digest},
        }
    )
    found = needs(removals, folder, state)
    assert (found.base, found.heads, found.kept) == (digest, 7, 6)
    assert (found.judged, found.unjudged) == (1, 1)
    assert "1 more were gone from that backbone, too" in found.words()


def test_without_a_backbone_of_before_the_cut_a_farm_is_told_what_to_do(
    farm: tuple[FarmFolder, FarmState, str], tmp_path: Path
) -> None:
    folder, _, digest = farm
    removals = removals_of(without((0, 0)), digest)
    with pytest.raises(StateError, match=r"hand over base\.safetensors .* --dense"):
        needs(removals, folder, FarmState(tmp_path / "new"))
    other = tmp_path / "other.safetensors"
    backbone.save_backbone(other, backbone.build(SPEC), SPEC)  # other random weights
    with pytest.raises(ConfigError, match="is not what run 1 of network lab had before a cut"):
        needs(removals, folder, FarmState(tmp_path / "new"), other)


@pytest.mark.parametrize(
    "change",
    [
        {"removed": ()},
        {"mask": "c" * 64},
        {"masks": {"c" * 64: DENSE.to_json()}},
        {"backbones": {BASE: "c" * 64}},
        {"format": 2},
        {"surplus": 1},
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = removals_of(without((0, 0), (1, 2))).model_dump(mode="json")
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(whole))
    assert Removals.load(path).removed[1].head == 2
    path.write_text(json.dumps(whole | change))
    with pytest.raises(ConfigError, match=r"heads\.json' is no list of removed heads"):
        Removals.load(path)


# --- from a run to a farm ------------------------------------------------------------------------


def test_what_a_run_removed_reaches_members_and_newcomers(tmp_path: Path) -> None:
    lab = Lab(tmp_path, 2, SMALL, prune_heads=0.5)
    lab.run()
    runner, out, whole = CliRunner(), tmp_path / "heads.json", tmp_path / "dense.safetensors"
    asked = ["mask", "export", str(lab.server_dir), "--out", str(out), "--dense", str(whole)]
    written = runner.invoke(server_app, asked)
    assert written.exit_code == 0, written.output
    assert written.output.startswith("4 heads of run 1 are gone")
    removals = Removals.load(out)
    assert len(removals.removed) == 4
    assert {one.heads for one in removals.removed} == {8}
    assert {one.round for one in removals.removed} == {1}
    ranks = [one.rank for one in removals.removed]
    assert len(set(ranks)) == 4
    assert None not in ranks
    member, state = lab.farms[0]
    found = needs(removals, open_folder(member.farm.data), FarmState(state))
    assert (found.heads, found.kept, found.judged) == (8, 4, 4)

    folder = tmp_path / "new"
    data = draw_folder(tmp_path / "data" / "new", 2, 14, 5)
    made = runner.invoke(farm_app, ["init", str(folder), "--data", str(data)])
    assert made.exit_code == 0, made.output
    asked = ["needs", str(folder), str(out)]
    refused = runner.invoke(farm_app, asked)
    assert isinstance(refused.exception, StateError)
    dense = ["--dense", str(whole)]
    shown = runner.invoke(farm_app, [*asked, *dense, "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.output)
    assert (told["heads"], told["judged"], told["unjudged"]) == (8, 4, 0)
    assert all(one["together"]["rank"] in ranks for one in told["needed"])
    assert np.isclose(told["agreement"], told["agreement"])


def test_the_newest_backbone_that_nothing_was_cut_from_is_handed_over(tmp_path: Path) -> None:
    lab = Lab(tmp_path, 2, SMALL, prune_heads=0.5, rounds=4, warmup=3, prune_events=1)
    lab.run()
    with opened_run(lab.server_dir) as (store, run):
        candidates = store.candidates(run.run)
        assert [row.mask == run.mask for row in candidates.values()] == [True, True, False, False]
        assert newest_whole(store, run) == candidates[2].digest
    whole = tmp_path / "dense.safetensors"
    asked = ["mask", "export", str(lab.server_dir), "--out", str(tmp_path / "heads.json")]
    written = CliRunner().invoke(server_app, [*asked, "--dense", str(whole)])
    assert written.exit_code == 0, written.output
    assert candidates[2].digest[:12] in written.output
    assert backbone.digest(*backbone.load_backbone(whole)) == candidates[2].digest
