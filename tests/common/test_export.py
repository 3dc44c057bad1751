"""A backbone as ONNX says what it says in torch, and its numbers are those of the version."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from common.backbone import build, dense_spec, stored_tensors
from common.errors import ModelError
from common.export import graph_of, require_parity, whole
from common.manifest import Tensor
from common.objects import Objects
from common.runtime import Runtime
from common.spec import ModelSpec
from tests.lab.network import TINY
from tests.lab.versions import learnt, model_of, pruned

Made = tuple[VisionTransformer, ModelSpec]


def kept(objects: Objects, model: VisionTransformer) -> list[Tensor]:
    """The numbers of a backbone as objects."""
    return [
        Tensor(
            name=name,
            dtype="F16" if numbers.dtype == torch.float16 else "F32",
            shape=tuple(numbers.shape),
            digest=objects.add(numbers.numpy().tobytes()),
        )
        for name, numbers in stored_tensors(model).items()
    ]


def written(folder: Path, made: Made) -> tuple[bytes, Objects]:
    """A graph and the objects of its numbers."""
    objects = Objects(folder / "objects")
    return graph_of(*made, kept(objects, made[0])), objects


def dense() -> Made:
    """Of random weights."""
    model, spec = model_of()
    return learnt(model, 1), spec


def cut() -> Made:
    """Without a head."""
    return pruned(*dense())


def half() -> Made:
    """Of numbers that fp16 holds."""
    model, spec = dense()
    model.load_state_dict({n: t.half().float() for n, t in model.state_dict().items()})
    return model, spec


def another() -> Made:
    """With layer-scale and registers, as DINOv2's have them."""
    spec = dense_spec("vit_small_patch14_reg4_dinov2", 56, TINY | {"patch_size": 14})
    return build(spec), spec


@pytest.mark.parametrize("make", [dense, cut, half, another])
def test_both_forms_find_the_same_features(tmp_path: Path, make: Callable[[], Made]) -> None:
    model, spec = made = make()
    graph, objects = written(tmp_path, made)
    runtime = Runtime(graph, objects.folder)
    assert require_parity(model, spec.image_size, runtime) < 1e-4
    batch = np.zeros((5, 3, spec.image_size, spec.image_size), np.float32)
    assert runtime.features(batch).shape == (5, model.num_features)
    file = Runtime(whole(graph, objects.folder), tmp_path / "nowhere")
    np.testing.assert_array_equal(file.features(batch), runtime.features(batch))


def test_a_graph_is_small_and_the_same_twice(tmp_path: Path) -> None:
    made = half()
    assert {one.dtype for one in kept(Objects(tmp_path), made[0])} == {"F16"}
    graph, objects = written(tmp_path, made)
    assert graph == written(tmp_path, made)[0]
    size = sum(path.stat().st_size for path in objects.folder.glob("??/*"))
    assert len(graph) < size
    loaded = onnx.load_model_from_string(graph)
    inside = sum(len(one.raw_data) for one in loaded.graph.initializer)
    assert inside < 4096
    assert ModelSpec.from_json(loaded.metadata_props[0].value) == made[1]


def test_another_backbone_behind_the_graph_is_seen(tmp_path: Path) -> None:
    graph, objects = written(tmp_path, dense())
    model, spec = model_of()
    with pytest.raises(ModelError, match="ONNX Runtime and torch differ by"):
        require_parity(learnt(model, 2), spec.image_size, Runtime(graph, objects.folder))


def test_numbers_that_are_no_objects_are_not_published(tmp_path: Path) -> None:
    model, spec = dense()
    name = "blocks.1.mlp.fc1.weight"
    tensors = [one for one in kept(Objects(tmp_path), model) if one.name != name]
    with pytest.raises(ModelError, match=f"'{name}' holds numbers"):
        graph_of(model, spec, tensors)


def test_what_cannot_be_written_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match="cannot be written as ONNX: no such operator"):
        written(tmp_path, dense())
