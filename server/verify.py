"""Is this reply an answer to that request? A bad one is put into quarantine by reason."""

from dataclasses import dataclass

import numpy as np

from common import codec
from common.errors import ProtocolError, RejectReason
from common.messages import AlignReply, Array, EvaluateReply, Extent
from common.moments import check as check_moments
from common.scores import decode_neurons
from common.spec import ModelSpec, Spec


@dataclass(frozen=True)
class Asked:
    """What a reply must answer."""

    run: int
    round: int
    base: str
    mask: str


def check_identity(reply: AlignReply | EvaluateReply, asked: Asked) -> None:
    """The reply answers this run and round, and stands on the same base and mask.

    Raises:
        ProtocolError: reason STALE, FOREIGN_BASE or FOREIGN_MASK.
    """
    if (reply.run, reply.round) != (asked.run, asked.round):
        raise ProtocolError(
            f"answers run {reply.run} round {reply.round}, "
            f"asked was run {asked.run} round {asked.round}",
            RejectReason.STALE,
        )
    if reply.base != asked.base:
        raise ProtocolError(
            f"stands on backbone {reply.base[:12]}, asked was {asked.base[:12]}",
            RejectReason.FOREIGN_BASE,
        )
    if reply.mask != asked.mask:
        raise ProtocolError(
            f"carries mask {reply.mask[:12]}, asked was {asked.mask[:12]}",
            RejectReason.FOREIGN_MASK,
        )


def check_evaluate(reply: EvaluateReply, asked: Asked, label: str) -> None:
    """Identity and label; raises ProtocolError."""
    check_identity(reply, asked)
    if reply.label != label:
        raise ProtocolError(f"reports '{reply.label}', asked was '{label}'", RejectReason.STALE)


@dataclass(frozen=True)
class Expected:
    """What an aligned update must look like.

    Attributes:
        spec: the backbone, or student, it stands on.
        count: numbers in the trainable set.
        rank: of its factors, or 0.
        scored: whether scores were asked for.
        limit_bytes: largest update taken.
        moments: what was asked for of them; an older farm sends none.
    """

    spec: Spec
    count: int
    rank: int
    scored: bool
    limit_bytes: int
    moments: Extent | None = None


def check_align(reply: AlignReply, asked: Asked, expected: Expected) -> None:
    """Identity, size, shapes and finite numbers of an aligned update and its scores.

    Raises:
        ProtocolError: with the reason.
    """
    check_identity(reply, asked)
    if reply.update.nbytes > expected.limit_bytes:
        raise ProtocolError(
            f"an update of {reply.update.nbytes} bytes is over the limit of {expected.limit_bytes}",
            RejectReason.OVERSIZED,
        )
    codec.check(reply.update, base=asked.base, count=expected.count, rank=expected.rank)
    if reply.moments is not None:
        if expected.moments is None or not isinstance(expected.spec, ModelSpec):
            raise ProtocolError("moments, which nobody asked for", RejectReason.SHAPE)
        check_moments(reply.moments, expected.spec, expected.moments)
    if not expected.scored:
        return
    assert isinstance(expected.spec, ModelSpec)  # nobody asks for the scores of a student
    heads = sum(expected.spec.heads)
    _check_floats("head_importance", reply.head_importance, heads)
    _check_floats("head_mmd2", reply.head_mmd2, heads)
    if reply.neuron_importance is None:
        raise ProtocolError("neuron_importance is missing", RejectReason.SHAPE)
    decode_neurons(reply.neuron_importance, sum(expected.spec.neurons))


def _check_floats(name: str, values: Array | None, count: int) -> None:
    if values is None or len(values) != count:
        found = "none" if values is None else len(values)
        raise ProtocolError(f"{name} has {found} numbers, not {count}", RejectReason.SHAPE)
    if not np.isfinite(values).all():
        raise ProtocolError(f"{name} is not finite", RejectReason.NOT_FINITE)
