"""Farms send second moments before a cut, and the server makes up for it with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common.config import RoundConfig, ServerConfig
from common.errors import ConfigError
from common.messages import AlignReply, AlignRequest, Reply, Request
from common.moments import unpack
from common.plan import PlanConfig
from common.surgery import Moments, prune_compensated
from server.centre import require_centre
from server.store import opened_run
from tests.lab.network import Lab
from tests.lab.network import server_config as config_of

RULES: dict[str, Any] = {"rounds": 3, "warmup": 2, "prune_events": 1, "moments": "farms"}


def aligned(link: Any) -> dict[int, set[str | None]]:
    """What was asked for of moments, by round."""
    found: dict[int, set[str | None]] = {}
    for _, one in link.requests:
        if isinstance(one, AlignRequest):
            found.setdefault(one.round, set()).add(one.moments)
    return found


def rejected(lab: Lab) -> int:
    with opened_run(lab.server_dir) as (store, run):
        assert run.state == "done"
        return len(store.rejections(run.run))


@pytest.mark.parametrize(
    ("budget", "extent"),
    [({"prune_heads": 0.5}, "heads"), ({"prune_heads": None, "prune_macs": 0.4}, "all")],
)
def test_they_are_asked_for_once_and_counted_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any], extent: str
) -> None:
    used: list[Moments] = []

    def watched(model: Any, spec: Any, keep: Any, moments: Moments, method: Any) -> Any:
        used.append(moments)
        return prune_compensated(model, spec, keep, moments, method)

    monkeypatch.setattr("server.close.prune_compensated", watched)
    lab = Lab(tmp_path, 2, **RULES | budget)
    sizes: list[int] = []

    def look(_node: int, request: Request, reply: Reply) -> None:
        if isinstance(request, AlignRequest) and request.moments is not None:
            assert isinstance(reply, AlignReply)
            assert reply.moments is not None
            sizes.append(reply.moments.nbytes)

    link = lab.run(fault=look)
    assert aligned(link) == {1: {None}, 2: {extent}, 3: {None}}
    assert len(sizes) == 2
    assert not rejected(lab)
    assert len(used) == 1
    # tokens of the source images and of every farm's fit images
    with opened_run(lab.server_dir) as (store, run):
        images = sum(row.examples for row in store.farms(run.run))
    tokens = float(used[0].heads[0][-1, -1]) / (images + 32)
    assert tokens == pytest.approx(round(tokens))
    assert bool(used[0].neurons) == (extent == "all")


def test_every_farm_counts_alike_however_many_images_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []

    def watched(body: Any, spec: Any, extent: Any, weight: float) -> Moments:
        weights.append(weight)
        return unpack(body, spec, extent, weight)

    monkeypatch.setattr("common.moments.unpack", watched)
    lab = Lab(tmp_path, 3, **RULES | {"prune_heads": 0.5})
    lab.run()
    with opened_run(lab.server_dir) as (store, run):
        images = {row.farm: row.examples for row in store.farms(run.run)}
    assert len(set(images.values())) == len(weights) == 3
    assert len(set(weights)) == 1
    tokens = sum(weights) / sum(images.values())
    assert tokens == pytest.approx(round(tokens))


def test_a_server_without_source_images_makes_up_for_cuts_with_farms_alone(tmp_path: Path) -> None:
    lab = Lab(tmp_path, 2, **RULES | {"prune_heads": 0.5})
    bare = lab.config.backbone.model_copy(update={"source": None})
    lab.config = lab.config.model_copy(update={"backbone": bare})
    link = lab.run()
    assert aligned(link)[2] == {"heads"}
    assert not rejected(lab)


def test_moments_of_another_backbone_are_put_into_quarantine(tmp_path: Path) -> None:
    def fault(node: int, request: Request, reply: Reply) -> Reply | None:
        if node == 1 and isinstance(reply, AlignReply) and reply.moments is not None:
            return reply.model_copy(update={"moments": np.zeros(100, np.uint8)})
        return None

    lab = Lab(tmp_path, 2, **RULES | {"prune_heads": 0.5})
    lab.run(fault=fault)
    with opened_run(lab.server_dir) as (store, run):
        assert run.state == "done"
        assert {row.reason for row in store.rejections(run.run)} == {"shape"}
        assert len(store.replies(run.run, 2)) == 1


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, moments="farms")
    whole = config.model_dump()
    with pytest.raises(ValidationError, match="adds no noise"):
        ServerConfig.model_validate(whole | {"privacy": {"clip": 1.0, "noise": 1.0}})
    with pytest.raises(ValidationError, match="trusts every farm"):
        ServerConfig.model_validate(whole | {"rounds": {"aggregation": "median"}})
    with pytest.raises(ConfigError, match=r"plan\.moments"):
        require_centre(config)
    assert PlanConfig().moments == "source"
    assert RoundConfig().aggregation == "mean"
