"""A picture of what a version looks at: bright where it counts, with what it says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from client.device import Device
from client.explain import DARKEST, MARGIN, SIDE, Looker, View, darkened, draw, look, other
from client.infer import Guess
from client.review import guess
from common import backbone
from common.errors import DataError, StateError
from tests.client.test_bench import farm
from tests.lab.versions import model_of, pruned

__all__ = ["farm"]


def photograph(farm: Path) -> Path:
    return next((farm.with_name("photos") / "test").rglob("*.png"))


def test_it_says_what_the_device_says(farm: Path) -> None:
    bundle = Device.of(farm).serving.in_use()
    view, said = look(Looker.of(bundle), photograph(farm)), guess(bundle, photograph(farm))
    assert [name for name, _ in view.guess.ranked] == [name for name, _ in said.ranked]
    assert view.shares.shape == (4, 4)
    assert view.shares.sum() == pytest.approx(1, abs=1e-5)
    assert f"{said.label} {said.ranked[0][1]:.2f} (not sure)" in view.words()


def test_what_counts_stays_bright() -> None:
    shares = np.zeros((4, 4), np.float32)
    shares[1, 2], shares[0] = 0.8, 0.01
    out = np.asarray(darkened(Image.new("RGB", (80, 80), (200, 100, 50)), shares))
    assert out[30, 50].tolist() == pytest.approx([200, 100, 50], abs=12)
    assert out[70, 10].tolist() == pytest.approx(
        [200 * DARKEST, 100 * DARKEST, 50 * DARKEST], abs=2
    )


def test_panels_lie_side_by_side(tmp_path: Path) -> None:
    Image.new("RGB", (50, 90), (0, 0, 250)).save(tmp_path / "leaf.png")
    said = Guess(tmp_path / "leaf.png", (("scab", 0.9), ("rust", 0.1)), True)
    even = View("one", said, np.full((2, 2), 0.25, np.float32), 10**9)
    draw(tmp_path / "out.png", tmp_path / "leaf.png", [even, even])
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width == MARGIN + 3 * (SIDE + MARGIN)
        middle = [MARGIN + SIDE // 2 + n * (SIDE + MARGIN) for n in range(3)]
        assert {sheet.getpixel((x, 200)) for x in middle} == {(0, 0, 250)}, "all counts alike"


def test_the_command_compares_with_another_backbone(farm: Path, tmp_path: Path) -> None:
    smaller, spec = pruned(*model_of())
    backbone.save_backbone(tmp_path / "small.safetensors", smaller, spec)
    out = tmp_path / "why.png"
    flags = ["--against", str(tmp_path / "small.safetensors"), "--out", str(out)]
    said = CliRunner().invoke(app, ["explain", str(farm), str(photograph(farm)), *flags])
    assert said.exit_code == 0, said.output
    first, second = said.output.strip().splitlines()
    assert "version 2" in first
    assert "small.safetensors" in second
    with Image.open(out) as sheet:
        assert sheet.width == MARGIN + 3 * (SIDE + MARGIN)


def test_what_cannot_be_explained(farm: Path, tmp_path: Path) -> None:
    device = Device.of(farm)
    (tmp_path / "leaf.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        look(Looker.of(device.serving.in_use()), tmp_path / "leaf.jpg")
    with pytest.raises(StateError, match="no version was in use before"):
        other("previous", device)
    assert other(str(farm), device).name == "apple version 2"
