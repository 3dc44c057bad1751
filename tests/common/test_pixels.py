from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.pixels import jitter, load_augmented, load_image, normalise
from common.spec import ModelSpec

SPEC = ModelSpec(name="any", image_size=32, heads=(2,), neurons=(8,), head_width=4, width=8)


@pytest.mark.parametrize("shape", [(40, 80), (80, 40)])
def test_the_centre_is_cropped(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    middle = tuple(slice((n - 40) // 2, (n + 40) // 2) for n in shape)
    pixels[middle] = (10, 200, 90)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    cropped = load_image(tmp_path / "x.png", 20)
    assert cropped.shape == (20, 20, 3)
    inner = cropped[2:-2, 2:-2].reshape(-1, 3)
    assert (inner == (10, 200, 90)).all()


def test_orientation_is_obeyed(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg", 20)[15:].mean() > 200


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image = Image.new("RGB", (30, 30), (200, 100, 50)).convert(mode)
    if mode == "P":
        image.save(path, transparency=b"\x00\x10")
    else:
        image.save(path)
    assert load_image(path, 16).shape == (16, 16, 3)


def test_large_photographs_are_decoded_close_to_exactly(tmp_path: Path) -> None:
    y, x = np.mgrid[0:800, 0:1200] / 800
    pixels = np.stack([x / 1.5, y, 0.5 + 0.5 * np.sin(9 * x)], -1)
    Image.fromarray((pixels * 255).astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    Image.fromarray((pixels * 255).astype(np.uint8)).save(tmp_path / "x.png")
    draft = load_image(tmp_path / "x.jpg", 56).astype(int)
    exact = load_image(tmp_path / "x.png", 56).astype(int)
    assert np.abs(draft - exact).max() <= 6


def test_augmented_crops_stay_in_range_and_vary(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.jpg", np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (48, 60, 3), dtype=np.uint8)).save(path)
    crops = [load_augmented(path, 24, np.random.default_rng(k)) for k in range(8)]
    assert all(crop.shape == (24, 24, 3) and crop.dtype == np.uint8 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 8


@given(st.integers(0, 2**32 - 1))
def test_jitter_keeps_the_range_and_one_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    same = jitter(pixels, np.ones((2, 3), np.float32))
    np.testing.assert_allclose(same, pixels, atol=1e-3)
    changed = jitter(pixels, rng.uniform(0.5, 1.5, (2, 3)).astype(np.float32))
    assert changed.dtype == np.float32
    assert changed.min() >= 0
    assert changed.max() <= 255


def test_normalise_moves_channels_first() -> None:
    pixels = np.zeros((4, 5, 5, 3), dtype=np.uint8)
    pixels[..., 2] = 255
    out = normalise(pixels, SPEC)
    assert out.shape == (4, 3, 5, 5)
    np.testing.assert_allclose(out[:, 2], (1 - SPEC.mean[2]) / SPEC.std[2], rtol=1e-5)
