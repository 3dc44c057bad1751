"""A person is asked about what the device is not sure about, and about nothing else."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from client.cli import app
from client.device import Device
from client.infer import Guess, images_in
from client.labels import Labels
from client.review import guess, review
from client.serving import Bundle
from common.config import FarmConfig
from common.errors import QualityError
from common.settings import load_settings
from server.publish import load
from server.registry import Registry
from tests.lab.bundles import CLASSES, about, favouring, photographs_in, serve, serving_of
from tests.lab.hub import LabHub
from tests.lab.network import draw_folder
from tests.lab.versions import two_versions


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return two_versions(tmp_path / "server")


@pytest.fixture
def bundle(registry: Registry) -> Bundle:
    model, spec = load(registry, 1)
    return Bundle(about(registry, 1), model, favouring(spec.width, 1))


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    images = tmp_path / "images"
    for name in CLASSES:
        (images / name).mkdir(parents=True)
    return Labels(tmp_path / "labels.jsonl", images)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return photographs_in(tmp_path / "camera")


def test_answers_become_labels(bundle: Bundle, labels: Labels, photographs: Path) -> None:
    answers = {"img0.png": "healthy", "img1.png": "scab", "img2.png": None, "img3.png": "mildew"}
    asked = []

    def ask(found: Guess) -> str | None:
        asked.append(found.image.name)
        return answers[found.image.name]

    images = images_in(photographs)
    assert review(bundle, labels, images, ask) == 3
    assert asked == sorted(answers)
    assert labels.classes == ("black rot", "healthy", "mildew", "scab")
    part, classes = labels.since(datetime(2020, 1, 1, tzinfo=UTC), 10)
    assert [classes[label] for label in part.labels] == ["healthy", "scab", "mildew"]
    asked.clear()
    assert review(bundle, labels, images, ask) == 0
    assert asked == ["img2.png"], "only what was skipped is asked about again"


def test_what_it_is_sure_about_is_not_asked(
    bundle: Bundle, registry: Registry, labels: Labels, photographs: Path
) -> None:
    sure = Bundle(about(registry, 1, 0.5), bundle.model, bundle.classifier)

    def ask(_found: Guess) -> str | None:
        raise AssertionError("asked")

    assert review(sure, labels, images_in(photographs), ask) == 0


def test_a_guess_is_a_ranking(bundle: Bundle, photographs: Path) -> None:
    found = guess(bundle, photographs / "img0.png")
    assert found.label == "healthy"
    probability = np.exp(2) / (np.exp(2) + 2)
    assert found.ranked[0][1] == pytest.approx(probability, abs=1e-5)
    assert sum(share for _, share in found.ranked) == pytest.approx(1, abs=1e-5)
    assert not found.sure


def test_no_number_is_no_answer(bundle: Bundle, photographs: Path) -> None:
    with torch.no_grad():
        bundle.classifier.bias[0] = torch.nan
    with pytest.raises(QualityError, match="is no number"):
        guess(bundle, photographs / "img0.png")


def test_a_backbone_that_cannot_run_is_no_answer(bundle: Bundle, photographs: Path) -> None:
    broken = Bundle(bundle.about, bundle.model, nn.Linear(7, 3))
    with pytest.raises(QualityError, match="cannot be run"):
        guess(broken, photographs / "img0.png")


@pytest.fixture
def farm(tmp_path: Path, registry: Registry) -> Path:
    """A farm's folder; it is a member, and serves with nothing yet."""
    folder = tmp_path / "farms" / "apple"
    data = draw_folder(tmp_path / "photos", 3, 6, 1)
    runner = CliRunner()
    assert runner.invoke(app, ["init", str(folder), "--data", str(data)]).exit_code == 0
    hub = LabHub(tmp_path / "server")
    config = load_settings(FarmConfig, folder / "farm.toml")
    hub.join(Device(config, folder / "state"), "apple", registry.keys.text)
    return folder


def test_a_version_that_fails_in_use_is_given_up(
    farm: Path, registry: Registry, photographs: Path
) -> None:
    width = registry.manifest(1).spec.width
    serve(serving_of(farm), registry, 1, favouring(width, 1))
    serve(serving_of(farm), registry, 2, favouring(width, 0, float("nan")))
    known = "class0, class1, class2"
    words = "\ny\n" + "scab\nn\nclass1\n" + "-\n" + "class0\n"
    done = CliRunner().invoke(app, ["label", str(farm), str(photographs)], input=words)
    assert done.exit_code == 0, done.output
    assert "what it says of an image is no number; version 1 is in use again" in done.output
    assert "img0.png: healthy 0.79" in done.output
    assert f"no class 'healthy'; there are {known}. Is it a new one?" in done.output
    assert f"no class 'scab'; there are {known}, healthy. Is it a new one?" in done.output
    assert done.output.rstrip().endswith("3 images are labelled")
    serving = serving_of(farm)
    kept = serving.about()
    assert kept is not None
    assert kept.manifest.counter == 1
    reason = serving.rejected(registry.row(2).digest)
    assert reason == "what it says of an image is no number"


def test_without_a_version_there_is_nothing_to_ask(farm: Path, photographs: Path) -> None:
    done = CliRunner().invoke(app, ["label", str(farm), str(photographs)])
    assert done.exit_code != 0
    assert "fieldfed-client update" in str(done.exception)
