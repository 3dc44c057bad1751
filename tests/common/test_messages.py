"""Messages as text and arrays: exact round trips, and no room for anything else."""

import json

import numpy as np
import pytest

from common.config import TrainConfig
from common.errors import ProtocolError, RejectReason
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    HelloReply,
    Refusal,
    from_parts,
    to_parts,
)
from common.protocols import PROTOCOL

DIGEST = "a" * 64
REPLY = AlignReply(
    run=1,
    round=2,
    attempt=1,
    farm="oak",
    base=DIGEST,
    mask=DIGEST,
    examples=3,
    accuracy=0.5,
    f1=0.4,
    loss=1.0,
    dal=-0.1,
    steps=8,
    train_seconds=1.0,
    seconds=1.5,
    update=np.arange(5, dtype=np.uint8),
    head_importance=np.ones(4, np.float32),
)


def test_a_round_trip_changes_nothing() -> None:
    text, arrays = to_parts(REPLY)
    assert set(arrays) == {"update", "head_importance"}
    again = from_parts(text, arrays)
    assert isinstance(again, AlignReply)
    assert to_parts(again)[0] == text
    np.testing.assert_array_equal(again.update, REPLY.update)


def test_a_request_carries_its_settings() -> None:
    request = AlignRequest(
        run=1, round=1, attempt=1, seed=0, base=DIGEST, mask=DIGEST, train=TrainConfig(lr=0.5)
    )
    again = from_parts(*to_parts(request))
    assert isinstance(again, AlignRequest)
    assert again.train.lr == 0.5


@pytest.mark.parametrize("extra", ["labels", "image", "classifier", "class_names"])
def test_there_is_no_field_for_what_must_stay_on_the_farm(extra: str) -> None:
    text, arrays = to_parts(REPLY)
    with pytest.raises(ProtocolError, match=extra):
        from_parts(text, arrays | {extra: np.zeros(3, np.float32)})
    with pytest.raises(ProtocolError, match=extra):
        from_parts(json.dumps(json.loads(text) | {extra: [1, 2]}), arrays)


def test_another_protocol_version_is_told_from_nonsense() -> None:
    text, arrays = to_parts(REPLY)
    other = json.dumps(json.loads(text) | {"protocol": PROTOCOL + 1})
    with pytest.raises(ProtocolError, match=str(PROTOCOL + 1)) as error:
        from_parts(other, arrays)
    assert error.value.reason is RejectReason.PROTOCOL


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"protocol": 2}', '{"kind": "x", "protocol": 2}']
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        from_parts(text, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("accuracy", 1.5), ("accuracy", "NaN"), ("base", "short"), ("farm", "a b"), ("examples", 0)],
)
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    text, arrays = to_parts(REPLY)
    with pytest.raises(ProtocolError, match=field):
        from_parts(json.dumps(json.loads(text) | {field: value}), arrays)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint8), np.zeros(2, np.float64), None])
def test_an_array_of_another_kind_is_refused(array: object) -> None:
    text, _ = to_parts(REPLY)
    with pytest.raises(ProtocolError, match="update"):
        from_parts(text, {"update": array})  # type: ignore[dict-item]


def test_text_in_replies_is_bounded() -> None:
    with pytest.raises(ValueError, match="detail"):
        Refusal(reason="internal", detail="x" * 501)
    with pytest.raises(ValueError, match="farm"):
        HelloReply(farm="x" * 41, examples=1, classes=2)
    assert "label" in EvaluateReply.model_fields
