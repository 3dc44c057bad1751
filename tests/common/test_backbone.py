"""Backbones: built from specs, loaded from where an operator says, refused in one clear line."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common import backbone
from common.errors import ModelError
from common.spec import ModelSpec

NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4, "patch_size": 8}


@pytest.fixture
def spec() -> ModelSpec:
    return backbone.dense_spec(NAME, 32, SMALL)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (NAME, 96),
        ("deit_tiny_distilled_patch16_224", 160),
        ("vit_small_patch14_dinov2", 112),
        ("vit_small_patch14_reg4_dinov2", 140),
    ],
)
def test_plain_transformers_are_taken_at_any_image_size(name: str, side: int) -> None:
    spec = backbone.dense_spec(name, side, {"depth": 2})
    model = backbone.build(spec)
    with torch.inference_mode():
        features = model(torch.zeros(1, 3, side, side))
    assert features.shape == (1, spec.width)


@pytest.mark.parametrize(
    "name", ["resnet18", "eva02_tiny_patch14_224", "vit_tiny_r_s16_p8_224", "test_vit3", "no_such"]
)
def test_what_cannot_be_pruned_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        backbone.dense_spec(name, 224)


def test_pack_and_unpack_keep_every_number_and_the_digest(spec: ModelSpec) -> None:
    model = backbone.build(spec)
    again, its_spec = backbone.unpack(backbone.pack(model, spec))
    assert its_spec == spec
    assert backbone.digest(again, spec) == backbone.digest(model, spec)


def test_the_digest_hears_one_changed_number(spec: ModelSpec) -> None:
    model = backbone.build(spec)
    before = backbone.digest(model, spec)
    with torch.no_grad():
        dict(model.named_parameters())["norm.bias"][0] += 1e-6
    assert backbone.digest(model, spec) != before


def test_tensors_that_fit_half_precision_travel_as_such(spec: ModelSpec) -> None:
    model = backbone.build(spec)
    whole = len(backbone.pack(model, spec))
    assert len(backbone.pack(model.half().float(), spec)) < 0.6 * whole


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_half_written_file_is_an_error_that_names_it(
    spec: ModelSpec, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(backbone.pack(backbone.build(spec), spec)[:cut])
    with pytest.raises(ModelError, match="half"):
        backbone.load_backbone(path)


def test_weights_come_from_a_file_and_that_is_logged(
    spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = backbone.build(spec), tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    with caplog.at_level(logging.INFO):
        loaded = backbone.load_pretrained(spec, str(path))
        backbone.load_pretrained(spec, None)
    assert backbone.digest(loaded, spec) == backbone.digest(model, spec)
    assert "w.safetensors" in caplog.text
    assert "random weights" in caplog.text


def test_a_position_table_of_another_resolution_is_resized(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(backbone.build(spec).state_dict(), path)
    larger = backbone.dense_spec(NAME, 64, SMALL)
    model = backbone.load_pretrained(larger, str(path))
    assert model.pos_embed is not None
    assert model.pos_embed.shape[1] == 1 + (64 // 8) ** 2


def test_weights_that_do_not_match_are_one_clear_line(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    other = backbone.dense_spec(NAME, 32, SMALL | {"embed_dim": 64})
    save_file(backbone.build(other).state_dict(), path)
    with pytest.raises(ModelError, match="do not match") as error:
        backbone.load_pretrained(spec, str(path))
    assert "other.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_clear_line(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="model hub") as error:
        backbone.load_pretrained(spec, "hub:vit_tiny_patch16_224")
    assert "\n" not in str(error.value)


def test_real_weights_fit(plant_weights: Path) -> None:
    spec = backbone.dense_spec("vit_small_patch14_dinov2", 112)
    backbone.load_pretrained(spec, str(plant_weights))
