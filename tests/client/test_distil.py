"""A small network learns from what a farm serves with, and goes out as a bundle like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

from client.cli import app
from client.distil import DistilConfig, portable_student, teach
from client.infer import Classifier
from client.portable import calibrated
from client.serving import Bundle, Serving
from common import fit
from common.distil import map_distance
from common.errors import ModelError
from common.images import FarmFolder, open_folder
from common.spec import ModelSpec
from common.student import Student
from server.registry import Registry
from tests.lab.bundles import about, serve
from tests.lab.network import draw_folder
from tests.lab.versions import two_versions

STUDENT = "mobilenetv3_small_050"
CLASSES = ("class0", "class1", "class2")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return two_versions(tmp_path / "server")


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """A farm's folder with drawn images."""
    data = draw_folder(tmp_path / "photos", len(CLASSES), 24, 1)
    made = CliRunner().invoke(app, ["init", str(tmp_path / "apple"), "--data", str(data)])
    assert made.exit_code == 0, made.output
    return tmp_path / "apple"


@pytest.fixture
def folder(farm: Path, tmp_path: Path) -> FarmFolder:
    assert farm.is_dir()
    return open_folder(tmp_path / "photos")


def put_in_use(farm: Path, registry: Registry, folder: FarmFolder) -> Bundle:
    """A version with a classifier that is fitted to the farm's images."""
    serving = Serving(farm / "state" / "serving")
    model, spec = loaded(registry)
    classifier = fit.fit_classifier(*fit.extract(model, folder.fit, spec), len(CLASSES))
    serve(serving, registry, 2, classifier)
    named = about(registry, 2).model_copy(update={"classes": CLASSES})
    serving.commit(named, classifier)
    bundle = serving.current()
    assert bundle is not None
    return bundle


def loaded(registry: Registry) -> tuple[VisionTransformer, ModelSpec]:
    """The second version."""
    from server.publish import load

    return load(registry, 2)


def config(**changes: object) -> DistilConfig:
    """Of a lesson that takes seconds."""
    values = {"student": STUDENT, "epochs": 3, "batch_size": 8} | changes
    return DistilConfig.model_validate(values)


def test_a_student_learns_and_is_the_same_twice(
    farm: Path, registry: Registry, folder: FarmFolder
) -> None:
    teacher = put_in_use(farm, registry, folder)
    before = [parameter.clone() for parameter in teacher.model.parameters()]
    made = teach(teacher, folder, config(epochs=6))
    assert made.accuracy > 1 / 3, "not better than a guess"
    assert len(made.curve) == 6 and made.accuracy == max(made.curve)
    assert all(map(torch.equal, before, teacher.model.parameters())), "the teacher has learnt"
    found = fit.evaluate(
        made.classifier, *fit.extract(made.student, folder.decide, teacher.about.manifest.spec)
    )
    assert found.accuracy == made.accuracy, "it is not the student of the best epoch"
    again = teach(teacher, folder, config(epochs=6))
    assert torch.equal(again.classifier.weight, made.classifier.weight)


def test_soft_answers_change_what_is_learnt(
    farm: Path, registry: Registry, folder: FarmFolder
) -> None:
    teacher = put_in_use(farm, registry, folder)
    learnt = [
        teach(teacher, folder, config(epochs=1, alpha=alpha)).classifier.weight for alpha in (0, 1)
    ]
    assert not torch.equal(*learnt)


def test_labels_alone_need_no_teacher(farm: Path, registry: Registry, folder: FarmFolder) -> None:
    teacher = put_in_use(farm, registry, folder)
    asked: list[int] = []
    teacher.model.register_forward_hook(lambda _m, _i, out: asked.append(len(out)))
    teach(teacher, folder, config(epochs=2, alpha=0, beta=0))
    assert sum(asked) == len(folder.decide), "it is judged once, for comparison"


def test_convolutions_become_8_bits(farm: Path, registry: Registry, folder: FarmFolder) -> None:
    teacher = put_in_use(farm, registry, folder)
    plain = portable_student(teach(teacher, folder, config(epochs=1)), teacher)
    small = calibrated(plain, folder.fit)
    assert len(small.graph) < 0.4 * len(plain.graph)
    assert small.about.precision == "int8"
    images = next(iter(folder.decide.batches(plain.about, 8)))[0].numpy()
    said = [Classifier(one).logits(images) for one in (plain, small)]
    assert 0 < np.abs(said[0] - said[1]).max() < 0.5 * np.abs(said[0]).max()


def test_maps_teach_the_network_where_to_look() -> None:
    student = Student(STUDENT)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert student(images).shape == (2, student.width)
    assert student.map.shape == (2, 3, 3)
    wanted = torch.zeros(2, 6, 6)
    wanted[:, :2, :2] = 1
    rate, apart = 0.01, []
    optimiser = torch.optim.Adam(student.parameters(), lr=rate)
    for _ in range(8):
        student(images)
        distance = map_distance(student.map, wanted)
        optimiser.zero_grad()
        distance.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        apart.append(float(distance.detach()))
    assert apart[-1] < 0.5 * apart[0]


def test_a_student_is_a_bundle_like_any_other(
    farm: Path, registry: Registry, folder: FarmFolder, tmp_path: Path
) -> None:
    teacher = put_in_use(farm, registry, folder)
    made = teach(teacher, folder, config(epochs=1))
    classifier = Classifier(portable_student(made, teacher))
    spec = teacher.about.manifest.spec
    features, _ = fit.extract(made.student, folder.decide, spec)
    with torch.inference_mode():
        shares = (made.classifier(features) / made.temperature).softmax(1)
    for image, expected in zip(folder.decide.paths, shares, strict=True):
        found = dict(classifier.classify(image).ranked)
        assert found[CLASSES[0]] == pytest.approx(float(expected[0]), abs=1e-3)
    out = tmp_path / "small.bundle"
    flags = ["--student", STUDENT, "--epochs", "1", "--out", str(out)]
    said = CliRunner().invoke(app, ["distil", str(farm), *flags])
    assert said.exit_code == 0, said.output
    assert "right about" in said.output
    assert out.stat().st_size > 1_000_000


def test_what_cannot_be_taught(
    farm: Path, registry: Registry, folder: FarmFolder, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="timm has no 'mobilenet_of_mine'"):
        Student("mobilenet_of_mine")
    save_file({"conv_stem.weight": torch.zeros(2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match=r"wrong\.safetensors' has not the weights of"):
        Student(STUDENT, tmp_path / "wrong.safetensors")
    teacher = put_in_use(farm, registry, folder)
    named = teacher.about.model_copy(update={"classes": ("a", "b", "c")})
    other = Bundle(named, teacher.model, teacher.classifier)
    with pytest.raises(ModelError, match="the farm's classes are others"):
        teach(other, folder, config())
    said = CliRunner().invoke(
        app, ["distil", str(tmp_path / "apple"), "--out", "x", "--epochs", "0"]
    )
    assert said.exit_code != 0
