"""A region comes up to the centre's candidate, as a farm does, and can bring its farms there."""

from collections.abc import Iterable
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from common import backbone
from common.anchors import Anchors
from common.catchup import replace, steps_of
from common.codec import Bytes
from common.compress import expand
from common.errors import FieldfedError, ProtocolError, StateError
from common.messages import AlignRequest, Array, EvaluateRequest
from common.spec import ModelSpec
from common.step import MAX_BYTES, Step, most_bytes
from server.models import Models

MOST_NAMED = 64


class MissingBaseError(FieldfedError):
    """An order stands on a backbone, or on anchors, that this region does not hold."""


def bring_up(models: Models, request: AlignRequest | EvaluateRequest) -> None:
    """Hold the candidate that an order stands on, and the steps to it where they came.

    Raises:
        MissingBaseError: what came does not lead there; the whole of it has to be sent.
        ProtocolError: what came is damaged.
    """
    if not _held(models, request.base):
        if request.body_kind not in ("delta", "chain", "tensors", "full") or request.body is None:
            raise MissingBaseError(f"backbone {request.base[:12]} is not here")
        reached = _reached(models, request.body_kind, request.body_from or "", request.body)
        if reached != request.base:
            raise MissingBaseError(
                f"the {request.body_kind} body yields {reached[:12]}, not {request.base[:12]}"
            )
    if isinstance(request, AlignRequest):
        _keep_anchors(models, request.mask, request.anchors_digest, request.anchors)


def held(state_dir: Path) -> tuple[str, ...]:
    """The newest candidates on disk, by digest."""
    paths = sorted(
        (state_dir / "models").glob("*.safetensors"),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    return tuple(path.stem for path in paths[:MOST_NAMED])


def _held(models: Models, digest: str) -> bool:
    if not models.path(digest).is_file() and models.step(digest) is None:
        return False
    try:
        models.view(digest)
    except StateError:
        return False
    return True


def _reached(models: Models, kind: str, start: str, body: Bytes) -> str:
    """Where a body leads; every candidate on the way is kept, with the step to it."""
    if kind == "full":
        return models.save(*backbone.unpack(expand(body, MAX_BYTES).tobytes()))
    if not _held(models, start):
        raise MissingBaseError(f"backbone {start[:12]} is not here")
    model, spec = models.load(start)
    if kind == "tensors":
        replace(model, body)
        return models.save(model, spec)
    limit = most_bytes(model)
    steps = steps_of(body, limit) if kind == "chain" else [Step.from_bytes(body, limit)]
    return _walked(models, start, model, spec, steps)


def _walked(
    models: Models, start: str, model: VisionTransformer, spec: ModelSpec, steps: Iterable[Step]
) -> str:
    reached = start
    for step in steps:
        if step.base != reached:
            raise ProtocolError(f"a step from {step.base[:12]} came as one from {reached[:12]}")
        model, spec = step.apply(model, spec)
        reached = models.save(model, spec, step.to_bytes())
        model, spec = models.load(reached)
    return reached


def _keep_anchors(models: Models, mask: str, digest: str | None, anchors: Array | None) -> None:
    """The anchors of a mask, for farms to align to."""
    if digest is None:
        return
    if anchors is not None:
        models.save_anchors(mask, Anchors.from_bytes(anchors.tobytes()))
    elif models.anchors(mask) is None:
        raise MissingBaseError(f"the anchors of mask {mask[:12]} are not here")
