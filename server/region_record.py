"""What a centre and its regions say to each other: orders down, sealed records up.

An order is a request as farms get it (common/messages.py) and the terms that it is played on. What
comes back is the region's reply, sealed:

    offset  bytes  field
    0       4      magic     b"FFSR"
    4       4      length    uint32, little-endian, of the seal
    8       ...    seal      signed JSON (common/signing.py): whose it is, for whom, the answer to
                             what, and sha256 and length of what follows
    ...     ...    reply     safetensors: the arrays of the reply, and its fields as canonical JSON
                             in the metadata

A record of a round holds sums over the region's farms and nothing else: how many farms and images,
the weighted mean of the updates, mean accuracy and, in a score round, the mean and the maximum of
the scores. There is no field for a farm.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import ProtocolError, RefusalError, RefuseReason, RejectReason
from common.messages import (
    KINDS,
    AlignReply,
    AlignRequest,
    Array,
    Digest,
    EvaluateReply,
    EvaluateRequest,
    Floats,
    HelloReply,
    Refusal,
    Reply,
    Request,
    from_parts,
    to_parts,
)
from common.plan import Criterion
from common.signing import Document, KeySet, NetworkName, read
from common.spec import ModelSpec
from common.tensors import header_of
from server.keys import SigningKeys

MAGIC = b"FFSR"
HELLO = "hello"
MAX_ORDER_BYTES = 1_000_000_000
_HEAD = struct.Struct("<4sI")
_SUMS = ("head_mean", "head_most", "neuron_mean", "neuron_most", "shift", "totals")


# --- orders --------------------------------------------------------------------------------------


class Terms(BaseModel):
    """What an order says beside the request.

    ``run_id`` tells runs of the same number apart, also where a centre was set up anew; ``mask`` is
    the JSON of the mask that the request names. Scores of heads need ``tau``, the scale that the
    centre has frozen; before it has, the invariance counts for nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    centre: NetworkName
    run_id: Digest
    rounds: int = Field(ge=1, le=10_000, description="that the run plans")
    criterion: Criterion
    exponent: float = Field(ge=0, le=10, allow_inf_nan=False)
    tau: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    mask: str = Field(max_length=500_000)


@dataclass(frozen=True)
class Order:
    """A request of the centre to a region."""

    terms: Terms
    request: AlignRequest | EvaluateRequest

    @property
    def key(self) -> str:
        """What it asks for: the same however often it is asked."""
        return key_of(self.terms.run_id, self.request)

    def to_bytes(self) -> bytes:
        """As it travels."""
        text, arrays = to_parts(self.request)
        return _packed(json.dumps([self.terms.model_dump(), text]), arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Order":
        """Inverse of :meth:`to_bytes`; raises ProtocolError."""
        text, arrays = _unpacked(data)
        try:
            terms, message = json.loads(text)
            read_terms = Terms.model_validate(terms)
        except (ValueError, TypeError) as error:
            raise ProtocolError(f"not an order: {str(error)[:200]}") from error
        request = from_parts(str(message), arrays)
        if not isinstance(request, AlignRequest | EvaluateRequest):
            raise ProtocolError(f"'{request.kind}' is no order")
        if hashlib.sha256(read_terms.mask.encode()).hexdigest() != request.mask:
            raise ProtocolError(
                "the mask is not the one that the order names", RejectReason.FOREIGN_MASK
            )
        return cls(read_terms, request)


def key_of(run_id: str, request: Request) -> str:
    """Names what a request asks for, on which base; an introduction belongs to no run."""
    if isinstance(request, AlignRequest):
        return f"align-{request.round}-{run_id}-{request.base[:16]}"
    if isinstance(request, EvaluateRequest):
        return f"evaluate-{request.round}-{request.label}-{run_id}-{request.base[:16]}"
    return HELLO


# --- replies -------------------------------------------------------------------------------------


class RegionReply(AlignReply):
    """What the farms of a region learned together in a round, and how they score the units.

    ``farms`` replies went into ``update``, their mean by images, which is coded exactly (32 bits);
    ``examples`` is the sum, ``accuracy``, ``f1``, ``loss`` and ``dal`` are means over farms. In a
    score round, fp32: ``head_mean`` (U,) and ``neuron_mean`` (V,) are weighted means of the farms'
    scores, ``head_most`` and ``neuron_most`` the maxima, ``shift`` (U,) the plain mean of their
    squared MMDs, and ``totals`` (2,) the sum of the weights and the number of farms that scored.
    """

    farms: int = Field(ge=1, le=10**7)
    head_mean: Floats | None = None
    head_most: Floats | None = None
    neuron_mean: Floats | None = None
    neuron_most: Floats | None = None
    shift: Floats | None = None
    totals: Floats | None = None


REPLIES: Mapping[str, type[Request | Reply]] = {
    "hello_reply": HelloReply,
    "align_reply": RegionReply,
    "evaluate_reply": EvaluateReply,
    "refusal": KINDS["refusal"],
}


def check_sums(reply: RegionReply, spec: ModelSpec) -> None:
    """The sums of a score round are there and fit the backbone.

    Raises:
        ProtocolError: SHAPE, NOT_FINITE, or MALFORMED where numbers contradict each other.
    """
    heads, neurons = sum(spec.heads), sum(spec.neurons)
    sizes = dict(zip(_SUMS, (heads, heads, neurons, neurons, heads, 2), strict=True))
    sums: dict[str, Array] = {}
    for name, count in sizes.items():
        values = getattr(reply, name)
        if values is None or len(values) != count:
            found = "none" if values is None else len(values)
            raise ProtocolError(f"{name} has {found} numbers, not {count}", RejectReason.SHAPE)
        if not np.isfinite(values).all():
            raise ProtocolError(f"{name} is not finite", RejectReason.NOT_FINITE)
        sums[name] = values
    weight, farms = sums["totals"]
    if weight <= 0 or not 1 <= farms <= reply.farms:
        raise ProtocolError(f"{farms:g} of {reply.farms} farms scored, with a weight of {weight:g}")
    for kind in ("head", "neuron"):
        if (sums[f"{kind}_mean"] < 0).any() or (
            sums[f"{kind}_mean"] > 1.0001 * sums[f"{kind}_most"]
        ).any():
            raise ProtocolError(f"{kind} scores are negative, or their mean is above their maximum")


# --- the seal ------------------------------------------------------------------------------------


class Seal(Document):
    """Whose a record is, for which centre, the answer to what, and what it holds."""

    region: NetworkName
    centre: NetworkName
    key: Annotated[str, Field(max_length=200)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def sealed(reply: Reply, region: str, centre: str, key: str, keys: SigningKeys) -> bytes:
    """A reply, signed by its region."""
    payload = _packed(*to_parts(reply))
    digest = hashlib.sha256(payload).hexdigest()
    seal = Seal(region=region, centre=centre, key=key, bytes=len(payload), sha256=digest)
    text = keys.sign("round", seal).encode()
    return _HEAD.pack(MAGIC, len(text)) + text + payload


def opened(
    data: bytes, *, region: str, centre: str, key: str, keys: KeySet, now: datetime
) -> Reply:
    """What a region has sealed for this centre in answer to this question.

    Args:
        data: as :func:`sealed` made it.
        region: whose it has to be.
        centre: whom it has to be for.
        key: of the question (:func:`key_of`).
        keys: those that the centre knows of the region.
        now: for keys that count no longer.

    Raises:
        RefusalError: not signed by the region, altered, another region's, meant for another centre
            or the answer to another question, of another round or run.
        ProtocolError: the region has signed what is no reply.
    """
    seal, payload = _opened(data, region, keys, now)
    for what, said, wanted in (
        ("region", seal.region, region),
        ("centre", seal.centre, centre),
        ("question", seal.key, key),
    ):
        if said != wanted:
            raise RefusalError(
                f"region {region}: a record of {what} '{said}' came where '{wanted}' was asked",
                RefuseReason.FOREIGN,
            )
    text, arrays = _unpacked(payload)
    reply = cast(Reply, from_parts(text, arrays, REPLIES))
    if not isinstance(reply, Refusal) and reply.farm != region:
        raise ProtocolError(f"region {region} has signed a reply of '{reply.farm}'")
    return reply


def _opened(data: bytes, region: str, keys: KeySet, now: datetime) -> tuple[Seal, bytes]:
    magic, length = _HEAD.unpack(data[: _HEAD.size]) if len(data) >= _HEAD.size else (b"", 0)
    text, payload = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
    if magic != MAGIC or len(text) != length:
        raise RefusalError(f"region {region}: this is no sealed record", RefuseReason.MALFORMED)
    try:
        seal = read(Seal, "round", text.decode("utf-8", "replace"), keys, now)
    except RefusalError as error:
        raise RefusalError(f"region {region}: {error}", error.reason) from error
    if len(payload) != seal.bytes or hashlib.sha256(payload).hexdigest() != seal.sha256:
        raise RefusalError(
            f"region {region}: the record is not what its seal says: it was changed on its way",
            RefuseReason.TAMPERED,
        )
    return seal, payload


def _packed(text: str, arrays: Mapping[str, Array]) -> bytes:
    return save(dict(arrays), metadata={"message": text})


def _unpacked(data: bytes) -> tuple[str, dict[str, Array]]:
    try:
        header, _ = header_of(data)
        about: Any = header["__metadata__"]
        return str(about["message"]), load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"not a message: {str(error)[:200]}") from error
