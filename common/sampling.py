"""How many tokens stay behind which block, for a share of the multiply-accumulates."""

import math

from common.backbone import macs, patches
from common.errors import ConfigError
from common.spec import ModelSpec

LEAST_DEPTH = 4


def with_tokens(spec: ModelSpec, macs_ratio: float, *, merge: bool = True) -> ModelSpec:
    """The same backbone with as many tokens as a share of its multiply-accumulates pays for.

    Tokens are merged behind every second block from the first to the middle: early, where most of
    them are alike. They are dropped behind the first, second and third quarter of the blocks, as
    EViT does: late, when it shows which matter. Each time the same share of the patch tokens stays.

    Args:
        spec: without token sampling; pruned perhaps.
        macs_ratio: of what ``spec`` costs, below 1.
        merge: whether tokens that go are merged into the most similar, not dropped.

    Raises:
        ConfigError: it is sampled already, too shallow, or no number of tokens is so cheap.
    """
    if spec.kept_tokens or spec.depth < LEAST_DEPTH:
        raise ConfigError(f"{spec.name} with {spec.depth} blocks cannot be given fewer tokens")
    whole, limit = patches(spec), macs_ratio * macs(spec)
    # from dense to sparse: the first that is cheap enough keeps the most
    for step in range(whole - 1, 0, -1):
        sparse = _kept(spec, whole, step / whole, merge)
        if macs(sparse) <= limit:
            return sparse
    raise ConfigError(
        f"one token a stage still costs {macs(sparse) / macs(spec):.2f} of {spec.name}'s MACs, and "
        f"{macs_ratio:g} is asked for"
    )


def _kept(spec: ModelSpec, whole: int, share: float, merge: bool) -> ModelSpec:
    places = _places(spec.depth, merge)
    stages = (sum(place <= block for place in places) for block in range(spec.depth))
    left = (max(math.floor(whole * share**stage), 1) for stage in stages)
    return ModelSpec.model_validate(
        spec.model_dump() | {"kept_tokens": tuple(left), "merge_tokens": merge}
    )


def _places(depth: int, merge: bool) -> list[int]:
    """Numbers of the blocks behind which there are fewer tokens."""
    if merge:
        return list(range(0, depth // 2 + 1, 2))
    return [math.ceil(quarter * depth / 4) - 1 for quarter in (1, 2, 3)]
