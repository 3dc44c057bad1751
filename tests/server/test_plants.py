import hashlib
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from common.errors import ConfigError, DataError
from server.lesions import LESIONS
from server.plants import FARMS, MARKER, SOURCE, Species, draw_dataset, draw_leaf

EVERY = [(species, label) for species in (SOURCE, *FARMS) for label in species.labels]


def draw(out: Path, *, seed: int = 1, farms: int = 2, train: int = 2, test: int = 1) -> None:
    draw_dataset(
        out,
        seed=seed,
        farms=farms,
        train_per_class=train,
        test_per_class=test,
        source_per_class=train,
        side=32,
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels(species: Species, label: str, seed: int, side: int = 48) -> npt.NDArray[np.float64]:
    image = draw_leaf(np.random.default_rng(seed), species, label, side)
    return np.asarray(image, dtype=np.float64)


def test_folders_follow_species_parts_and_classes(tmp_path: Path) -> None:
    draw(tmp_path / "data", farms=3)
    found = {str(path.parent.relative_to(tmp_path / "data")) for path in tmp_path.rglob("*.jpg")}
    expected = {
        f"{root}/{species.name}/{part}/{label}"
        for root, several in (("source", (SOURCE,)), ("farms", FARMS[:3]))
        for species in several
        for part in ("train", "test")
        for label in species.labels
    }
    assert found == expected
    healthy = tmp_path / "data" / "farms" / FARMS[0].name / "train" / "healthy"
    assert sorted(path.name for path in healthy.iterdir()) == ["000.jpg", "001.jpg"]
    with Image.open(healthy / "000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_farms_have_their_own_species_and_label_sets() -> None:
    assert len({species.name for species in (SOURCE, *FARMS)}) == len(FARMS) + 1
    assert set(SOURCE.labels) == set(LESIONS)
    assert len({species.labels for species in FARMS[:4]}) == 4
    for species in FARMS:
        assert 3 <= len(species.labels) <= 4
        assert species.labels[0] == "healthy"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    draw(tmp_path / "one")
    draw(tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    draw(tmp_path / "three", seed=2)
    one, three = digests(tmp_path / "one"), digests(tmp_path / "three")
    assert one.keys() == three.keys()
    assert not set(one.values()) & set(three.values())


def test_images_do_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "few")
    draw(tmp_path / "many", farms=3, train=3, test=2)
    few, many = digests(tmp_path / "few"), digests(tmp_path / "many")
    assert {name: many[name] for name in few if name != MARKER} == {
        name: body for name, body in few.items() if name != MARKER
    }


def test_no_image_is_drawn_twice(tmp_path: Path) -> None:
    draw(tmp_path / "data", farms=2, train=4, test=4)
    found = digests(tmp_path / "data")
    assert len(set(found.values())) == len(found)


def test_a_complete_data_set_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "data"
    draw(out)
    first = next(out.rglob("*.jpg"))
    first.write_bytes(b"touched")
    draw(out)
    assert first.read_bytes() == b"touched"


def test_an_interrupted_draw_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "whole")
    saved = Image.Image.save
    count = 0

    def interrupted(self: Image.Image, target: BytesIO, kind: str, quality: int) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt
        saved(self, target, kind, quality=quality)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    draw(tmp_path / "data")
    assert digests(tmp_path / "data") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]


def test_other_arguments_replace_the_data_set(tmp_path: Path) -> None:
    draw(tmp_path / "data", train=3)
    draw(tmp_path / "data")
    draw(tmp_path / "fresh")
    assert digests(tmp_path / "data") == digests(tmp_path / "fresh")


def test_an_empty_folder_is_filled_and_a_stranger_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "empty", farms=1, train=1)
    assert (tmp_path / "empty" / MARKER).is_file()
    shutil.rmtree(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    with pytest.raises(DataError, match="photos"):
        draw(tmp_path / "photos")
    assert digests(tmp_path / "photos").keys() == {"mine.jpg"}


@pytest.mark.parametrize("wrong", [{"farms": 0}, {"farms": 99}, {"train": 0}, {"test": 0}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        draw(tmp_path / "data", **wrong)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("species", "label"), EVERY, ids=lambda value: getattr(value, "name", value)
)
def test_every_class_of_every_species_can_be_drawn(species: Species, label: str) -> None:
    for seed in range(3):
        image = pixels(species, label, seed)
        assert image.shape == (48, 48, 3)
        assert image.std() > 10


def test_lesions_show_and_their_strength_varies() -> None:
    # the same seed draws the same leaf up to its lesions
    for label in LESIONS:
        changes = [
            np.abs(pixels(SOURCE, label, seed) - pixels(SOURCE, "healthy", seed)).mean()
            for seed in range(8)
        ]
        if label == "healthy":
            assert changes == [0.0] * 8
        else:
            assert min(changes) > 0
            assert max(changes) > 1.3 * min(changes)


def features(species: Species, label: str, number: int) -> npt.NDArray[np.float64]:
    """A colour histogram: a weak eye, which a vision transformer should beat."""
    cells = (pixels(species, label, 1000 * SOURCE.labels.index(label) + number) // 43).astype(int)
    codes = cells @ [36, 6, 1]
    return np.sqrt(np.bincount(codes.ravel(), minlength=216))


def test_classes_can_be_learnt_but_not_perfectly() -> None:
    species, train, test = FARMS[0], 24, 12
    drawn = np.array(
        [[features(species, label, n) for n in range(train + test)] for label in species.labels]
    )
    means = drawn[:, :train].mean(axis=1)
    distance = ((drawn[:, train:, None] - means) ** 2).sum(axis=-1)
    right = distance.argmin(axis=-1) == np.arange(len(means))[:, None]
    assert 1.3 / len(species.labels) < right.mean() < 0.98
