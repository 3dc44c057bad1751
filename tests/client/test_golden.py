"""What servers asked in each protocol that is spoken, asked again of a farm of today."""

from pathlib import Path
from typing import cast, get_args

import pytest

from client.farm import Farm
from common import codec
from common.compress import expand
from common.messages import AlignReply, AlignRequest, EvaluateRequest, HelloReply, Request
from common.protocols import SCHEMAS
from common.scores import decode_neurons
from common.wire import from_record, to_record
from tests.lab import golden
from tests.lab.network import farms

LIMIT = 10_000_000


@pytest.mark.parametrize("number", sorted(SCHEMAS))
def test_a_farm_does_all_that_it_was_asked(number: int, tmp_path: Path) -> None:
    config, state = farms(tmp_path, 1)[0]
    asked = [from_record(record) for record in golden.read(number).values()]
    requests = [cast(Request, one) for one in asked if isinstance(one, get_args(Request))]
    whole = next(one for one in requests if getattr(one, "body_kind", "") == "full")
    for request in requests:
        shape = golden.shape_of(request)
        if shape.endswith("large") or "student" in shape:
            continue  # so many zeros are no backbone, and no student is small enough to be kept
        place = state
        if shape == "align chain":  # for a farm that skipped all rounds
            place = tmp_path / "other"
            Farm.open(config, place).handle(whole)
        reply = Farm.open(config, place).handle(request)
        assert reply.protocol == number
        assert type(from_record(to_record(reply))) is type(reply)
        if isinstance(request, AlignRequest | EvaluateRequest):
            assert reply.kind == f"{request.kind}_reply", reply
            assert (reply.base, reply.mask) == (request.base, request.mask)  # type: ignore[union-attr]
        else:
            assert isinstance(reply, HelloReply)


@pytest.mark.parametrize("number", sorted(SCHEMAS))
def test_what_farms_sent_is_understood_to_its_last_byte(number: int) -> None:
    replies = [from_record(record) for record in golden.read(number).values()]
    aligned = [one for one in replies if isinstance(one, AlignReply)]
    assert len(aligned) >= 2
    for reply in aligned:
        update = expand(reply.update, LIMIT)
        header = codec.read_header(update)
        assert codec.decode(update, base=reply.base, count=header.count).any()
        if reply.head_importance is not None:
            assert reply.neuron_importance is not None
            heads, neurons = golden.SMALL["depth"] * golden.SMALL["num_heads"], 2 * 4 * 16
            assert reply.head_importance.shape == (heads,)
            assert decode_neurons(reply.neuron_importance, neurons).sum() > 0
