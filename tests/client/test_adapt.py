"""A newcomer makes a backbone that others have pruned its own."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from client.adapt import adapt, fuller_than
from client.base import Base, newest_base
from client.cli import app
from client.infer import Classifier
from client.state import FarmState
from common import backbone
from common.errors import ModelError, StateError
from common.images import FarmFolder, open_folder
from common.mask import Keep
from common.portable import PortableBundle
from common.student import Student, student_spec
from common.surgery import prune
from tests.common.test_surgery import drawn_model
from tests.lab.network import draw_folder
from tests.lab.school import STUDENT
from tests.lab.versions import model_of

SPEC = backbone.dense_spec(
    "vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 8}
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "photos", 3, 24, 1)


@pytest.fixture
def farm(tmp_path: Path, photos: Path) -> Path:
    made = CliRunner().invoke(app, ["init", str(tmp_path / "rice"), "--data", str(photos)])
    assert made.exit_code == 0, made.output
    return tmp_path / "rice"


@pytest.fixture
def folder(photos: Path) -> FarmFolder:
    return open_folder(photos)


def dense(path: Path) -> Path:
    """What the server had before the cut, as a file."""
    backbone.save_backbone(path, drawn_model(SPEC), SPEC)
    return path


def pruned() -> Base:
    """What is left of it."""
    keep = Keep(
        (torch.tensor([1, 2]).numpy(), torch.arange(4).numpy()),
        tuple(torch.arange(0, count, 3).numpy() for count in SPEC.neurons),
    )
    model, spec = prune(drawn_model(SPEC), SPEC, keep)
    return Base(model, spec, backbone.digest(model, spec))


def state_with(folder: Path, *bases: Base) -> FarmState:
    state = FarmState(folder)
    for one in bases:
        state.save_backbone(one.digest, *one.transformer())
    return state


def test_it_is_told_what_the_cut_cost_and_the_shared_one_stays(folder: FarmFolder) -> None:
    base, fuller = pruned(), drawn_model(SPEC)
    made = adapt(base, folder, (fuller, SPEC), rounds=0)
    model, spec = base.transformer()
    assert backbone.digest(model, spec) == base.digest
    assert made.spec == spec
    images = next(iter(folder.fit.batches(spec, 64)))[0]
    with torch.no_grad():
        said, shared, whole = (one(images) for one in (made.model, model, fuller))
    assert (said - whole).square().mean() < 0.5 * (shared - whole).square().mean()


def test_training_follows_and_the_seed_says_how(folder: FarmFolder) -> None:
    base, fuller = pruned(), (drawn_model(SPEC), SPEC)
    told = adapt(base, folder, fuller, rounds=0)
    digests = [
        backbone.digest(made.model, made.spec)
        for made in (
            told,
            adapt(base, folder, fuller, rounds=1),
            adapt(base, folder, fuller, rounds=1),
            adapt(base, folder, fuller, rounds=1, seed=1),
        )
    ]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_without_a_fuller_one_and_without_rounds_it_is_what_all_share(folder: FarmFolder) -> None:
    made = adapt(pruned(), folder, None, rounds=0)
    assert backbone.digest(made.model, made.spec) == pruned().digest
    assert made.accuracy == made.shared


def test_what_was_there_before_the_cut_is_found_on_the_device(tmp_path: Path) -> None:
    whole = Base(drawn_model(SPEC), SPEC, backbone.digest(drawn_model(SPEC), SPEC))
    state = state_with(tmp_path, whole, pruned())
    assert newest_base(state).digest == pruned().digest
    found = fuller_than(newest_base(state), state, None)
    assert found is not None
    assert backbone.digest(*found) == whole.digest
    assert fuller_than(whole, state, None) is None, "nothing of it was cut"


def test_where_there_is_none_a_farm_is_told_what_to_do(tmp_path: Path) -> None:
    state = state_with(tmp_path / "state", pruned())
    with pytest.raises(StateError, match=r"mask export --dense dense\.safetensors"):
        fuller_than(newest_base(state), state, None)
    another = backbone.dense_spec(SPEC.name, SPEC.image_size, {"depth": 4})
    model = drawn_model(another)
    state.save_backbone(backbone.digest(model, another), model, another)
    with pytest.raises(StateError, match="no backbone of before a cut is on this device"):
        fuller_than(pruned(), state, None)
    cut = tmp_path / "cut.safetensors"
    backbone.save_backbone(cut, *pruned().transformer())
    with pytest.raises(StateError, match=r"cut\.safetensors' has no more heads and neurons"):
        fuller_than(pruned(), state, cut)
    with pytest.raises(StateError, match="this farm has no backbone yet"):
        newest_base(FarmState(tmp_path / "new"))


def test_a_student_cannot_be_adapted(folder: FarmFolder) -> None:
    student = Student(STUDENT)
    with pytest.raises(ModelError, match="is a student"):
        adapt(Base(student, student_spec(student, model_of()[1]), "d" * 64), folder, None)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_newcomer_gets_a_file_for_its_devices(
    farm: Path, photos: Path, tmp_path: Path, precision: str
) -> None:
    cut, out = tmp_path / "cut.safetensors", tmp_path / "rice.bundle"
    backbone.save_backbone(cut, *pruned().transformer())
    runner = CliRunner()
    assert runner.invoke(app, ["load", str(farm), str(cut)]).exit_code == 0
    asked = ["adapt", str(farm), "--out", str(out), "--rounds", "1"]
    asked += ["--int8"] if precision == "int8" else []
    refused = runner.invoke(app, asked)
    assert isinstance(refused.exception, StateError)
    assert not out.exists()
    said = runner.invoke(app, [*asked, "--dense", str(dense(tmp_path / "base.safetensors"))])
    assert said.exit_code == 0, said.output
    assert "of the decide part" in said.output
    assert "as all farms share it" in said.output
    bundle = PortableBundle.read(out)
    assert (bundle.about.precision, bundle.about.classes) == (
        precision,
        ("class0", "class1", "class2"),
    )
    image = open_folder(photos).decide.paths[0]
    assert Classifier(bundle).classify(image).label in bundle.about.classes
