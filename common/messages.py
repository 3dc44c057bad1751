"""What server and farm say to each other, as typed values. Nothing here knows Flower.

A request names its round exactly (run, round, attempt) and what it stands on (base and mask
digest), so that it can be repeated, cached and de-duplicated. A reply never holds a label, a
class name, an image, a per-image value or a classifier: there is no field for them, and unknown
fields are refused on both sides. What an older protocol has is in common/protocols.py.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, ValidationError
from pydantic_core import core_schema

from common import protocols
from common.config import PrivacyConfig, TrainConfig
from common.errors import ProtocolError, RejectReason
from common.lesson import Terms
from common.plan import Criterion
from common.protocols import PROTOCOL

Array: TypeAlias = npt.NDArray[Any]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FarmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
TRIAL = "trial-"
"""How labels of reports begin, on decide parts, that say which of several cuts to make."""
Extent: TypeAlias = Literal["heads", "all"]
"""Of which layers moments are: those that read heads, or those that read neurons, too."""
Label = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}$", description="probe, dense, ...")]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _array_of(dtype: type[np.generic]) -> GetPydanticSchema:
    def check(value: object) -> Array:
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != 1:
            raise ValueError(f"must be a one-dimensional {dtype.__name__} array")
        return value

    return GetPydanticSchema(
        lambda _type, _handler: core_schema.no_info_plain_validator_function(check),
        lambda _schema, _handler: {"type": f"array of {dtype.__name__}"},
    )


Bytes = Annotated[Array, _array_of(np.uint8)]
Floats = Annotated[Array, _array_of(np.float32)]


def is_trial(label: str) -> bool:
    """Whether reports of this label judge a draft of a cut."""
    return label.startswith(TRIAL)


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    protocol: int = Field(default=PROTOCOL, ge=1, le=1_000_000, description="it is written in")


class Work(Message):
    """What every request for work says: its identity and what it stands on."""

    run: int = Field(ge=0, lt=2**53)
    round: int = Field(ge=0, le=1_000_000, description="0: before the first round")
    attempt: int = Field(ge=1, le=1000)
    seed: int = Field(ge=0, lt=2**32)
    base: Digest = Field(description="the backbone to stand on after the body is applied")
    base_kind: Literal["backbone", "student"] = Field(
        default="backbone", description="student: a network that learns from a backbone"
    )
    mask: Digest = Field(description="the mask that backbone carries")
    body_kind: Literal["none", "delta", "chain", "tensors", "full", "hub"] = "none"
    body_from: Digest | None = Field(default=None, description="the base that the body changes")
    body: Bytes | None = Field(
        default=None, description="a step, what common/catchup.py makes, or a packed backbone"
    )
    body_object: Digest | None = Field(default=None, description="sha256 of a body at the hub")
    body_bytes: int | None = Field(default=None, ge=1, le=2**31, description="its length")

    WAYS: ClassVar[frozenset[str]] = frozenset(
        {"attempt", "anchors", "body", "body_kind", "body_from", "body_object", "body_bytes"}
    )
    """How what is asked for comes to a farm; two requests that differ in nothing else ask the same.

    Backbone and anchors are told apart by their digests.
    """

    def identity(self) -> dict[str, Any]:
        """What a reply repeats, so that it can be matched to this request."""
        return {name: getattr(self, name) for name in ("run", "round", "attempt", "base", "mask")}


class HelloRequest(Message):
    """Who are you, and which backbones do you hold?"""

    kind: Literal["hello"] = "hello"


class HelloReply(Message):
    """A farm introduces itself."""

    kind: Literal["hello_reply"] = "hello_reply"
    farm: FarmName
    examples: int = Field(ge=1, le=10**9, description="images of the fit part")
    classes: int = Field(ge=2, le=100_000)
    held: tuple[Digest, ...] = Field(default=(), max_length=64)
    hub: bool = Field(default=False, description="it can fetch a whole backbone from the hub")


class Lesson(Terms):
    """From whom a student learns, and how much it heeds it; the farm holds the teacher."""

    teacher: Digest = Field(description="a backbone that the farm was asked to evaluate before")


class AlignRequest(Work):
    """One round of local alignment, or with ``lesson`` of teaching a student."""

    kind: Literal["align"] = "align"
    train: TrainConfig
    anchors_digest: Digest | None = Field(default=None, description="sha256; None: no anchors")
    anchors: Bytes | None = Field(
        default=None, description="safetensors; absent where the farm holds them already"
    )
    criterion: Criterion | None = Field(
        default=None, description="also score every head and MLP neuron, in this way"
    )
    steps: int | None = Field(default=None, ge=1, description="at most so many; None: all epochs")
    folded: int | None = Field(
        default=None, ge=0, description="newest round in which a reply of this farm counts"
    )
    privacy: PrivacyConfig | None = Field(default=None, description="noise to add; None: none")
    lesson: Lesson | None = Field(default=None, description="of a student; None: alignment")
    moments: Extent | None = Field(
        default=None, description="second moments of the base's layers to send along"
    )


class Done(Message):
    """What every reply to work says: whose it is, to which request, and how well the base did.

    ``link_sent`` and ``link_received`` are the bytes at the farm's socket over its life, as they
    stand when the reply is sent; absent where nobody counts. The reply's own way up is in the next.
    """

    run: int = Field(ge=0, lt=2**53)
    round: int = Field(ge=0, le=1_000_000)
    attempt: int = Field(ge=1, le=1000)
    farm: FarmName
    base: Digest
    mask: Digest
    examples: int = Field(ge=1, le=10**9)
    accuracy: Ratio
    f1: Ratio
    seconds: Finite = Field(ge=0)
    link_sent: int | None = Field(default=None, ge=0, lt=2**50)
    link_received: int | None = Field(default=None, ge=0, lt=2**50)


class AlignReply(Done):
    """A coded update and, in score rounds, the scores.

    ``accuracy`` and ``f1`` are those of the incoming base on the decide part; ``examples`` counts
    the images of the fit part. Under privacy, figures that nothing depends on are kept back and
    read 0: ``f1``, ``loss``, ``dal`` and, where scores carry noise, ``head_mmd2``.
    """

    kind: Literal["align_reply"] = "align_reply"
    loss: Finite = Field(description="mean training loss of the last epoch")
    dal: Finite
    steps: int = Field(ge=1, le=10**9, description="steps of training")
    train_seconds: Finite = Field(ge=0, description="spent on those steps")
    update: Bytes
    head_importance: Floats | None = Field(default=None, description="(sum of heads,)")
    head_mmd2: Floats | None = Field(default=None, description="(sum of heads,)")
    neuron_importance: Bytes | None = Field(default=None, description="(sum of neurons,) 8 bit")
    moments: Bytes | None = Field(default=None, description="of the fit images (common/moments.py)")


class EvaluateRequest(Work):
    """Refit the classifier to the base and report on the whole test part.

    ``part`` "decide" asks for what a decision is made on instead; nothing else may open "test".
    With ``local_rounds`` the farm first trains alone, as long as that many rounds would (the
    local-only baseline); what it learns is reported and thrown away.
    """

    kind: Literal["evaluate"] = "evaluate"
    label: Label
    part: Literal["test", "decide"] = "test"
    local_rounds: int = Field(default=0, ge=0, le=10_000)
    train: TrainConfig


class EvaluateReply(Done):
    """Accuracy of the base with a refitted classifier on that part, and its images' number."""

    kind: Literal["evaluate_reply"] = "evaluate_reply"
    label: Label


class Refusal(Message):
    """A farm that cannot do what was asked says why.

    It looks the same in every protocol: the number of one that refuses a protocol is the one that
    its farm speaks.
    """

    kind: Literal["refusal"] = "refusal"
    reason: Literal["protocol", "missing_base", "bad_request", "data", "internal"]
    detail: str = Field(default="", max_length=500)


Request: TypeAlias = HelloRequest | AlignRequest | EvaluateRequest
Reply: TypeAlias = HelloReply | AlignReply | EvaluateReply | Refusal

KINDS: dict[str, type[Request | Reply]] = {
    "hello": HelloRequest,
    "hello_reply": HelloReply,
    "align": AlignRequest,
    "align_reply": AlignReply,
    "evaluate": EvaluateRequest,
    "evaluate_reply": EvaluateReply,
    "refusal": Refusal,
}


AnyMessage = TypeVar("AnyMessage", bound=Message)


def spoken(message: AnyMessage, protocol: int) -> AnyMessage:
    """The message in that protocol.

    Raises:
        ProtocolError: that protocol lacks what a request asks for, or a value; names it.
    """
    kind = type(message).model_fields["kind"].default
    for one in protocols.additions(kind, protocol):
        value, unset = _value_and_default(message, one.path)
        if one.value is not None:
            needed = value == one.value
        else:  # only a request needs what it says
            said = isinstance(value, np.ndarray) or value != unset
            needed = said and isinstance(message, get_args(Request))
        if needed:
            raise ProtocolError(
                f"protocol {protocol} has no {one.words}; upgrade the side that speaks {protocol}, "
                "or leave that out",
                RejectReason.PROTOCOL,
            )
    return message.model_copy(update={"protocol": protocol})


def _value_and_default(message: BaseModel, path: tuple[str, ...]) -> tuple[Any, Any]:
    """Of a field of a message; nothing for both inside of a part that is absent."""
    for name in path[:-1]:
        message = getattr(message, name)
        if message is None:
            return None, None
    field = type(message).model_fields[path[-1]]
    return getattr(message, path[-1]), field.get_default(call_default_factory=True)


def to_parts(message: Request | Reply) -> tuple[str, dict[str, Array]]:
    """A message as canonical JSON text and its arrays by field name; absent fields are left out."""
    fields: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    for name, value in message:
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif value is not None:
            fields[name] = value.model_dump() if isinstance(value, BaseModel) else value
    fields, arrays = (
        protocols.without(message.kind, one, message.protocol) for one in (fields, arrays)
    )
    return json.dumps(fields, sort_keys=True, separators=(",", ":")), arrays


def from_parts(
    text: str, arrays: dict[str, Array], kinds: Mapping[str, type[Request | Reply]] = KINDS
) -> Request | Reply:
    """Inverse of :func:`to_parts`; ``kinds``: the messages that may come.

    Raises:
        ProtocolError: another protocol version, an unknown kind, or a field that is missing,
            unknown or wrong; the message names it.
    """
    try:
        fields = json.loads(text)
        protocol, kind = fields["protocol"], kinds[fields["kind"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"not a message: {type(error).__name__} {error}") from error
    if type(protocol) is not int:
        raise ProtocolError(f"protocol {protocol!r:.40} is no number")
    if kind is not Refusal:
        protocols.require_spoken(protocol)
    if not fields.keys().isdisjoint(arrays):
        raise ProtocolError(f"field given twice: {sorted(fields.keys() & arrays)}")
    protocols.require_known(fields["kind"], fields | arrays, protocol)
    try:
        return kind.model_validate(fields | arrays)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:4]
        )
        raise ProtocolError(f"{fields['kind']}: {faults}") from error
