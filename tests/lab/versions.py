"""Versions of a tiny backbone in a registry: one, its child with other biases, its pruned child."""

from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from common import backbone
from common.manifest import FarmResult
from common.mask import Mask
from common.spec import ModelSpec
from common.surgery import prune
from server.publish import Origin, publish
from server.registry import Registry
from server.versions import VersionRow
from tests.lab.network import SIDE, TINY

NETWORK = "valley"


def model_of(seed: int = 0) -> tuple[VisionTransformer, ModelSpec]:
    """A tiny backbone of random weights."""
    torch.manual_seed(seed)
    spec = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
    return backbone.build(spec), spec


@torch.no_grad()
def learnt(model: VisionTransformer, seed: int) -> VisionTransformer:
    """The same with other biases, as a round leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 100)
    return model


def pruned(model: VisionTransformer, spec: ModelSpec) -> tuple[VisionTransformer, ModelSpec]:
    """The same without one head of the first block."""
    mask = Mask.dense(spec)
    heads = (tuple(range(1, spec.heads[0])), *mask.heads[1:])
    smaller = Mask(heads, mask.neurons, mask.dense_heads, mask.dense_neurons)
    return prune(model, spec, smaller.keep_in(mask))


def add_version(
    registry: Registry, model: VisionTransformer, spec: ModelSpec, accuracy: float = 0.9
) -> VersionRow:
    """Publish a backbone that two farms found that good."""
    results = {
        farm: FarmResult(part="decide", accuracy=accuracy, f1=accuracy, examples=40)
        for farm in ("apple", "rice")
    }
    return publish(registry, model, spec, Origin(1, 2, "a" * 64, results))


def registry_in(folder: Path) -> Registry:
    """A new registry."""
    return Registry.create(folder, NETWORK)


def two_versions(folder: Path) -> Registry:
    """A new registry with a version and its child, which learnt a round more."""
    registry = registry_in(folder)
    model, spec = model_of()
    add_version(registry, model, spec)
    add_version(registry, learnt(model, 1), spec, 0.95)
    return registry


def random_object(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return np.random.default_rng(seed).bytes(size)
