from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from common.anchors import Anchors
from common.backbone import build, dense_spec, digest, load_backbone
from common.config import BackboneConfig, ServerConfig, TrainConfig
from common.errors import ConfigError, DataError
from common.images import open_folder
from common.precision import bf16_supported
from server.pretrain import Pretrained, interpolate, pretrain, source_batches

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
SIDE = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source species with three classes of stripes, with a test folder of its own."""
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    y, x = np.mgrid[0:36, 0:36] / 36
    for part, count in (("train", 30), ("test", 4)):
        for name, axis in (("lying", y), ("standing", x), ("leaning", (x + y) / 2**0.5)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                wave = np.sin(20 * axis + rng.uniform(0, 7))[..., None] * rng.uniform(30, 90, 3)
                pixels = (128 + wave + rng.normal(0, 25, (36, 36, 3))).clip(0, 255)
                file = root / part / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def settings(source: Path | None, seed: int = 0, **backbone: object) -> ServerConfig:
    values = {"name": "vit_tiny_patch16_224", "image_size": SIDE, "options": TINY}
    values |= {"source": source, "anchor_images": 48, "lr": 2e-3} | backbone
    train = TrainConfig(batch_size=16, classifier_lr=1e-2)
    return ServerConfig(seed=seed, backbone=BackboneConfig.model_validate(values), train=train)


def weights(made: Pretrained) -> dict[str, Tensor]:
    return dict(load_backbone(made.base)[0].state_dict())


def test_random_weights_without_source_give_a_base_alone(tmp_path: Path) -> None:
    made = pretrain(settings(None, seed=4), tmp_path / "server")
    model, spec = load_backbone(made.base)
    assert made.base == tmp_path / "server" / "base.safetensors"
    assert spec == made.spec == dense_spec("vit_tiny_patch16_224", SIDE, TINY)
    assert digest(model, spec) == made.digest
    assert made.anchors is None
    assert made.source_accuracy is None
    assert [file.name for file in (tmp_path / "server").iterdir()] == ["base.safetensors"]
    assert pretrain(settings(None, seed=4), tmp_path / "b").digest == made.digest
    assert pretrain(settings(None, seed=5), tmp_path / "c").digest != made.digest


def test_random_weights_do_not_disturb_the_callers_generator(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    pretrain(settings(None, seed=1), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_training_from_random_weights_learns_the_source(source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    plain = pretrain(settings(source), tmp_path / "plain")
    made = pretrain(
        settings(source, epochs=8),
        tmp_path / "made",
        lambda what, share: told.append((what, share)),
    )
    assert plain.source_accuracy is not None
    assert made.source_accuracy is not None
    assert made.source_accuracy >= max(0.9, plain.source_accuracy)
    assert made.digest != plain.digest
    shares = [share for what, share in told if what == "training"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert told[-1] == ("anchors", 1.0)


def test_anchors_describe_the_base_that_is_written(source: Path, tmp_path: Path) -> None:
    made = pretrain(settings(source, epochs=1), tmp_path)
    assert made.anchors is not None
    anchors = Anchors.from_bytes(made.anchors.read_bytes())
    assert anchors.heads == (2, 2)
    assert anchors.count == 48
    assert anchors.mean is None
    model, spec = load_backbone(made.base)
    batches = source_batches(source, spec, 48, 0)
    from common.anchors import compute_anchors

    again = compute_anchors(model, batches, 0, autocast=bf16_supported())
    torch.testing.assert_close(anchors.psi, again.psi)


def test_coral_anchors_carry_covariances(source: Path, tmp_path: Path) -> None:
    config = settings(source)
    config = config.model_copy(update={"train": TrainConfig(dal="coral")})
    made = pretrain(config, tmp_path)
    assert made.anchors is not None
    assert Anchors.from_bytes(made.anchors.read_bytes()).covariance is not None


def test_interpolation_lies_between_start_and_trained(source: Path, tmp_path: Path) -> None:
    start, half, trained, none = (
        weights(pretrain(settings(source, epochs=epochs, interpolation=share), tmp_path / name))
        for name, epochs, share in (("a", 0, 1.0), ("b", 1, 0.5), ("c", 1, 1.0), ("d", 1, 0.0))
    )
    for name in start:
        torch.testing.assert_close(half[name], (start[name] + trained[name]) / 2)
        torch.testing.assert_close(none[name], start[name])
    assert any(not torch.equal(start[name], trained[name]) for name in start)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_interpolate_is_linear(share: float) -> None:
    model = build(dense_spec("vit_tiny_patch16_224", SIDE, TINY))
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = {name: torch.randn_like(tensor) for name, tensor in trained.items()}
    interpolate(model, start, share)
    for name, tensor in model.state_dict().items():
        expected = start[name] + share * (trained[name] - start[name])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_given_weights_are_taken(tmp_path: Path) -> None:
    model = build(dense_spec("vit_tiny_patch16_224", SIDE, TINY))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    made = pretrain(settings(None, weights=str(tmp_path / "weights.safetensors")), tmp_path / "out")
    assert made.digest == digest(model, made.spec)


def test_epochs_without_source_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs = 3 needs source images.*source"):
        pretrain(settings(None, epochs=3), tmp_path)
    with pytest.raises(DataError, match="no image folder"):
        pretrain(settings(tmp_path / "gone"), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- source batches -----------------------------------------------------------------------------


def test_source_batches_can_be_iterated_again(source: Path) -> None:
    spec = dense_spec("vit_tiny_patch16_224", SIDE, TINY)
    batches = source_batches(source, spec, 50, seed=2)
    one, two = torch.cat(list(batches)), torch.cat(list(batches))
    assert one.shape == (50, 3, SIDE, SIDE)
    assert len(list(batches)) == len(batches) == 2
    assert torch.equal(one, two)
    other = torch.cat(list(source_batches(source, spec, 50, seed=3)))
    assert not torch.equal(one, other)


def test_source_batches_hold_the_training_images_alone(source: Path) -> None:
    spec = dense_spec("vit_tiny_patch16_224", SIDE, TINY)
    folder = open_folder(source)
    everything = source_batches(folder, spec, 10_000, seed=0)
    used = everything._part.paths
    assert sorted(used) == sorted(folder.fit.paths + folder.decide.paths)
    assert not any("test" in path.relative_to(source).parts for path in used)
    assert len(set(everything._part.labels[:32])) == 3


def test_a_smaller_spec_sees_the_same_images(source: Path) -> None:
    spec = dense_spec("vit_tiny_patch16_224", SIDE, TINY)
    small = spec.with_units((1, 2), (16, 128))
    for one, two in zip(
        source_batches(source, spec, 20, 1), source_batches(source, small, 20, 1), strict=True
    ):
        assert torch.equal(one, two)
