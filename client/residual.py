"""Error feedback: what a farm learned and the server did not get is part of its next update.

Coding an update v loses v - decode(encode(v)); that residual is added to the next one, so that
nothing is lost in the long run (Seide et al., 2014; Karimireddy et al., 2019). A reply that did not
count, because it was lost or late, is given back whole. Both lie in the file of the farm's newest
reply, so that a reply and what it leaves behind are on disk together or not at all.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch

from client.state import FarmState
from common import codec
from common.backbone import build
from common.codec import Floats
from common.compress import compress, expand
from common.config import TrainConfig
from common.errors import FieldfedError
from common.messages import AlignRequest
from common.surgery import slice_flat
from common.trainable import TrainableSet, trainable_set

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 2_000_000_000


@dataclass(frozen=True, eq=False)
class Coded:
    """An update as it is sent, uint8, and what coding lost of it, fp32 (n,); None: nothing."""

    update: codec.Bytes
    lost: Floats | None


def encode(values: Floats, config: TrainConfig, base: str, rank: int, seed: int) -> Coded:
    """Code an update fp32 (n,) as the request says; few bits are rounded at random by ``seed``."""
    bits = config.update_bits
    rng = np.random.default_rng(seed) if bits < codec.DEFAULT_BITS else None
    payload = codec.encode(values, base, bits=bits, rng=rng, top=config.top, rank=rank)
    exact = bits == 32 and config.top == 1
    lost = None if exact else values - codec.decode(payload, base=base, count=values.size)
    return Coded(compress(payload), lost)


def carried(state: FarmState, request: AlignRequest, trained: TrainableSet) -> Floats | None:
    """What earlier replies left behind for this request's update, fp32 (n,); None: nothing.

    Args:
        state: of the farm.
        request: tells which of the farm's replies count.
        trained: what the request's backbone trains; a cut since then has taken its part away.
    """
    if not request.train.error_feedback:
        return None
    newest = state.newest_aligned(request.run)
    if newest is None or newest.reply.round >= request.round:
        return None
    reply, rest = newest.reply, newest.lost
    try:
        if request.folded is None or reply.round > request.folded:
            sent = expand(reply.update, MAX_PAYLOAD_BYTES)
            count = codec.read_header(sent).count
            given_back = codec.decode(sent, base=reply.base, count=count)
            rest = given_back if rest is None else rest + given_back
            log.info("the reply to round %d did not count; it is part of this one", reply.round)
        if rest is not None and reply.mask != request.mask:
            rest = _sliced(state, request, rest, trained)
    except FieldfedError as error:
        log.warning("what is left of round %d is dropped: %s", reply.round, error)
        return None
    if rest is not None and rest.size != trained.layout.count:
        log.warning("what is left of round %d belongs to other numbers; dropped", reply.round)
        return None
    return rest


def _sliced(
    state: FarmState, request: AlignRequest, rest: Floats, trained: TrainableSet
) -> Floats | None:
    """Without what the last cut removed; None where this farm has not seen that cut.

    Nothing is left either where other numbers are trained since, as ``recovery`` may want it.
    """
    seen = state.load_cut(request.mask)
    if seen is None:
        return None
    spec, keep = seen
    with torch.device("meta"):  # shapes alone
        before = trainable_set(build(spec), request.train.trainable, request.train.rank)
    if rest.size != before.layout.count:
        return None
    return slice_flat(rest, before.layout, spec, keep, trained.layout)
