"""A graph with 8-bit weights and activations: a quarter of the bytes, and several times as fast.

Static quantisation: how large activations get is measured beforehand on images of the farm itself,
so that nothing has to be measured while it classifies. Products alone are quantised, weights
channel by channel; all else stays fp32. So does the one convolution by which a transformer reads
its patches: it is a hundredth of the cost, and every error of it reaches all blocks. A network of
convolutions keeps its first few in fp32 for the same reason.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from common.pixels import Floats
from common.runtime import INPUT

PRODUCTS = ("MatMul", "Gemm")
CONVOLUTION = "Conv"
EXACT_CONVOLUTIONS = 10
"""Of a network of convolutions, how many stay fp32 at its start: a stem and three blocks.

All in 8 bits cost tf_efficientnet_lite0 12.8 and 6 points on two farms; so, none on either. The
graph is as fast, and hardly larger: early convolutions have few weights.
"""


class _Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Images as ONNX Runtime asks for them, one by one."""

    def __init__(self, images: Iterable[Floats]) -> None:
        self._images: Iterator[Floats] = iter(images)

    def get_next(self) -> dict[str, Floats] | None:
        """The next one, or None."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image}


def quantised(graph: bytes, images: Iterable[Floats]) -> bytes:
    """The same graph in 8 bits.

    Args:
        graph: ONNX with its numbers inside, fp32.
        images: (1, 3, S, S) each, normalised; some dozens, as the device will see them.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, prepared, small = (Path(folder) / name for name in ("plain", "prepared", "small"))
        plain.write_bytes(graph)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        convolutions = _convolutions(prepared)
        network = len(convolutions) > 1
        quantization.quantize_static(
            str(prepared),
            str(small),
            _Images(images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=[*PRODUCTS, CONVOLUTION] if network else list(PRODUCTS),
            nodes_to_exclude=convolutions[:EXACT_CONVOLUTIONS],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return small.read_bytes()


def _convolutions(graph: Path) -> list[str]:
    """Their names, in the order in which an image passes them."""
    return [node.name for node in onnx.load(graph).graph.node if node.op_type == CONVOLUTION]


@contextmanager
def _quiet() -> Iterator[None]:
    """The library tells the root logger of everything that is no matrix product."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
