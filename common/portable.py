"""What a device without torch classifies with: one file that needs nothing beside it.

    graph    uint8            the backbone as ONNX, its numbers inside
    weight   fp32 (K, C)      the farm's classifier of K classes
    bias     fp32 (K,)
    metadata "about"          JSON: version, input, class names, temperature, threshold

A farm's own trainer makes it (``fieldfed-client bundle``), and it stays within the farm: the
classifier is part of it.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import ModelError
from common.files import write_atomically
from common.manifest import Counter53
from common.messages import Ratio
from common.pixels import Floats
from common.signing import Document
from common.spec import Triple
from common.tensors import header_of


class PortableAbout(Document):
    """What belongs to a classifier. ``threshold``: below it the device is not sure."""

    format: int = Field(default=1, ge=1, le=1)
    version: Counter53
    backbone: Annotated[str, Field(max_length=100)]
    width: Annotated[int, Field(ge=1, le=65536)]
    image_size: Annotated[int, Field(ge=16, le=2048)]
    mean: Triple
    std: Triple
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    threshold: Ratio
    precision: Literal["fp32", "int8"] = "fp32"


class PortableBundle:
    """A backbone as ONNX and a classifier, in memory."""

    def __init__(self, about: PortableAbout, graph: bytes, weight: Floats, bias: Floats) -> None:
        self.about, self.graph, self.weight, self.bias = about, graph, weight, bias

    def write(self, path: Path) -> None:
        """Write it to a file, atomically; raises DiskError."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "graph": np.frombuffer(self.graph, np.uint8),
            "weight": self.weight,
            "bias": self.bias,
        }
        write_atomically(path, save(arrays, metadata={"about": self.about.model_dump_json()}))

    @classmethod
    def read(cls, path: Path) -> "PortableBundle":
        """Inverse of :meth:`write`.

        Raises:
            ModelError: there is no such file, or it is damaged or something else; names it.
        """
        try:
            body = path.read_bytes()
            about = PortableAbout.model_validate_json(header_of(body)[0]["__metadata__"]["about"])
            arrays = load(body)
            graph, weight, bias = arrays["graph"], arrays["weight"], arrays["bias"]
        except IsADirectoryError:
            raise ModelError(
                f"'{path}' is a folder; of a farm's folder a bundle is made with: fieldfed-client "
                f"bundle {path} --out FILE"
            ) from None
        except OSError as error:
            raise ModelError(f"no bundle at '{path}': {error.strerror or error}") from error
        except (SafetensorError, ValidationError, json.JSONDecodeError, *_WRONG) as error:
            raise ModelError(f"'{path}' is no bundle, or is damaged; make it again") from error
        if (weight.shape, bias.shape) != (
            (len(about.classes), about.width),
            (len(about.classes),),
        ):
            raise ModelError(f"'{path}': its classifier does not fit its classes; make it again")
        return cls(about, graph.tobytes(), weight, bias)


_WRONG = (ValueError, KeyError, TypeError)
