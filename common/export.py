"""A backbone as ONNX, without its classifier: the graph alone, its numbers objects beside it.

    image     fp32 (N, 3, S, S), normalised with the mean and deviation of the spec
    features  fp32 (N, C)

The numbers are those of the safetensors form: the graph names each by where its object lies
(common/objects.py), so a version in two forms costs one form and some hundred kilobytes. What is
kept as fp16 is cast as it is loaded. Names of the numbers are those of the backbone.
"""

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.efficient import chooses_tokens
from common.errors import ModelError
from common.manifest import Tensor
from common.objects import place_of
from common.runtime import INPUT, OUTPUT, Runtime
from common.spec import ModelSpec

OPSET = 18
TOLERANCE = 1e-4
"""Of the largest feature, or of 1: what two ways of adding up the same numbers may differ by."""
PROBES = 4
MOST_CONSTANTS = 64
"""Numbers of a constant that is the graph's own: shapes, axes, scales."""

_TYPES = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}


def graph_of(model: VisionTransformer, spec: ModelSpec, tensors: Iterable[Tensor]) -> bytes:
    """The graph of a backbone; its numbers stay in the objects of ``tensors``.

    Raises:
        ModelError: the backbone cannot be written as ONNX.
    """
    whole_model = onnx.load_model_from_string(exported(model.eval(), spec.image_size))
    graph, stored = whole_model.graph, {tensor.name: tensor for tensor in tensors}
    numbers = {one.name: one for one in graph.initializer if one.name in stored}
    others = [one for one in graph.initializer if one.name not in stored]
    strange = [one.name for one in others if math.prod(one.dims) > MOST_CONSTANTS]
    if strange:
        raise ModelError(f"ONNX: '{strange[0]}' holds numbers that are no tensor of {spec.name}")
    del graph.initializer[:]
    graph.initializer.extend(others)
    casts = []
    for name in sorted(numbers):
        graph.initializer.append(_beside(stored[name]))
        if stored[name].dtype == "F16":
            casts.append(_cast(name))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    helper.set_model_props(whole_model, {"spec": spec.to_json()})
    return cast(bytes, whole_model.SerializeToString(deterministic=True))


def exported(model: nn.Module, side: int) -> bytes:
    """Any network that takes images of that side to features, numbers and all.

    Raises:
        ModelError: it cannot be written as ONNX.
    """
    target = io.BytesIO()
    image = torch.zeros(1, 3, side, side)
    axes = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that keeps names, and of traced shapes
        try:
            torch.onnx.export(
                model,
                (image,),
                cast(str, target),  # or a file that is open; the stubs know the path alone
                dynamo=False,
                do_constant_folding=False,  # folded numbers are no longer those of the backbone
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes=axes,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            raise ModelError(f"it cannot be written as ONNX: {error}") from error
    return target.getvalue()


def _half(name: str) -> str:
    return f"{name}.half"


def _beside(tensor: Tensor) -> TensorProto:
    """A tensor whose numbers are an object."""
    half = tensor.dtype == "F16"
    proto = TensorProto(
        name=_half(tensor.name) if half else tensor.name,
        dims=tensor.shape,
        data_type=_TYPES[tensor.dtype],
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", place_of(tensor.digest)), ("length", str(tensor.bytes))):
        proto.external_data.add(key=key, value=value)
    return proto


def _cast(name: str) -> NodeProto:
    return helper.make_node(
        "Cast", [_half(name)], [name], name=f"{name}.cast", to=TensorProto.FLOAT
    )


def whole(graph: bytes, objects: Path) -> bytes:
    """The same with its numbers inside, as a file that needs nothing beside it."""
    model = onnx.load_model_from_string(graph)
    onnx.load_external_data_for_model(model, str(objects))
    return cast(bytes, model.SerializeToString(deterministic=True))


@torch.inference_mode()
def require_parity(model: nn.Module, side: int, runtime: Runtime) -> float:
    """Compare both forms on drawn images; returns the largest difference.

    Where tokens are chosen, one image may differ by more: its choice can hang on the last bit of a
    likeness, which each way of adding up has to itself. A wrong graph differs on all of them.

    Raises:
        ModelError: it is above :data:`TOLERANCE`.
    """
    shape = PROBES, 3, side, side
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    expected = model.eval()(torch.from_numpy(images)).numpy()
    by_image = np.sort(np.abs(runtime.features(images) - expected).max(axis=1))
    worst = float(by_image[-2 if chooses_tokens(model) else -1])
    if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ModelError(f"ONNX Runtime and torch differ by {worst:.2g}; nothing is written")
    return worst
