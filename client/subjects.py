"""What can be measured: a bundle, a graph, a backbone's file, what a farm serves with.

    FILE that 'fieldfed-client bundle' or 'distil' wrote    ONNX Runtime
    FILE.onnx, its numbers inside or beside it              ONNX Runtime; it knows no classes
    FILE.safetensors of a backbone                          torch; it knows no classes
    FOLDER of a farm                                        torch

Nothing of torch is imported before one of the last two is opened.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from common.errors import ModelError
from common.pixels import Floats
from common.portable import PortableBundle
from common.runtime import Runtime
from common.spec import ModelSpec, Triple
from common.tensors import header_of

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    from common.cost import Cost

Run = Callable[[Floats], Floats]
"""Images (N,3,S,S), normalised -> logits (N,K), or features where no classes are known."""

ONNX, TORCH = "onnxruntime", "torch"
_HEADER_BYTES = 1 << 21


@dataclass(frozen=True)
class Subject:
    """A model that is to be measured.

    ``ready`` makes it ready for a number of threads, ``cost`` counts, where it can be counted here.
    """

    name: str
    path: Path
    engine: str
    precision: str
    image_size: int
    mean: Triple
    std: Triple
    classes: tuple[str, ...]
    file_bytes: int
    ready: Callable[[int], Run] = field(repr=False)
    cost: "Callable[[], Cost | None]" = field(repr=False)


def opened(path: Path, side: int | None = None) -> Subject:
    """Open what a path names.

    Args:
        path: of one of the kinds above.
        side: of images in pixels; None: the one that it was made for.

    Raises:
        ModelError: it is none of them, or does not take images of that side.
        ConfigError, StateError: a farm's folder that is none, or serves with nothing yet.
    """
    if path.is_dir():
        return _farm(path, side)
    if path.suffix == ".onnx":
        return _graph(path, side)
    return _backbone(path, side) if "spec" in _metadata(path) else _bundle(path, side)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = header_of(file.read(_HEADER_BYTES))[0].get("__metadata__")
    except (OSError, ValueError):
        return {}  # what reads the whole of it says what is wrong
    return found if isinstance(found, dict) else {}


# --- in ONNX Runtime -----------------------------------------------------------------------------


def _bundle(path: Path, side: int | None) -> Subject:
    bundle = PortableBundle.read(path)
    about = bundle.about
    _require_side(path, about.image_size, side)

    def ready(threads: int) -> Run:
        runtime = Runtime(bundle.graph, threads=threads, settle=True)
        return lambda images: runtime.features(images) @ bundle.weight.T + bundle.bias

    return Subject(
        path.name,
        path,
        ONNX,
        about.precision,
        about.image_size,
        about.mean,
        about.std,
        about.classes,
        path.stat().st_size,
        ready,
        partial(_counted, bundle.graph, about.image_size, None),
    )


def _graph(path: Path, side: int | None) -> Subject:
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise ModelError(f"no graph at '{path}': {error.strerror or error}") from error
    runtime = Runtime(graph, path.parent)
    spec = _spec(runtime.metadata.get("spec"))
    own = runtime.side or (spec.image_size if spec else side)
    if own is None:
        raise ModelError(f"'{path}' takes images of any size; say which with --image-size")
    if runtime.side is not None:
        _require_side(path, runtime.side, side)
    plain = ModelSpec.model_fields

    def ready(threads: int) -> Run:
        return Runtime(graph, path.parent, threads, settle=True).features

    return Subject(
        path.name,
        path,
        ONNX,
        "int8" if b"DequantizeLinear" in graph else "fp32",
        side or own,
        spec.mean if spec else plain["mean"].default,
        spec.std if spec else plain["std"].default,
        (),
        path.stat().st_size,
        ready,
        partial(_counted, graph, side or own, path.parent),
    )


def _spec(text: str | None) -> ModelSpec | None:
    try:
        return None if text is None else ModelSpec.from_json(text)
    except ValidationError:
        return None


def _require_side(path: Path, own: int, side: int | None) -> None:
    if side not in (None, own):
        raise ModelError(
            f"'{path}' is made for images of {own} px, not {side}; another size takes a farm's "
            "folder or a backbone's file"
        )


def _counted(graph: bytes, side: int, objects: Path | None) -> "Cost | None":
    try:
        from common.cost import cost_of
    except ModuleNotFoundError:  # a device that only classifies has no onnx
        return None
    return cost_of(graph, side, objects)


# --- in torch ------------------------------------------------------------------------------------


def _farm(folder: Path, side: int | None) -> Subject:
    from client.device import Device

    bundle = Device.of(folder).serving.in_use()
    about = bundle.about
    size = sum(about.manifest.weights.values())
    size += 4 * sum(one.numel() for one in bundle.classifier.parameters())
    spec = about.manifest.spec
    return _torch(folder, bundle.model, spec, side, bundle.classifier, about.classes, size)


def _backbone(path: Path, side: int | None) -> Subject:
    from common.backbone import load_backbone

    model, spec = load_backbone(path)
    return _torch(path, model, spec, side, None, (), path.stat().st_size)


def _torch(
    path: Path,
    model: "VisionTransformer",
    spec: ModelSpec,
    side: int | None,
    classifier: "nn.Module | None",
    classes: tuple[str, ...],
    size: int,
) -> Subject:
    import torch

    from common import backbone
    from common.resize import at_size

    model, spec = at_size(model, spec, side or spec.image_size)

    def ready(threads: int) -> Run:
        def run(images: Floats) -> Floats:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    found = model(torch.from_numpy(images))
                    said: Floats = (found if classifier is None else classifier(found)).numpy()
            finally:
                torch.set_num_threads(before)
            return said

        return run

    def cost() -> "Cost":
        from common.cost import Cost

        return Cost(backbone.macs(spec), backbone.parameters(model))

    return Subject(
        path.name or path.resolve().name,
        path,
        TORCH,
        "fp32",
        spec.image_size,
        spec.mean,
        spec.std,
        classes,
        size,
        ready,
        cost,
    )
