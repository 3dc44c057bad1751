"""The same backbone for images of another side: its position table is interpolated."""

from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from common.backbone import build, patches
from common.errors import ModelError
from common.spec import ModelSpec


def at_size(
    model: VisionTransformer, spec: ModelSpec, side: int
) -> tuple[VisionTransformer, ModelSpec]:
    """A backbone that takes images of ``side`` pixels; where tokens are dropped, the same shares.

    Raises:
        ModelError: it cannot be built for that side.
    """
    if side == spec.image_size:
        return model, spec
    try:
        resized = spec_at(spec, side)
        made = build(resized)
        made.load_state_dict(checkpoint_filter_fn(model.state_dict(), made))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"{spec.name} cannot be built at {side} px: {error}") from error
    return made, resized


def spec_at(spec: ModelSpec, side: int) -> ModelSpec:
    """The spec alone; raises ``pydantic.ValidationError`` for a side that no spec has."""
    plain = spec.model_copy(update={"image_size": side, "kept_tokens": ()})
    share = patches(plain) / patches(spec)
    kept = tuple(max(int(count * share), 1) for count in spec.kept_tokens)
    return ModelSpec.model_validate(plain.model_dump() | {"kept_tokens": kept})
