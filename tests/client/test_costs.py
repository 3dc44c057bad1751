"""What units cost here: measured, written, and what a server's plan makes of it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.costs import measured_costs
from common import backbone
from common.costs import CostTable
from common.errors import ConfigError
from common.mask import Mask
from common.plan import PlanConfig
from common.spec import ModelSpec
from server.cli import app as server_app
from server.plan import Plan
from server.store import opened_run
from tests.lab.network import SIDE, TINY, Lab

DENSE = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
runner = CliRunner()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, of the lab's backbone."""
    folder = tmp_path_factory.mktemp("costs")
    backbone.save_backbone(folder / "base.safetensors", backbone.build(DENSE), DENSE)
    out = folder / "costs.json"
    where = [str(folder / "base.safetensors"), "--out", str(out)]
    done = runner.invoke(app, ["costs", *where, "--device", "a Pi", "--seconds", "0"])
    assert done.exit_code == 0, done.output
    assert "ms an image on a Pi" in done.output
    return out


def test_every_number_of_heads_and_some_of_neurons_are_timed(measured: Path) -> None:
    table = CostTable.load(measured, DENSE)
    most, neurons = DENSE.heads[0], DENSE.neurons[0]
    assert sorted(table.heads) == list(range(1, most))
    assert len(table.neurons) == 7
    assert max(table.neurons) < neurons
    assert 0 < table.dense_seconds < 1


def test_a_backbone_that_is_cut_cannot_be_measured() -> None:
    cut = DENSE.with_units((1, *DENSE.heads[1:]), DENSE.neurons)
    with pytest.raises(ConfigError, match="give the dense backbone"):
        measured_costs(cut)
    one: ModelSpec = DENSE.with_units((1,) * DENSE.depth, DENSE.neurons)
    with pytest.raises(ConfigError, match="too few heads"):
        measured_costs(one)


def test_fewer_neurons_take_less_time_at_a_size_where_it_shows() -> None:
    wide = backbone.dense_spec(
        "vit_tiny_patch16_224", 160, {"depth": 1, "embed_dim": 256, "num_heads": 2, "mlp_ratio": 16}
    )
    table = measured_costs(wide, seconds=0.2)
    least = min(table.neurons)
    assert table.neurons[least] < 0.9


# --- a plan --------------------------------------------------------------------------------------


def steep(path: Path) -> Path:
    """A table that says what cannot be missed."""
    heads = {count: 0.7 + 0.3 * count / DENSE.heads[0] for count in range(1, DENSE.heads[0])}
    table = CostTable(
        device="a Pi",
        engine="onnxruntime",
        threads=1,
        spec=DENSE,
        dense_seconds=0.1,
        heads=heads,
        neurons={1: 0.4},
    )
    path.write_text(table.model_dump_json())
    return path


def test_a_plan_of_time_cuts_by_the_table(tmp_path: Path) -> None:
    costs = steep(tmp_path / "costs.json")
    plan = Plan(PlanConfig(rounds=4, prune_events=2, prune_time=0.4, costs=costs), DENSE)
    budgets = [plan.event_after(number) for number in plan.events]
    assert [one.time_kept for one in budgets if one] == [pytest.approx(0.65), pytest.approx(0.6)]
    assert all(one is not None and one.table is not None for one in budgets)
    too_far = PlanConfig(rounds=4, prune_events=2, prune_time=0.95, costs=costs)
    with pytest.raises(ConfigError, match=r"plan\.prune_time=0\.95 .* lower it to at most"):
        Plan(too_far, DENSE)
    elsewhere = PlanConfig(rounds=4, prune_time=0.4, costs=tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"none\.json"):
        Plan(elsewhere, DENSE)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prune_time": 0.4}, "prune_time needs costs"),
        ({"prune_time": 0.4, "costs": "c.json", "whole_attention": True}, "whole_attention"),
        ({"prune_time": 1.2, "costs": "c.json"}, "between 0 and 1"),
        ({"prune_time": 0.4, "costs": "c.json", "prune_macs": 0.4}, "give one of"),
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PlanConfig.model_validate(wrong)


def test_a_run_ends_within_the_time(tmp_path: Path) -> None:
    costs = steep(tmp_path / "costs.json")
    lab = Lab(
        tmp_path / "lab", 2, rounds=2, prune_events=1, prune_heads=None, prune_time=0.4, costs=costs
    )
    lab.run()
    with opened_run(lab.server_dir) as (store, run):
        assert run.state == "done"
        mask = Mask.from_json(store.last_mask(run))
    table = CostTable.load(costs, DENSE)
    share = table.costs().of(mask.apply_to(DENSE), DENSE) / table.dense_seconds
    assert 0.58 < share <= 0.6
    shown = runner.invoke(server_app, ["mask", "show", str(lab.server_dir), "--costs", str(costs)])
    assert f"predicted: {share:.1%} of 100.0 ms an image on a Pi" in shown.output
