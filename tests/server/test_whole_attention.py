"""A run in which a block loses its whole attention: farms, server, guard and registry go on."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common import backbone
from common.mask import Mask
from common.messages import AlignRequest
from common.silent import SilentAttention
from common.spec import ModelSpec
from server.cli import app
from server.models import Models
from server.publish import load, publish_run
from server.store import opened_run
from tests.lab.network import Lab
from tests.lab.versions import registry_in

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, list[AlignRequest]]:
    """Four rounds, two of which end with a cut: of eight heads two are left."""
    settings: dict[str, Any] = {"backbone": {"options": SMALL, "epochs": 0}}
    rules = {"rounds": 4, "prune_events": 2, "prune_heads": 0.75, "whole_attention": True}
    lab = Lab(tmp_path_factory.mktemp("whole"), 2, settings, criterion="taha", **rules)
    link = lab.run()
    return lab, [one for _, one in link.requests if isinstance(one, AlignRequest)]


def test_attention_went_and_the_run_went_on(finished: tuple[Lab, list[AlignRequest]]) -> None:
    lab, requests = finished
    with opened_run(lab.server_dir) as (store, run):
        assert run.state == "done"
        mask = Mask.from_json(store.last_mask(run))
        candidates = store.candidates(run.run)
        assert not store.rejections(run.run)
        scored = store.scores(run.run)
    assert sum(map(len, mask.heads)) == 2
    assert () in mask.heads
    assert len(scored) == 2
    last = candidates[4]
    model, spec = Models(lab.server_dir).view(last.digest)
    assert spec == ModelSpec.from_json(last.spec_json)
    assert spec.heads == tuple(map(len, mask.heads))
    silent = [isinstance(block.attn, SilentAttention) for block in model.blocks]
    assert silent == [not kept for kept in mask.heads]
    assert last.macs == backbone.macs(spec)
    # farms came over the cut by steps: nobody was sent the whole backbone again
    assert {one.body_kind for one in requests if one.round > 1} == {"delta"}


def test_it_is_published_and_shown(
    finished: tuple[Lab, list[AlignRequest]], tmp_path: Path
) -> None:
    lab, _ = finished
    registry = registry_in(tmp_path)
    with opened_run(lab.server_dir) as (store, run):
        row = publish_run(registry, store, Models(lab.server_dir), run)
        base = store.candidates(run.run)[4].digest
    model, spec = load(registry, row.counter)
    assert backbone.digest(model, spec) == base
    runner, folder = CliRunner(), str(lab.server_dir)
    shown = runner.invoke(app, ["mask", "show", folder])
    assert "heads ○○  0/2" in shown.output
    told = runner.invoke(app, ["status", folder])
    assert told.exit_code == 0, told.output
    report = runner.invoke(app, ["report", folder, "--out", str(tmp_path / "report.html")])
    assert report.exit_code == 0, report.output
