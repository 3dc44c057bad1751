"""Models are measured side by side, with what each of them can tell."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.bench import labelled, measured
from client.cli import app
from client.footprint import peak_bytes
from client.infer import Classifier
from client.portable import write_portable
from client.review import guess
from client.scatter import COLOURS, Point, draw
from client.serving import Serving
from client.subjects import ONNX, TORCH, opened
from common import backbone
from common.backbone import macs, parameters
from common.errors import ConfigError, DataError, ModelError
from common.pixels import load_image, normalise
from common.portable import PortableBundle
from tests.lab.bundles import CLASSES, serve
from tests.lab.network import SIDE, draw_folder
from tests.lab.versions import two_versions


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A farm's folder that serves with a version, its images beside it."""
    root = tmp_path_factory.mktemp("bench")
    data = draw_folder(root / "photos", len(CLASSES), 10, 1)
    for number, name in enumerate(CLASSES):
        for part in ("train", "test"):
            (data / part / f"class{number}").rename(data / part / name)
    (root / "apple").mkdir()
    (root / "apple" / "farm.toml").write_text(
        f'[farm]\nname = "apple"\ndata = "{data}"\nsuperlink = "127.0.0.1:1"\n'
    )
    from tests.client.test_infer import drawn

    registry = two_versions(root / "server")
    serving = Serving(root / "apple" / "state" / "serving")
    serve(serving, registry, 2, drawn(registry))
    write_portable(serving, root / "apple.bundle")
    return root / "apple"


@pytest.fixture
def files(farm: Path, tmp_path: Path) -> dict[str, Path]:
    """What the farm serves with, in every form."""
    bundle = Serving(farm / "state" / "serving").in_use()
    read = PortableBundle.read(farm.with_name("apple.bundle"))
    (tmp_path / "graph.onnx").write_bytes(read.graph)
    backbone.save_backbone(tmp_path / "base.safetensors", bundle.model, bundle.about.manifest.spec)
    return {
        "bundle": farm.with_name("apple.bundle"),
        "graph": tmp_path / "graph.onnx",
        "backbone": tmp_path / "base.safetensors",
        "farm": farm,
    }


def test_every_form_says_the_same_and_costs_the_same(files: dict[str, Path], farm: Path) -> None:
    image = labelled(farm.with_name("photos") / "test")[0][0]
    subjects = {name: opened(path) for name, path in files.items()}
    pixels = normalise(load_image(image, SIDE)[None], subjects["bundle"])
    said = {name: one.ready(1)(pixels)[0] for name, one in subjects.items()}
    assert said["farm"] == pytest.approx(said["bundle"], abs=1e-4)
    assert said["backbone"] == pytest.approx(said["graph"], abs=1e-4)
    assert {one.engine for one in subjects.values()} == {ONNX, TORCH}
    bundle = Serving(farm / "state" / "serving").in_use()
    spec = bundle.about.manifest.spec
    for one in subjects.values():
        cost = one.cost()
        assert cost is not None
        assert cost.macs == macs(spec)
        # fresh norms are all ones, which a graph holds once
        assert cost.parameters == pytest.approx(parameters(bundle.model), rel=0.01)
        assert (one.mean, one.std, one.image_size) == (spec.mean, spec.std, SIDE)
        assert one.file_bytes > 50_000


def test_rows_tell_what_is_known(files: dict[str, Path], farm: Path) -> None:
    images = labelled(farm.with_name("photos") / "test")
    rows = measured([opened(files[name]) for name in ("farm", "bundle", "graph")], images, 0.0)
    torch_row, bundle_row, graph_row = rows
    right = Classifier(PortableBundle.read(files["bundle"]))
    expected = np.mean([right.classify(path).label == name for path, name in images])
    assert bundle_row.accuracy == torch_row.accuracy == pytest.approx(expected)
    assert (graph_row.accuracy, graph_row.images) == (None, 0)
    assert torch_row.latency_ratio_1thread == torch_row.latency_ratio == 1
    assert all(0 < row.latency_ms_1thread_p50 <= row.latency_ms_1thread_p95 for row in rows)
    peaks = [row.peak_memory_bytes or 0 for row in rows]
    assert peaks[0] > peaks[1] + 50_000_000, "torch takes more room than ONNX Runtime"


def test_memory_is_that_of_a_fresh_process(files: dict[str, Path]) -> None:
    heavy = np.ones(300_000_000, np.uint8)
    found = peak_bytes(opened(files["graph"]))
    assert heavy.sum() == len(heavy)
    assert found is not None
    assert 20_000_000 < found < 250_000_000


def test_another_size_is_for_what_can_be_built_again(files: dict[str, Path]) -> None:
    for name in ("farm", "backbone"):
        larger, own = opened(files[name], 64), opened(files[name])
        assert larger.image_size == 64
        cost, before = larger.cost(), own.cost()
        assert cost is not None
        assert before is not None
        assert cost.macs > 3 * before.macs
        assert np.isfinite(larger.ready(1)(np.zeros((1, 3, 64, 64), np.float32))).all()
    for name in ("bundle", "graph"):
        with pytest.raises(ModelError, match=f"made for images of {SIDE} px, not 64"):
            opened(files[name], 64)


def test_images_that_are_none_of_it(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it takes a folder per class"):
        labelled(tmp_path)
    (tmp_path / "moss").mkdir()
    (tmp_path / "moss" / "a.jpg").write_bytes(b"no image")
    subject = opened(files["bundle"])
    with pytest.raises(DataError, match="knows no class 'moss'"):
        measured([subject], labelled(tmp_path), 0.0)
    (tmp_path / "moss").rename(tmp_path / CLASSES[0])
    with pytest.raises(DataError, match="not one of the 1 images can be read"):
        measured([subject], labelled(tmp_path), 0.0)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "wrong").write_bytes(b"rain")
    with pytest.raises(ModelError, match="is no bundle"):
        opened(tmp_path / "wrong")
    with pytest.raises(ModelError, match="no graph at"):
        opened(tmp_path / "none.onnx")
    with pytest.raises(ConfigError):
        opened(tmp_path)


def test_the_command(files: dict[str, Path], farm: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    images = ["--images", str(farm.with_name("photos") / "test")]
    command = ["bench", str(files["bundle"]), str(files["graph"]), "--seconds", "0"]
    said = CliRunner().invoke(
        app, [*command, *images, "--json", str(out), "--picture", str(picture)]
    )
    assert said.exit_code == 0, said.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == ["apple.bundle", "graph.onnx"]
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    lacking = CliRunner().invoke(app, [*command, "--picture", str(picture)])
    assert isinstance(lacking.exception, ConfigError)


def test_the_trainer_says_the_same(files: dict[str, Path], farm: Path) -> None:
    image, _ = labelled(farm.with_name("photos") / "test")[0]
    bundle = Serving(farm / "state" / "serving").in_use()
    subject = opened(files["farm"])
    pixels = normalise(load_image(image, SIDE)[None], subject)
    assert subject.classes[subject.ready(1)(pixels)[0].argmax()] == guess(bundle, image).label


@pytest.mark.parametrize("spread", [0.0, 0.004, 0.3])
def test_points_lie_where_they_belong(tmp_path: Path, spread: float) -> None:
    points = [Point("slow", 80.0, 0.9), Point("fast", 20.0, 0.9 - spread)]
    draw(tmp_path / "out.png", "two", points)
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    places = []
    for colour in COLOURS[:2]:
        wanted = [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
        rows, columns = np.nonzero((pixels[:, :700] == wanted).all(2))
        places.append((columns.mean(), rows.mean()))
    (slow, high), (fast, low) = places
    assert fast < slow
    assert low - high == pytest.approx(0, abs=0.5) if spread == 0 else low > high + 5
