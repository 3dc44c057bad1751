"""A farm gets the student that all have taught as a bundle, with what is its own."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.infer import Classifier
from client.state import FarmState
from common import backbone
from common.errors import StateError
from common.images import open_folder
from common.portable import PortableBundle
from common.student import Student, student_spec
from tests.lab.network import draw_folder
from tests.lab.school import STUDENT
from tests.lab.versions import model_of


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """A farm's folder with drawn images."""
    data = draw_folder(tmp_path / "photos", 3, 24, 1)
    made = CliRunner().invoke(app, ["init", str(tmp_path / "apple"), "--data", str(data)])
    assert made.exit_code == 0, made.output
    return tmp_path / "apple"


def keep(farm: Path, seed: int = 0) -> str:
    student = Student(STUDENT, seed=seed).eval()
    spec = student_spec(student, model_of()[1])
    digest = backbone.digest(student, spec)
    FarmState(farm / "state").save_student(digest, student, spec)
    return digest


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_is_written_and_classifies(farm: Path, tmp_path: Path, precision: str) -> None:
    digest, out = keep(farm), tmp_path / "small.bundle"
    flags = ["--int8"] if precision == "int8" else []
    said = CliRunner().invoke(app, ["student", str(farm), "--out", str(out), *flags])
    assert said.exit_code == 0, said.output
    assert f"{STUDENT} ({digest[:12]}): right about" in said.output
    bundle = PortableBundle.read(out)
    assert (bundle.about.precision, bundle.about.backbone) == (precision, STUDENT)
    assert bundle.about.classes == ("class0", "class1", "class2")
    image = open_folder(tmp_path / "photos").decide.paths[0]
    assert Classifier(bundle).classify(image).label in bundle.about.classes


def test_a_damaged_one_is_passed_over_for_the_one_before(farm: Path, tmp_path: Path) -> None:
    older = keep(farm)
    newer = keep(farm, 1)
    path = farm / "state" / "students" / f"{newer}.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    out = tmp_path / "small.bundle"
    said = CliRunner().invoke(app, ["student", str(farm), "--out", str(out)])
    assert said.exit_code == 0, said.output
    assert older[:12] in said.output


def test_a_farm_that_has_taught_none(farm: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["student", str(farm), "--out", str(tmp_path / "x")])
    assert isinstance(said.exception, StateError)
    assert "this farm has taught no student yet" in str(said.exception)
    assert not (tmp_path / "x").exists()
