"""How many tokens stay behind which block, for a share of the multiply-accumulates."""

import math

from common.backbone import macs, patches
from common.errors import ConfigError
from common.spec import ModelSpec

STAGES = 4
"""Tokens are dropped behind the first, second and third quarter of the blocks (as EViT does)."""


def with_tokens(spec: ModelSpec, macs_ratio: float, *, fuse: bool = False) -> ModelSpec:
    """The same backbone with as many tokens as a share of its multiply-accumulates pays for.

    Each stage keeps the same share of the patch tokens of the one before.

    Args:
        spec: without token sampling; pruned perhaps.
        macs_ratio: of what ``spec`` costs, below 1.
        fuse: whether dropped tokens are fused into one.

    Raises:
        ConfigError: it is sampled already, too shallow, or no number of tokens is so cheap.
    """
    if spec.kept_tokens or spec.depth < STAGES:
        raise ConfigError(f"{spec.name} with {spec.depth} blocks cannot be given fewer tokens")
    whole, limit = patches(spec), macs_ratio * macs(spec)
    # from dense to sparse: the first that is cheap enough keeps the most
    for step in range(whole - 1, 0, -1):
        sparse = _kept(spec, whole, step / whole, fuse)
        if macs(sparse) <= limit:
            return sparse
    raise ConfigError(
        f"one token a stage still costs {macs(sparse) / macs(spec):.2f} of {spec.name}'s MACs, and "
        f"{macs_ratio:g} is asked for"
    )


def _kept(spec: ModelSpec, whole: int, share: float, fuse: bool) -> ModelSpec:
    stages = (block * STAGES // spec.depth for block in range(1, spec.depth + 1))
    left = (max(math.floor(whole * share ** min(stage, STAGES - 1)), 1) for stage in stages)
    return ModelSpec.model_validate(
        spec.model_dump() | {"kept_tokens": tuple(left), "fuse_tokens": fuse}
    )
