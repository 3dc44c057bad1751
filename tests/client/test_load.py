"""``fieldfed-client load``: a backbone comes from a file instead of over the link."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.state import FarmState
from common import backbone
from common.errors import FieldfedError
from tests.lab.network import SIDE, TINY, draw_folder

SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    data = draw_folder(tmp_path / "photos", 2, 10, 1)
    folder = tmp_path / "farm"
    folder.mkdir()
    (folder / "farm.toml").write_text(f'[farm]\nname = "oak"\ndata = "{data}"\n')
    return folder


def test_the_farm_holds_it_afterwards(farm: Path, tmp_path: Path) -> None:
    model, file = backbone.build(SPEC), tmp_path / "base.safetensors"
    backbone.save_backbone(file, model, SPEC)
    done = CliRunner().invoke(app, ["load", str(farm), str(file)])
    assert done.exit_code == 0, done.output
    digest = backbone.digest(model, SPEC)
    assert FarmState(farm / "state").held() == (digest,)
    assert digest[:12] in done.output


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_file_that_is_no_backbone_is_named(farm: Path, tmp_path: Path, harm: str) -> None:
    file = tmp_path / "base.safetensors"
    if harm == "cut":
        backbone.save_backbone(file, backbone.build(SPEC), SPEC)
        file.write_bytes(file.read_bytes()[:-100])
    done = CliRunner().invoke(app, ["load", str(farm), str(file)])
    assert isinstance(done.exception, FieldfedError)
    assert str(file) in str(done.exception)
    assert FarmState(farm / "state").held() == ()
