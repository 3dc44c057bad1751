"""What the demo plays: its own settings, changed by a file, changed by options."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config import ServerConfig
from common.errors import ConfigError
from server.demo import DRAWN_BACKBONE, DemoOptions, Stage, _prepare, _settings
from server.provenance import provenance


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "source" / "tomato").mkdir(parents=True)
    return tmp_path / "data"


def settings_of(out: Path, **options: Any) -> ServerConfig:
    return _settings(Stage(DemoOptions(out=out, **options), Console(quiet=True)), 3)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_drawn_plants_have_a_backbone_that_learns_them(data: Path) -> None:
    config = settings_of(data.parent)
    assert config.backbone.model_copy(update={"source": None}) == DRAWN_BACKBONE
    assert (config.plan.rounds, config.plan.prune_heads) == (3, 0.4)
    assert (config.rounds.min_farms, config.rounds.max_in_flight) == (3, 3)


def test_folders_of_ones_own_have_the_default_backbone(data: Path) -> None:
    config = settings_of(data.parent, data=data, weights="vit.safetensors", prune_macs=0.5)
    assert config.backbone.weights == "vit.safetensors"
    assert config.backbone.source == data / "source" / "tomato"
    assert (config.plan.prune_heads, config.plan.prune_macs, config.plan.rounds) == (None, 0.5, 6)


def test_a_file_changes_what_it_names_and_options_change_the_file(data: Path) -> None:
    path = written(
        data.parent,
        '[train]\ntrainable = "bias"\n[plan]\nrounds = 9\ncriterion = "magnitude"\n'
        "[plan.targets]\nmacs_ratio = 0.5\nmax_drop_ratio = 0.02\n[backbone]\nepochs = 4\n",
    )
    config = settings_of(data.parent, settings=path)
    assert config.train.trainable == "bias"
    assert (config.plan.rounds, config.plan.criterion) == (9, "magnitude")
    assert config.plan.targets is not None
    assert config.plan.prune_heads is None
    assert (config.backbone.epochs, config.backbone.options) == (4, DRAWN_BACKBONE.options)
    other = settings_of(
        data.parent, settings=path, rounds=3, prune_heads=0.3, criterion="taha", seed=5
    )
    assert (other.plan.rounds, other.plan.criterion, other.seed) == (3, "taha", 5)
    assert (other.plan.prune_heads, other.plan.targets) == (0.3, None)


def test_rounds_too_few_for_the_cuts_are_told_before_anything_is_trained(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan\.rounds=2 is too few"):
        settings_of(data.parent, rounds=2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nepoch = 3\n", "train.epoch"),
        ("seed = 3\n", "'seed'"),
        ("[door]\nport = 9000\n", "'door'"),
    ],
)
def test_what_a_file_may_not_say_is_named(text: str, named: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        settings_of(data.parent, settings=written(data.parent, text))


def test_a_result_says_which_settings_were_not_the_defaults(data: Path) -> None:
    config = settings_of(data.parent, criterion="magnitude", data=data)
    told = provenance("test", 0, config).settings
    assert told["plan"] == {"criterion": "magnitude", "prune_heads": 0.4, "moments": "farms"}
    assert told["rounds"] == {"min_farms": 3, "max_in_flight": 4}
    assert "server" not in told
    assert provenance("test", 0).settings == {}


def test_what_a_run_writes_is_nothing_that_git_would_take(data: Path, tmp_path: Path) -> None:
    (data / "farms" / "oak").mkdir(parents=True)
    for out, before in ((tmp_path / "mine", None), (tmp_path / "project", "build/\n")):
        out.mkdir()
        if before is not None:
            (out / ".gitignore").write_text(before)
        _prepare(Stage(DemoOptions(out=out, data=data), Console(quiet=True)))
        assert (out / ".gitignore").read_text() == (before or "*\n")
