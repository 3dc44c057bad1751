"""Devices without torch say what the farm's trainer would say, and nothing stops them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from client.cli import app
from client.infer import Classifier, Guess
from client.portable import in_8_bits, right, write_portable
from client.review import guess
from client.serving import Serving
from client.watch import Watcher, mark
from common.errors import DataError, DiskError, ModelError, QualityError, StateError
from common.images import open_folder
from common.portable import PortableBundle
from server.registry import Registry
from tests.lab.bundles import CLASSES, photographs_in, serve
from tests.lab.network import draw_folder
from tests.lab.versions import two_versions


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    """With a classifier of random weights."""
    registry = two_versions(tmp_path / "server")
    made = Serving(tmp_path / "apple" / "state" / "serving")
    serve(made, registry, 2, drawn(registry))
    return made


def drawn(registry: Registry) -> nn.Linear:
    """A classifier that tells images apart."""
    torch.manual_seed(0)
    classifier = nn.Linear(registry.manifest(2).spec.width, len(CLASSES))
    return classifier.requires_grad_(False)


@pytest.fixture
def bundle(serving: Serving, tmp_path: Path) -> Path:
    write_portable(serving, tmp_path / "apple.bundle")
    return tmp_path / "apple.bundle"


@pytest.fixture
def classifier(bundle: Path) -> Classifier:
    return Classifier(PortableBundle.read(bundle), threads=1)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return photographs_in(tmp_path / "camera")


def test_it_says_what_the_trainer_says(
    serving: Serving, classifier: Classifier, photographs: Path
) -> None:
    trainer = serving.current()
    assert trainer is not None
    seen = set()
    for image in sorted(photographs.glob("img*.png")):
        found, expected = classifier.classify(image), guess(trainer, image)
        assert [name for name, _ in found.ranked] == [name for name, _ in expected.ranked]
        shares = [share for _, share in found.ranked]
        assert shares == pytest.approx([share for _, share in expected.ranked], abs=1e-4)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert found.seconds > 0
        seen.add(shares[0])
    assert len(seen) > 1, "it says the same of every image"


def test_a_bundle_is_one_file_that_is_whole_or_refused(bundle: Path, tmp_path: Path) -> None:
    body = bundle.read_bytes()
    for cut in (0, 7, 1000, len(body) - 1):
        (tmp_path / "half").write_bytes(body[:cut])
        with pytest.raises(ModelError, match="half' is no bundle, or is damaged"):
            PortableBundle.read(tmp_path / "half")
    with pytest.raises(ModelError, match="no bundle at"):
        PortableBundle.read(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=f"fieldfed-client bundle {tmp_path} --out"):
        PortableBundle.read(tmp_path)  # a farm's folder, as a new user may try
    read = PortableBundle.read(bundle)
    read.weight = read.weight[:, 1:]
    read.write(tmp_path / "other")
    with pytest.raises(ModelError, match="does not fit its classes"):
        PortableBundle.read(tmp_path / "other")
    read.graph = b"no graph"
    with pytest.raises(ModelError, match="ONNX Runtime cannot run this"):
        Classifier(read)


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="fieldfed-client update"):
        write_portable(Serving(tmp_path / "serving"), tmp_path / "out")


def test_what_is_no_number_is_no_answer(bundle: Path, photographs: Path) -> None:
    read = PortableBundle.read(bundle)
    read.bias = np.full_like(read.bias, np.nan)
    with pytest.raises(QualityError, match="is no number"):
        Classifier(read).classify(photographs / "img0.png")


def test_the_commands(farm: Path, tmp_path: Path, photographs: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "made.bundle")
    said = runner.invoke(app, ["bundle", str(farm), "--out", out])
    assert said.exit_code == 0, said.output
    assert "version 2, 3 classes, fp32" in said.output
    done = runner.invoke(app, ["classify", out, str(photographs), "--json", "--threads", "1"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["image"]).name for line in lines] == [f"img{n}.png" for n in range(4)]
    assert all(line["class"] is None for line in lines), "a threshold of 1 is never reached"
    assert "broken.png" in done.stderr
    words = runner.invoke(app, ["classify", out, str(photographs / "img0.png")]).output
    assert "img0.png: not sure (" in words
    none = runner.invoke(app, ["classify", out, str(photographs / "broken.png")])
    assert "none of 1 files" in str(none.exception)


class Camera:
    """A watcher whose lines are collected."""

    def __init__(self, classifier: Classifier, folder: Path, quota: int | None = None) -> None:
        self.results = folder.parent / "results.jsonl"
        self.marked = folder / "marked"
        self.watcher = Watcher(
            classifier, folder, self.results, marked=self.marked, quota=quota, sleep=lambda _: None
        )

    def look(self) -> list[str]:
        """Names of what was classified."""
        return [line["image"] for line in self.watcher.look()]


def test_a_photograph_is_looked_at_once_it_is_complete(
    classifier: Classifier, photographs: Path
) -> None:
    camera = Camera(classifier, photographs)
    assert camera.look() == [], "it may still be written"
    assert len(camera.look()) == 5
    assert camera.look() == []
    late = photographs / "late.png"
    late.write_bytes((photographs / "img0.png").read_bytes()[:100])
    assert camera.look() == []
    late.write_bytes((photographs / "img0.png").read_bytes())
    assert camera.look() == [], "it has changed since the last look"
    assert camera.look() == ["late.png"]
    again = Camera(classifier, photographs)
    again.look()
    assert again.look() == [], "a restart looks at everything anew"
    lines = [json.loads(text) for text in camera.results.read_text().split("\n") if text]
    assert len(lines) == 6
    broken = [line for line in lines if "error" in line]
    assert [line["image"] for line in broken] == ["broken.png"]
    assert {line.get("version") for line in lines} == {2, None}
    assert len(list(camera.marked.glob("*.jpg"))) == 5


def test_half_a_line_is_left_out(classifier: Classifier, photographs: Path) -> None:
    camera = Camera(classifier, photographs)
    camera.look()
    camera.look()
    text = camera.results.read_bytes()
    camera.results.write_bytes(text[:-20])
    again = Camera(classifier, photographs)
    again.look()
    assert len(again.look()) == 1
    lines = camera.results.read_bytes().split(b"\n")
    assert json.loads(lines[-1])["image"]


def test_lines_are_numbered_upwards_also_when_the_clock_goes_back(
    classifier: Classifier, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = Camera(classifier, photographs)
    camera.look()
    camera.look()
    monkeypatch.setattr("client.watch.time.time_ns", lambda: 1_000_000)
    again = Camera(classifier, photographs)
    (photographs / "late.png").write_bytes((photographs / "img0.png").read_bytes())
    again.look()
    assert again.look() == ["late.png"]
    texts = camera.results.read_text().split("\n")
    numbers = [json.loads(text)["number"] for text in texts if text]
    assert len(numbers) == 6
    assert numbers == sorted(set(numbers))
    assert numbers[0] > 10**15


def test_lines_wait_for_room_on_the_disk(
    classifier: Classifier, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskError("no space left")

    camera = Camera(classifier, photographs)
    with monkeypatch.context() as patch:
        patch.setattr("client.watch.append", full)
        camera.look()
        assert len(camera.look()) == 5
        assert not camera.results.exists()
    assert camera.look() == []
    lines = [json.loads(text) for text in camera.results.read_text().split("\n") if text]
    assert len(lines) == 5
    assert [line["number"] for line in lines] == sorted(line["number"] for line in lines)


def test_the_oldest_go_when_there_is_no_room(classifier: Classifier, photographs: Path) -> None:
    sizes = {}
    for number, path in enumerate(sorted(photographs.glob("*.png"))):
        os.utime(path, (number, number))
        sizes[path.name] = path.stat().st_size
    quota = sizes["img3.png"] + sizes["img2.png"]
    camera = Camera(classifier, photographs, quota)
    camera.look()
    assert len(list(photographs.glob("*.png"))) == 5, "nothing goes before it has a line"
    camera.look()
    assert sorted(path.name for path in photographs.glob("*.png")) == ["img2.png", "img3.png"]
    assert (photographs / "notes.txt").exists()


def test_the_result_is_written_on_a_copy(tmp_path: Path, photographs: Path) -> None:
    image = photographs / "img0.png"
    before = image.read_bytes()
    path = mark(Guess(image, (("scab", 0.9), ("healthy", 0.1)), True), tmp_path / "marked")
    copy = np.asarray(Image.open(path))
    plain = np.asarray(Image.open(image))
    assert copy.shape == plain.shape
    assert np.abs(copy[:20].astype(int) - plain[:20]).mean() > 20
    assert image.read_bytes() == before


def test_results_that_grow_long_become_the_older_ones(
    classifier: Classifier, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.watch.RESULT_BYTES", 500)
    camera = Camera(classifier, photographs)
    camera.look()
    assert len(camera.look()) == 5
    older = camera.results.with_name("results.1.jsonl")
    assert older.exists()
    assert camera.results.stat().st_size < 1500


def test_a_sure_answer_is_named() -> None:
    sure = Guess(Path("a.jpg"), (("scab", 0.91), ("rust", 0.09)), True)
    assert sure.words() == "scab 0.91, rust 0.09"
    assert sure.fields()["class"] == "scab"


@pytest.fixture
def farm(tmp_path: Path, serving: Serving) -> Path:
    """The farm's folder, with drawn images of its own."""
    data = draw_folder(tmp_path / "photos", len(CLASSES), 20, 1)
    for part in ("train", "test"):
        for number, name in enumerate(CLASSES):
            (data / part / f"class{number}").rename(data / part / name)
    made = CliRunner().invoke(app, ["init", str(tmp_path / "apple"), "--data", str(data)])
    assert made.exit_code == 0, made.output
    assert serving.current() is not None
    return tmp_path / "apple"


def test_8_bits_are_smaller_and_agree(farm: Path, tmp_path: Path) -> None:
    plain, small = tmp_path / "fp32.bundle", tmp_path / "int8.bundle"
    runner = CliRunner()
    assert runner.invoke(app, ["bundle", str(farm), "--out", str(plain)]).exit_code == 0
    said = runner.invoke(app, ["bundle", str(farm), "--out", str(small), "--int8"])
    assert said.exit_code == 0, said.output
    assert "3 classes, int8" in said.output
    assert small.stat().st_size < 0.8 * plain.stat().st_size
    folder = open_folder(tmp_path / "photos")
    pair = [Classifier(PortableBundle.read(path)) for path in (plain, small)]
    assert [one.about.precision for one in pair] == ["fp32", "int8"]
    apart = []
    for image in folder.decide.paths:
        shares = [dict(one.classify(image).ranked) for one in pair]
        apart.append(max(abs(shares[0][name] - shares[1][name]) for name in CLASSES))
    assert 0 < max(apart) < 0.1


def test_images_that_cannot_be_read_are_left_out_of_8_bits(farm: Path, bundle: Path) -> None:
    folder, plain = open_folder(farm.parent / "photos"), PortableBundle.read(bundle)
    rest = folder.decide.paths[1:]
    pairs = zip(rest, folder.decide.labels[1:], strict=True)
    said = [Classifier(plain).classify(path).label == CLASSES[label] for path, label in pairs]
    for part in (folder.fit, folder.decide):
        part.paths[0].write_bytes(b"no image")
    assert in_8_bits(plain, folder).about.precision == "int8"
    assert right(Classifier(plain), folder) == pytest.approx(np.mean(said))
    for path in rest:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="images to judge by can be read"):
        in_8_bits(plain, folder)
    for path in folder.fit.paths:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="images to calibrate on can be read"):
        in_8_bits(plain, folder)


def test_8_bits_that_are_worse_are_not_written(
    farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.9, 0.87])
    monkeypatch.setattr("client.portable.right", lambda *_: next(shares))
    out = tmp_path / "int8.bundle"
    said = CliRunner().invoke(app, ["bundle", str(farm), "--out", str(out), "--int8"])
    assert isinstance(said.exception, QualityError)
    assert "right about 0.870" in str(said.exception)
    assert not out.exists()


def test_the_share_that_is_right(classifier: Classifier, farm: Path, tmp_path: Path) -> None:
    assert farm.is_dir()
    folder = open_folder(tmp_path / "photos")
    expected = [classifier.classify(path).label == path.parent.name for path in folder.decide.paths]
    assert right(classifier, folder) == pytest.approx(np.mean(expected))
