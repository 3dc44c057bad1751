"""What a graph costs: its multiply-accumulates, counted while it runs, and its parameters.

Shapes within a graph follow from its input, often by way of operators that compute them; it is run
once, on an empty image, with everything that its products read and write looked at.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto

from common.errors import ModelError

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_SCALED = frozenset({"DequantizeLinear", "QuantizeLinear"})

Shapes = dict[str, tuple[int, ...]]


class Cost(NamedTuple):
    """Multiply-accumulates of one image (products only), and numbers that were learnt."""

    macs: int
    parameters: int


def cost_of(graph: bytes, side: int, objects: Path | None = None) -> Cost:
    """Count what a graph costs on one image of that side in pixels.

    Args:
        graph: ONNX, in fp32 or in 8 bits.
        side: of the image.
        objects: the folder of its numbers, where they are not inside.

    Raises:
        ModelError: it is no graph, or cannot be run on such an image.
    """
    try:
        model = onnx.load_model_from_string(graph)
        shapes = _shapes(model, side, objects)
    except Exception as error:  # both libraries raise kinds of their own, undocumented
        raise ModelError(f"it cannot be counted at {side} px: {str(error)[:200]}") from error
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    return Cost(sum(_macs(node, shapes) for node in products), _parameters(model.graph))


def _macs(node: NodeProto, shapes: Shapes) -> int:
    """Every number that comes out is a sum over one row of weights, or of the other factor."""
    written, (first, second) = (
        math.prod(shapes[node.output[0]]),
        (shapes[n] for n in node.input[:2]),
    )
    if node.op_type == "Conv":
        return written * math.prod(second[1:])
    turned = any(one.name == "transA" and one.i for one in node.attribute)
    return written * first[-2 if turned else -1]


def _shapes(model: onnx.ModelProto, side: int, objects: Path | None) -> Shapes:
    """Of all that products read and write, on one image."""
    graph = model.graph
    names = {n for node in graph.node if node.op_type in PRODUCTS for n in node.input[:2]}
    names |= {node.output[0] for node in graph.node if node.op_type in PRODUCTS}
    made = {name for node in graph.node for name in node.output}
    image = graph.input[0].name
    shapes: Shapes = {image: (1, 3, side, side)}
    shapes |= {one.name: tuple(one.dims) for one in graph.initializer}
    asked = sorted(names & made)
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if objects is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(objects.absolute())
        )
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(asked, {image: np.zeros(shapes[image], np.float32)})
    return shapes | {name: one.shape for name, one in zip(asked, found, strict=True)}


def _parameters(graph: onnx.GraphProto) -> int:
    """Numbers of initializers, where tensors that are alike are one.

    Scales, zero points and the graph's own shapes are none.
    """
    scales = {name for node in graph.node if node.op_type in _SCALED for name in node.input[1:]}
    return sum(
        math.prod(one.dims)
        for one in graph.initializer
        if one.name not in scales and one.data_type != TensorProto.INT64 and one.dims
    )
