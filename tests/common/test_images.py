import ast
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.duplicates import has_near
from common.errors import DataError
from common.images import FarmFolder, Part, Purpose, _chunks, open_folder
from common.pixels import load_image
from common.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = ModelSpec(name="any", image_size=32, heads=(2,), neurons=(8,), head_width=4, width=8)


def draw(path: Path, rng: np.random.Generator, taken: str | None = None) -> Path:
    """Random grey cells: no two images look alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((48, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if taken is not None:
        exif.get_ifd(0x8769)[0x9003] = taken
    image.save(path, exif=exif)
    return path


def flat(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("b", "a")) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        for number in range(per_class):
            draw(root / name / f"IMG_{number}.jpg", rng)
    return root


def split(root: Path, train: int = 10, test: int = 4) -> Path:
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        for part, count in (("train", train), ("test", test)):
            for number in range(count):
                draw(root / part / name / f"{number}.png", rng)
    return root


def names(part: Part, label: int) -> list[str]:
    return [p.name for p, y in zip(part.paths, part.labels, strict=True) if y == label]


def test_part_of(folder: FarmFolder) -> Part:
    return folder.open_test(Purpose.REPORT)


test_part_of.__test__ = False  # type: ignore[attr-defined]


# --- layouts and parts --------------------------------------------------------------------------


def test_flat_folder_is_cut_60_20_20_in_natural_order(tmp_path: Path) -> None:
    folder = open_folder(flat(tmp_path, per_class=12))
    assert folder.classes == ("a", "b")
    assert names(folder.fit, 0) == [f"IMG_{k}.jpg" for k in range(8)]
    assert names(folder.decide, 0) == ["IMG_8.jpg", "IMG_9.jpg"]
    assert names(test_part_of(folder), 1) == ["IMG_10.jpg", "IMG_11.jpg"]
    assert folder.fit.labels.dtype == np.int64


def test_given_test_folder_is_kept_whole(tmp_path: Path) -> None:
    folder = open_folder(split(tmp_path))
    assert names(folder.fit, 1) == [f"{k}.png" for k in range(8)]
    assert names(folder.decide, 1) == ["8.png", "9.png"]
    assert len(test_part_of(folder)) == 8
    assert all("test" in path.parts for path in test_part_of(folder).paths)


def test_capture_time_goes_before_file_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for name in ("a", "b"):
        for k in range(5):
            draw(tmp_path / name / f"{k}.jpg", rng, taken=f"2024:05:01 10:00:{9 - k:02d}")
    assert names(open_folder(tmp_path).fit, 0) == ["4.jpg", "3.jpg", "2.jpg"]


def test_file_order_rules_when_a_capture_time_is_missing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for name in ("a", "b"):
        for k in range(5):
            taken = None if k == 2 else f"2024:05:01 10:00:{9 - k:02d}"
            draw(tmp_path / name / f"{k}.jpg", rng, taken=taken)
    assert names(open_folder(tmp_path).fit, 0) == ["0.jpg", "1.jpg", "2.jpg"]


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_small_classes_still_have_every_part(tmp_path: Path, count: int) -> None:
    folder = open_folder(flat(tmp_path, per_class=count))
    for part in (folder.fit, folder.decide, test_part_of(folder)):
        assert set(part.labels) == {0, 1}
    assert len(folder.fit) + len(folder.decide) + len(test_part_of(folder)) == 2 * count


def test_suffixes_of_any_case_are_read_and_others_are_not(tmp_path: Path) -> None:
    flat(tmp_path, per_class=4)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._IMG_0.jpg").write_bytes(b"resource fork")
    rng = np.random.default_rng(9)
    for suffix in (".JPG", ".Jpeg", ".PNG", ".webp"):
        draw(tmp_path / "a" / f"x{suffix}", rng)
    folder = open_folder(tmp_path)
    parts = (folder.fit, folder.decide, test_part_of(folder))
    assert sum(int(np.sum(part.labels == 0)) for part in parts) == 8
    assert folder.skipped == ()


# --- few-shot -----------------------------------------------------------------------------------


def test_few_shot_draws_by_seed_within_fixed_borders(tmp_path: Path) -> None:
    split(tmp_path, train=30)
    whole = open_folder(tmp_path)
    draws = [open_folder(tmp_path, per_class=10, seed=seed) for seed in range(4)]
    for few in draws:
        assert len(names(few.fit, 0)) == 8
        assert len(names(few.decide, 0)) == 2
        for part, full in ((few.fit, whole.fit), (few.decide, whole.decide)):
            chosen = [full.paths.index(path) for path in part.paths]
            assert chosen == sorted(chosen)
        assert test_part_of(few).paths == test_part_of(whole).paths
    assert len({few.fit.paths for few in draws}) == 4
    again = open_folder(tmp_path, per_class=10, seed=3)
    assert again.fit.paths == draws[3].fit.paths


def test_smaller_draws_are_contained_in_larger_ones(tmp_path: Path) -> None:
    split(tmp_path, train=30)
    small = open_folder(tmp_path, per_class=5, seed=1)
    large = open_folder(tmp_path, per_class=20, seed=1)
    assert set(small.fit.paths) < set(large.fit.paths)


def test_few_shot_takes_what_is_there(tmp_path: Path) -> None:
    folder = open_folder(split(tmp_path), per_class=100)
    assert len(folder.fit) == 16
    with pytest.raises(DataError, match="per_class"):
        open_folder(tmp_path, per_class=1)


# --- duplicates ---------------------------------------------------------------------------------


def test_training_images_like_a_test_image_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split(tmp_path)
    shutil.copy(tmp_path / "test" / "b" / "0.png", tmp_path / "train" / "a" / "3.png")
    with Image.open(tmp_path / "test" / "a" / "1.png") as image:  # saved again, another size
        image.resize((60, 60)).save(tmp_path / "train" / "a" / "9.png")
    with caplog.at_level(logging.INFO):
        folder = open_folder(tmp_path)
    assert "3.png" not in names(folder.fit, 0)
    assert "9.png" not in names(folder.decide, 0)
    assert len(test_part_of(folder)) == 8
    assert "1 fit images like a test image" in caplog.text


def test_decide_images_like_a_fit_image_are_left_out(tmp_path: Path) -> None:
    split(tmp_path)
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "train" / "b" / "9.png")
    folder = open_folder(tmp_path)
    assert names(folder.decide, 1) == ["8.png"]
    assert names(folder.fit, 0)[0] == "0.png"


def test_a_class_of_nothing_but_duplicates_is_refused(tmp_path: Path) -> None:
    split(tmp_path)
    for k in range(10):
        shutil.copy(tmp_path / "test" / "a" / "0.png", tmp_path / "train" / "a" / f"{k}.png")
    with pytest.raises(DataError, match=r"'a'.*duplicate.*add photographs"):
        open_folder(tmp_path)


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=12),
    st.lists(st.integers(0, 2**64 - 1), max_size=12),
    st.lists(st.integers(0, 63), max_size=4),
)
def test_has_near_is_the_hamming_distance(a: list[int], b: list[int], flips: list[int]) -> None:
    if a:  # a neighbour at a known distance
        near = a[0]
        for bit in flips:
            near ^= 1 << bit
        b = [*b, near]
    found = has_near(np.array(a, np.uint64), np.array(b, np.uint64))
    expected = [any((x ^ y).bit_count() <= 2 for y in b) for x in a]
    assert found.tolist() == expected


# --- the cache ----------------------------------------------------------------------------------


def test_cache_is_believed_until_a_file_changes(tmp_path: Path) -> None:
    root, cache = split(tmp_path / "farm"), tmp_path / "state" / "images.json"
    whole = open_folder(root, cache=cache)
    content = json.loads(cache.read_bytes())
    rows = content["images"]
    rows["train/a/0.png"][2] = rows["test/a/0.png"][2]
    cache.write_text(json.dumps(content))
    assert "0.png" not in names(open_folder(root, cache=cache).fit, 0)
    os.utime(root / "train" / "a" / "0.png", ns=(1, 1))
    assert open_folder(root, cache=cache).fit.paths == whole.fit.paths


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"version": 1, "images": {"train/a/0.png": [1]}}', b"\xff"]
)
def test_damaged_cache_is_computed_anew(tmp_path: Path, damage: bytes) -> None:
    root, cache = split(tmp_path / "farm"), tmp_path / "images.json"
    cache.write_bytes(damage)
    assert len(open_folder(root, cache=cache).fit) == 16
    assert len(json.loads(cache.read_bytes())["images"]) == 28


def test_unwritable_cache_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = split(tmp_path / "farm")
    (tmp_path / "file").write_text("")
    assert len(open_folder(root, cache=tmp_path / "file" / "images.json").fit) == 16
    assert "not kept" in caplog.text


# --- what is refused ----------------------------------------------------------------------------


def _empty_class(root: Path) -> None:
    flat(root)
    (root / "c").mkdir()


def _no_test(root: Path) -> None:
    shutil.rmtree(split(root) / "test")


def _foreign_test_class(root: Path) -> None:
    draw(split(root) / "test" / "blight" / "0.png", np.random.default_rng(5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "no class folders"),
        (lambda root: root.rmdir(), "no image folder"),
        (_empty_class, "'.*/c' holds no image"),
        (lambda root: flat(root, classes=("a",)), "only one class"),
        (lambda root: flat(root, per_class=2), "2 readable images.*at least 3"),
        (_foreign_test_class, "train' lacks: blight"),
        (_no_test, "no test/CLASS"),
    ],
)
def test_unusable_folders_are_refused_by_name(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    root = tmp_path / "farm"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=words) as caught:
        open_folder(root)
    assert "farm" in str(caught.value)


@pytest.mark.parametrize("purpose", [p for p in Purpose if p is not Purpose.REPORT])
def test_only_reporting_opens_the_test_part(tmp_path: Path, purpose: Purpose) -> None:
    folder = open_folder(split(tmp_path))
    assert len(folder.open_test(Purpose.REPORT)) == 8
    with pytest.raises(DataError, match="reporting alone"):
        folder.open_test(purpose)


def test_nothing_but_the_farms_report_asks_for_the_test_part() -> None:
    callers = set()
    for room in ("common", "server", "client"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                named = isinstance(node, ast.Attribute) and node.attr in ("open_test", "_test")
                if named and file.name != "images.py":
                    callers.add(file.relative_to(ROOT).as_posix())
    assert callers <= {"client/farm.py"}


# --- unreadable images --------------------------------------------------------------------------


def test_unreadable_images_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat(tmp_path, per_class=10)
    whole = (tmp_path / "a" / "IMG_1.jpg").read_bytes()
    (tmp_path / "a" / "IMG_1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "IMG_2.jpg").write_bytes(b"not an image")
    folder = open_folder(tmp_path)
    assert folder.skipped == ("a/IMG_1.jpg", "b/IMG_2.jpg")
    assert "'a/IMG_1.jpg'" in caplog.text
    assert len(names(folder.fit, 0)) == 5


def test_an_image_that_breaks_later_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(flat(tmp_path, per_class=10))
    folder.fit.paths[2].write_bytes(b"")
    folder.fit.paths[5].unlink()
    loaded = list(folder.fit.batches(SPEC, 4))
    assert [len(labels) for _, labels in loaded] == [3, 3, 4]
    assert all(len(images) == len(labels) for images, labels in loaded)
    assert str(folder.fit.paths[5]) in caplog.text


# --- batches ------------------------------------------------------------------------------------


def test_batches_are_normalised_in_order_and_lazy(tmp_path: Path) -> None:
    folder = open_folder(flat(tmp_path))
    batches = list(folder.fit.batches(SPEC, 5))
    images, _ = batches[0]
    assert images.shape == (5, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert torch.cat([labels for _, labels in batches]).tolist() == folder.fit.labels.tolist()
    pixels = load_image(folder.fit.paths[0], 32).astype(np.float64) / 255
    expected = (pixels - np.array(SPEC.mean)) / np.array(SPEC.std)
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_training_batches_follow_from_the_seed(tmp_path: Path) -> None:
    part = open_folder(flat(tmp_path, per_class=20)).fit

    def one(seed: int, size: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = list(part.batches(SPEC, size, train=True, seed=seed))
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

    images, labels = one(1)
    assert torch.equal(images, one(1)[0])
    assert torch.equal(images, one(1, size=24)[0])
    assert not torch.equal(images, one(2)[0])
    assert sorted(labels.tolist()) == part.labels.tolist()
    assert labels.tolist() != part.labels.tolist()


def test_a_small_last_training_batch_joins_the_one_before(tmp_path: Path) -> None:
    part = open_folder(flat(tmp_path, per_class=30)).fit
    assert len(part) == 36
    assert [len(y) for _, y in part.batches(SPEC, 16, train=True)] == [16, 20]
    assert part.batch_count(16, train=True) == 2
    assert [len(y) for _, y in part.batches(SPEC, 16)] == [16, 16, 4]
    assert part.batch_count(16) == 3


@given(st.integers(0, 300), st.integers(1, 64), st.integers(1, 16))
def test_chunks_cover_everything_once(count: int, size: int, min_last: int) -> None:
    chunks = _chunks(count, size, min_last)
    assert [k for start, stop in chunks for k in range(start, stop)] == list(range(count))
    assert all(stop - start >= size for start, stop in chunks[:-1])
    if len(chunks) > 1:
        assert chunks[-1][1] - chunks[-1][0] >= min(min_last, size)


def test_images_are_prepared_without_torch() -> None:
    program = "import sys, common.images; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 0
