"""What a person types wrong, and the one line that they read."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.backbone import save_backbone
from tests.lab.network import draw_folder
from tests.lab.versions import model_of

BIN = Path(sys.executable).parent


def refused(code: int, *arguments: str) -> str:
    done = subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]], capture_output=True, text=True, timeout=120
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return " ".join(said.split())


def test_an_unknown_backbone_names_one_that_exists(tmp_path: Path) -> None:
    said = refused(4, "fieldfed-server", "init", str(tmp_path / "n"), "--backbone", "vit_smoll")
    assert "unknown backbone 'vit_smoll'" in said
    assert "vit_small_patch14_dinov2" in said


def test_a_backbone_that_cannot_be_pruned(tmp_path: Path) -> None:
    said = refused(4, "fieldfed-server", "init", str(tmp_path / "n"), "--backbone", "resnet18")
    assert "resnet18" in said


def test_missing_weights(tmp_path: Path) -> None:
    network = str(tmp_path / "network")
    flags = ("--weights", str(tmp_path / "none.safetensors"), "--backbone", "vit_tiny_patch16_224")
    subprocess.run([str(BIN / "fieldfed-server"), "init", network, *flags], check=True, timeout=120)
    assert "no weights at" in refused(4, "fieldfed-server", "pretrain", network)


def test_a_missing_data_folder(tmp_path: Path) -> None:
    said = refused(
        3, "fieldfed-client", "init", str(tmp_path / "f"), "--data", str(tmp_path / "nothing")
    )
    assert "nothing" in said


def test_an_empty_class(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", 2, 10, 0)
    (data / "train" / "class9").mkdir()
    said = refused(3, "fieldfed-client", "init", str(tmp_path / "f"), "--data", str(data))
    assert "class9" in said


def test_a_one_class_farm(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", 1, 10, 0)
    said = refused(3, "fieldfed-client", "init", str(tmp_path / "f"), "--data", str(data))
    assert "class" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("prune-heads", "0"), ("prune-heads", "1.5"), ("prune-macs", "1"), ("prune-macs", "-0.2")],
)
def test_a_budget_outside_its_range(name: str, value: str, tmp_path: Path) -> None:
    network = tmp_path / "network"
    network.mkdir()
    (network / "server.toml").write_text("seed = 0\n")
    said = refused(2, "fieldfed-server", "train", str(network), f"--{name}", value)
    assert name.replace("-", "_") in said


def test_rounds_that_are_too_few(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("[plan]\nrounds = 1\nprune_heads = 0.4\n")
    said = refused(6, "fieldfed-server", "train", str(tmp_path))
    assert "base.safetensors' yet; make it with: fieldfed-server pretrain" in said
    save_backbone(tmp_path / "base.safetensors", *model_of())
    said = refused(2, "fieldfed-server", "train", str(tmp_path))
    assert "plan.rounds=1 is too few for plan.prune_events=2 after plan.warmup=1" in said


def test_a_label_that_names_a_baseline(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("seed = 0\n")
    said = refused(2, "fieldfed-server", "train", str(tmp_path), "--label", "probe")
    assert "baseline" in said


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("[plan]\nroundz = 3\n")
    assert "plan.roundz" in refused(2, "fieldfed-server", "pretrain", str(tmp_path))


def test_no_settings(tmp_path: Path) -> None:
    assert "init" in refused(2, "fieldfed-server", "up", str(tmp_path))


def test_status_before_the_first_run(tmp_path: Path) -> None:
    assert "no run" in refused(6, "fieldfed-server", "status", str(tmp_path))


def test_demo_without_farms(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    said = refused(3, "fieldfed-server", "demo", "--data", str(tmp_path), "--out", out)
    assert "no farms in" in said


@pytest.mark.parametrize("program", ["fieldfed-server", "fieldfed-client"])
def test_help_has_examples(program: str) -> None:
    top = subprocess.run([str(BIN / program), "--help"], capture_output=True, text=True)
    assert top.returncode == 0
    name = "train" if program == "fieldfed-server" else "run"
    said = subprocess.run([str(BIN / program), name, "--help"], capture_output=True, text=True)
    assert "Example" in said.stdout
