"""Self-distillation: what a farm knew before a cut teaches what the cut has left.

    loss = ... + weight * (T^2 KL(teacher || student, softened by T) + |tokens - teacher's|^2)

The teacher (Hinton et al., 2015; of the network's own larger self, as in Furlanello et al., 2018)
is the backbone that the last prune event cut, which the farm keeps in case the cut is undone, with
the farm's own classifier for it: nothing crosses the network for it. It sees the very images that
the student has just seen, augmented alike, in evaluation mode and without a gradient. A cut leaves
the width of tokens as it was, so what the last block says of every token is compared, over the
teacher's spread; few images a class are soon known by heart, and say little more by their labels.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from client.state import FarmState
from common.backbone import dense_spec
from common.distil import soft_answers, token_distance
from common.messages import AlignRequest, EvaluateRequest
from common.precision import bfloat16
from common.spec import ModelSpec

log = logging.getLogger(__name__)

Asked: TypeAlias = AlignRequest | EvaluateRequest
Fitted: TypeAlias = Callable[[VisionTransformer, ModelSpec, str], nn.Linear]
"""The farm's classifier for a backbone of this digest."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A backbone that teaches, and the farm's classifier for it."""

    model: VisionTransformer
    spec: ModelSpec
    classifier: nn.Linear


def teacher_of(
    state: FarmState, request: AlignRequest, spec: ModelSpec, fitted: Fitted
) -> Teacher | None:
    """Who teaches in this round; None where nothing was cut, and where this farm has nobody.

    Args:
        state: of the farm.
        request: names the mask and says whether a teacher is wanted.
        spec: of the backbone that the request stands on.
        fitted: yields the classifier of the teacher.
    """
    if request.train.self_distil == 0:
        return None
    if is_whole(spec):
        return None
    digest = state.before_cut(request.mask)
    held = None if digest is None else state.load_backbone(digest, touch=False)
    if digest is None or held is None:
        _say_once(state, request)
        return None
    return Teacher(*held, fitted(*held, digest))


def is_whole(spec: ModelSpec) -> bool:
    """Whether nothing was cut from such a backbone."""
    dense = dense_spec(spec.name, spec.image_size, dict(spec.options))
    return (spec.heads, spec.neurons) == (dense.heads, dense.neurons)


def keep_teacher(
    state: FarmState, request: Asked, digest: str, model: VisionTransformer, spec: ModelSpec
) -> None:
    """Keep what is about to be cut, where a farm that missed rounds only passes through it."""
    if request.train.self_distil > 0 and digest not in state.held():
        state.save_backbone(digest, model, spec)


def _say_once(state: FarmState, request: AlignRequest) -> None:
    """In the first round after the cut, or after the farm came."""
    newest = state.newest_aligned(request.run)
    if newest is None or newest.reply.mask != request.mask:
        log.warning(
            "this farm does not have the backbone of before the last cut, for it came later or "
            "lost it; it trains without self-distillation until the next"
        )


@contextmanager
def teaching(
    model: nn.Module,
    classifier: nn.Linear,
    teacher: Teacher,
    *,
    weight: float,
    temperature: float,
    autocast: bool,
) -> Iterator[Callable[[], Tensor]]:
    """A loss of the images that ``model`` has just seen: how far off its teacher it is.

    Args:
        model: the student, images (B,3,S,S) -> features (B,C), watched until the block is left;
            where it is no transformer, it has no tokens to compare.
        classifier: the student's.
        teacher: answers in evaluation mode; it is left in it.
        weight: of the loss.
        temperature: T.
        autocast: the teacher, too, looks in bfloat16.
    """
    seen: dict[str, Tensor] = {}

    def watch(_module: nn.Module, images: tuple[Any, ...], features: Tensor) -> None:
        seen["images"], seen["features"] = images[0], features

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], tokens: Tensor) -> None:
            seen[name] = tokens

        return hook

    def loss() -> Tensor:
        images = seen["images"]
        with torch.no_grad(), bfloat16(images.device, autocast):
            features = teacher.model(images)
        with torch.no_grad():
            answers = teacher.classifier(features.float())
        said = classifier(seen["features"].float())
        apart = soft_answers(said, answers, temperature)
        if "ours" in seen:
            apart = apart + token_distance(seen["ours"], seen["theirs"])
        return weight * apart

    teacher.model.eval()
    handles = [model.register_forward_hook(watch)]
    if isinstance(model, VisionTransformer):
        # where tokens are dropped or merged each has others in the end, but the same features
        ours, theirs = (
            one if teacher.spec.kept_tokens else one.norm for one in (model, teacher.model)
        )
        handles.append(ours.register_forward_hook(keep("ours")))
        handles.append(theirs.register_forward_hook(keep("theirs")))
    try:
        yield loss
    finally:
        for handle in handles:
            handle.remove()
