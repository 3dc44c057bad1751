"""What a request stands on, brought up to date: from disk, a coded step or a whole body."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from client.state import FarmState
from client.teacher import Asked, keep_teacher
from common import backbone, codec, fit
from common.catchup import replace, steps_of
from common.compress import expand
from common.errors import FieldfedError, ModelError, ProtocolError, StateError
from common.images import FarmFolder
from common.messages import EvaluateRequest, is_trial
from common.networks import Network
from common.spec import ModelSpec, Spec, StudentSpec
from common.step import MAX_BYTES, Step, most_bytes
from common.student import Student, unpack_student


class MissingBaseError(FieldfedError):
    """The request stands on a backbone, or on anchors, that this farm does not hold."""


@dataclass
class Base:
    """A backbone or a student on its way through one request."""

    model: Network
    spec: Spec
    digest: str

    def transformer(self) -> tuple[VisionTransformer, ModelSpec]:
        """Where only a backbone will do; raises ModelError."""
        if not isinstance(self.model, VisionTransformer) or not isinstance(self.spec, ModelSpec):
            raise ModelError(f"{self.spec.name} is a student: it can only be taught and evaluated")
        return self.model, self.spec

    def student(self) -> tuple[Student, StudentSpec]:
        """Where only a student will do; raises ModelError."""
        if not isinstance(self.model, Student) or not isinstance(self.spec, StudentSpec):
            raise ModelError(f"{self.spec.name} is a backbone: it is not taught")
        return self.model, self.spec


def newest_base(state: FarmState, farm: str = "this farm") -> Base:
    """The newest backbone that a farm holds; raises StateError where it has none."""
    for digest in state.backbones():
        held = state.load_backbone(digest, touch=False)
        if held is not None:
            return Base(*held, digest)
    raise StateError(f"{farm} has no backbone yet; let it take part in a round first")


_M = TypeVar("_M", VisionTransformer, Student)
_S = TypeVar("_S", ModelSpec, StudentSpec)


def classifier_of(state: FarmState, folder: FarmFolder, base: Base) -> nn.Linear:
    """The classifier that the farm keeps for a network, or one fitted now, which is not kept."""
    kept = state.load_classifier(base.digest, len(folder.classes))
    if kept is not None:
        return kept
    features = fit.extract(base.model, folder.fit, base.spec)
    return fit.fit_classifier(*features, len(folder.classes))


@dataclass(frozen=True)
class _Shelf(Generic[_M, _S]):
    """Where a kind of network is kept, and how one is read from a body."""

    load: Callable[[str], tuple[_M, _S] | None]
    save: Callable[[str, _M, _S], None]
    unpack: Callable[[bytes], tuple[_M, _S]]
    step: Callable[[Step, _M, _S], tuple[_M, _S]]


def brought_up(state: FarmState, request: Asked, farm: str) -> Base:
    """What the request stands on; kept on disk.

    Raises:
        MissingBaseError: the farm does not hold what the body changes, or it leads elsewhere.
        ProtocolError, ModelError: the body is damaged.
    """
    if request.base_kind == "student":
        students = _Shelf(
            state.load_student,
            state.save_student,
            unpack_student,
            lambda step, student, spec: step.apply(student, spec),
        )
        return Base(*_brought_up(students, request, farm), request.base)

    draft = isinstance(request, EvaluateRequest) and is_trial(request.label)

    def stepped(
        step: Step, model: VisionTransformer, spec: ModelSpec
    ) -> tuple[VisionTransformer, ModelSpec]:
        if step.cut is not None:
            keep_teacher(state, request, step.base, model, spec)
            state.save_cut(request.mask, spec, step.cut.keep, step.base, draft)
        return step.apply(model, spec)

    save = partial(state.save_backbone, draft=draft)
    backbones = _Shelf(state.load_backbone, save, backbone.unpack, stepped)
    return Base(*_brought_up(backbones, request, farm), request.base)


def _brought_up(shelf: _Shelf[_M, _S], request: Asked, farm: str) -> tuple[_M, _S]:
    held = shelf.load(request.base)
    if held is not None:
        return held
    if request.body_kind == "none" or request.body is None:
        raise MissingBaseError(f"{farm} does not hold {request.base_kind} {request.base[:12]}")
    if request.body_kind == "full":
        model, spec = shelf.unpack(expand(request.body, MAX_BYTES).tobytes())
    else:
        parent = request.body_from or ""
        before = shelf.load(parent) if parent else None
        if before is None:
            raise MissingBaseError(f"{farm} does not hold {request.base_kind} {parent[:12]}")
        model, spec = _changed(shelf, request, request.body, before)
    if backbone.digest(model, spec) != request.base:
        raise MissingBaseError(
            f"{farm}: the {request.body_kind} body does not yield {request.base[:12]}"
        )
    shelf.save(request.base, model, spec)
    return model, spec


def _changed(
    shelf: _Shelf[_M, _S], request: Asked, body: codec.Bytes, held: tuple[_M, _S]
) -> tuple[_M, _S]:
    """What a body makes of the one held."""
    if request.body_kind == "tensors":
        replace(held[0], body)
        return held
    limit = most_bytes(held[0])
    chained = request.body_kind == "chain"
    steps = steps_of(body, limit) if chained else [Step.from_bytes(body, limit)]
    if not steps or steps[0].base != request.body_from:
        raise ProtocolError("steps from another base came as steps from the one that is named")
    for step in steps:
        held = shelf.step(step, *held)
    return held
