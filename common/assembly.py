"""A backbone out of a manifest and the objects that it names."""

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common import backbone
from common.errors import ModelError, RefusalError, RefuseReason
from common.manifest import Manifest
from common.objects import Objects

_DTYPES = {"F16": torch.float16, "F32": torch.float32}


def require_buildable(manifest: Manifest) -> None:
    """Refuse a manifest whose spec cannot be built here, or whose tensors are not those of it.

    No tensor is needed for that, so it is asked before any is fetched.

    Raises:
        RefusalError: INCOMPATIBLE; says why.
    """
    what = f"version {manifest.counter} cannot be used here"
    try:
        with torch.device("meta"):
            model = backbone.build(manifest.spec)
    except ModelError as error:
        raise RefusalError(f"{what}: {error}", RefuseReason.INCOMPATIBLE) from error
    needed = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor.numel()
    }
    named = {tensor.name: tensor.shape for tensor in manifest.tensors}
    wrong = sorted(name for name in needed | named if needed.get(name) != named.get(name))
    if wrong:
        first = wrong[0]
        raise RefusalError(
            f"{what}: its spec needs '{first}' of {needed.get(first, 'no')} numbers, its manifest "
            f"names {named.get(first, 'none')} ({len(wrong)} such tensors); update this device's "
            "fieldfed, or publish the version again",
            RefuseReason.INCOMPATIBLE,
        )


def tensors_of(manifest: Manifest, objects: Objects) -> dict[str, Tensor]:
    """The tensors of a version by name, each checked against its sha256.

    Raises:
        RefusalError: DAMAGED: one is missing or is not what its name says.
    """
    found = {}
    for one in manifest.tensors:
        data = np.frombuffer(bytearray(objects.load(one.digest, one.bytes)), np.uint8)
        found[one.name] = torch.from_numpy(data).view(_DTYPES[one.dtype]).reshape(one.shape)
    return found


def assemble(manifest: Manifest, objects: Objects) -> VisionTransformer:
    """The backbone of a version, in evaluation mode.

    Raises:
        RefusalError: INCOMPATIBLE, or DAMAGED as :func:`tensors_of` has it.
    """
    require_buildable(manifest)
    model = backbone.assemble(manifest.spec, tensors_of(manifest, objects))
    if backbone.digest(model, manifest.spec) != manifest.backbone:
        raise RefusalError(
            f"version {manifest.counter} is not the backbone that its manifest says",
            RefuseReason.DAMAGED,
        )
    return model
