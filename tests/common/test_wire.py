"""Records on the wire: what goes in comes out, and nothing else gets in."""

import io
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.config import TrainConfig
from common.errors import ProtocolError, RejectReason
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
)
from common.protocols import PROTOCOL
from common.wire import MAX_JSON_BYTES, from_record, message_type, size_of, to_record

DIGEST = "a" * 64
WORK: dict[str, Any] = {
    "run": 1,
    "round": 2,
    "attempt": 1,
    "seed": 3,
    "base": DIGEST,
    "mask": DIGEST,
}
JUDGED: dict[str, Any] = {
    "examples": 9,
    "accuracy": 0.5,
    "f1": 0.25,
    "seconds": 1.5,
    "farm": "apple",
}
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8

bytes_arrays = hnp.arrays(np.uint8, st.integers(0, 300))
float_arrays = hnp.arrays(np.float32, st.integers(0, 80))
names = st.from_regex(r"\A[A-Za-z0-9_-]{1,40}\Z")
ratios = st.floats(0, 1)
finite = st.floats(allow_nan=False, allow_infinity=False)


def align_reply(**changes: Any) -> AlignReply:
    values = {"run": 1, "round": 2, "attempt": 1, "base": DIGEST, "mask": DIGEST, **JUDGED}
    values |= {
        "loss": 0.1,
        "dal": 0.0,
        "steps": 8,
        "train_seconds": 1.0,
        "update": np.arange(40, dtype=np.uint8),
        **changes,
    }
    return AlignReply(**values)


LARGE = 200_004
"""Bytes of an array too large to lie beside the JSON."""

MESSAGES: list[Request | Reply] = [
    HelloRequest(),
    HelloReply(farm="apple", examples=3, classes=2, held=(DIGEST,)),
    AlignRequest(**WORK, train=TrainConfig(), anchors=np.zeros(5, np.uint8), criterion="taha"),
    AlignRequest(**WORK, train=TrainConfig(dal_weight=1e-7)),
    EvaluateRequest(**WORK, label="probe", train=TrainConfig(), body=np.ones(9, np.uint8)),
    align_reply(head_importance=np.linspace(0, 1, 72, dtype=np.float32)),
    EvaluateReply(run=1, round=0, attempt=1, base=DIGEST, mask=DIGEST, label="dense", **JUDGED),
    Refusal(reason="data", detail="Blätter 🌿"),
]


def same(a: Request | Reply, b: Request | Reply) -> bool:
    left, right = dict(a), dict(b)
    if type(a) is not type(b) or left.keys() != right.keys():
        return False
    return all(
        np.array_equal(left[key], right[key], equal_nan=True)
        and left[key].dtype == right[key].dtype
        if isinstance(left[key], np.ndarray)
        else left[key] == right[key]
        for key in left
    )


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_every_message_comes_back(message: Request | Reply) -> None:
    assert same(from_record(to_record(message)), message)


@settings(max_examples=40, deadline=None)
@given(bytes_arrays, st.none() | float_arrays, names, ratios, finite, st.integers(1, 10**9))
def test_any_reply_comes_back(
    update: Any, scores: Any, farm: str, accuracy: float, loss: float, examples: int
) -> None:
    message = align_reply(
        update=update,
        head_mmd2=scores,
        farm=farm,
        accuracy=accuracy,
        loss=loss,
        examples=examples,
    )
    record = to_record(message)
    found = from_record(record)
    assert same(found, message)
    assert size_of(to_record(found)) == size_of(record)


def test_arrays_are_views_of_the_bytes_that_arrived() -> None:
    reply = from_record(to_record(align_reply()))
    assert isinstance(reply, AlignReply)
    assert not reply.update.flags.owndata
    assert not reply.update.flags.writeable


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_requests_have_a_flower_type_and_replies_have_none(message: Request | Reply) -> None:
    if isinstance(message, HelloRequest | AlignRequest | EvaluateRequest):
        category, _, action = message_type(message).partition(".")
        assert category in ("query", "train", "evaluate")
        assert action.isidentifier()


def test_size_counts_every_object_and_equal_chunks_once() -> None:
    small, large = np.zeros(10, np.uint8), np.zeros(1000, np.uint8)
    first, second = (size_of(to_record(align_reply(update=array))) for array in (small, large))
    text = len(to_record(align_reply())["message"]["json"])  # type: ignore[arg-type]
    assert first > text
    assert 985 <= second - first <= 1000  # the array itself, and more digits in its headers
    chunk = 5_242_880  # Flower's default outside of its programs
    repeated = np.zeros(2 * chunk - 128, np.uint8)  # .npy header in the first chunk
    assert size_of(to_record(align_reply(update=repeated))) > 2 * chunk
    repeated = np.zeros(3 * chunk - 128, np.uint8)
    assert size_of(to_record(align_reply(update=repeated))) < 2 * chunk + 3000


# --- what does not get in -----------------------------------------------------------------------


def refused(
    record: RecordDict, reason: RejectReason = RejectReason.MALFORMED, **limits: int
) -> str:
    with pytest.raises(ProtocolError) as info:
        from_record(record, **limits)
    assert info.value.reason is reason
    return str(info.value)


def edited(message: Request | Reply, **changes: Any) -> RecordDict:
    record = to_record(message)
    envelope = record["message"]
    assert isinstance(envelope, ConfigRecord)
    for key, value in changes.items():
        envelope[key] = value
    return record


def with_array(name: str, array: Array) -> RecordDict:
    record = to_record(align_reply(update=np.zeros(LARGE, np.uint8)))
    arrays = record["arrays"]
    assert isinstance(arrays, ArrayRecord)
    arrays[name] = array
    return record


def test_another_protocol_is_told_first_with_both_numbers() -> None:
    text = refused(edited(HelloRequest(), protocol=7, kind="greet"), RejectReason.PROTOCOL)
    assert "7" in text
    assert str(PROTOCOL) in text
    assert refused(to_record(HelloRequest(protocol=PROTOCOL + 1)), RejectReason.PROTOCOL)


def test_not_a_message_at_all() -> None:
    assert "message" in refused(RecordDict())
    assert "message" in refused(RecordDict({"message": MetricRecord({"protocol": 1})}))
    assert "protocol" in refused(edited(HelloRequest(), protocol="1"))
    assert "protocol" in refused(edited(HelloRequest(), protocol=True))


@pytest.mark.parametrize("kind", ["greet", "", 3, b"hello"])
def test_unknown_kinds(kind: Any) -> None:
    assert "kind" in refused(edited(HelloRequest(), kind=kind))


def test_unknown_records_keys_and_arrays() -> None:
    record = to_record(HelloRequest())
    record["image"] = ConfigRecord({"jpeg": JPEG})
    assert "'image'" in refused(record)
    assert "'jpeg'" in refused(edited(HelloRequest(), jpeg=JPEG))
    leak = Array(np.zeros((3, 384), np.float32))
    assert "'classifier.weight'" in refused(with_array("classifier.weight", leak))
    arrays = ArrayRecord({"update": Array(np.zeros(3, np.uint8))})
    record = to_record(HelloReply(farm="apple", examples=3, classes=2))
    record["arrays"] = arrays
    assert "'update'" in refused(record)
    record["arrays"] = ArrayRecord()
    assert "arrays" in refused(record)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("[" * 100_000, "JSON"),
        ('{"reason":"data"}', "canonical"),
        ('{"detail": "", "reason": "data"}', "canonical"),
        ('{"detail":"secret","detail":"","reason":"data"}', "canonical"),
        ('{"detail":"","reason":"hungry"}', "reason"),
        ('{"detail":"","labels":[1],"reason":"data"}', "labels"),
        ('{"detail":"","kind":"refusal","reason":"data"}', "kind"),
    ],
)
def test_json_that_is_not_exactly_the_message(text: str, named: str) -> None:
    assert named in refused(edited(Refusal(reason="data"), json=text))


def test_values_out_of_bounds_name_their_field() -> None:
    text = str(to_record(align_reply())["message"]["json"])
    assert "accuracy" in refused(edited(align_reply(), json=text.replace("0.5", "1.5")))
    assert "loss" in refused(edited(align_reply(), json=text.replace('"loss":0.1', '"loss":NaN')))
    assert "canonical" in refused(edited(align_reply(), json=text.replace("0.5", "0.50")))


def test_long_text_and_large_arrays() -> None:
    long = '{"detail":"","reason":"data"}'.ljust(MAX_JSON_BYTES + 1)
    assert refused(edited(Refusal(reason="data"), json=long), RejectReason.OVERSIZED)
    for size, header in ((10_000, 0), (LARGE, 128)):
        record = to_record(align_reply(update=np.zeros(size, np.uint8)))
        assert "update" in refused(record, RejectReason.OVERSIZED, max_array_bytes=size - 1)
        assert from_record(record, max_array_bytes=size + header)


def test_small_arrays_lie_beside_the_json_and_large_ones_do_not() -> None:
    small, large = (
        to_record(align_reply(update=np.zeros(n, np.uint8))) for n in (LARGE - 4, LARGE)
    )
    assert set(small) == {"message"}
    assert set(large) == {"message", "arrays"}
    assert "update" in small["message"]
    assert "update" not in large["message"]
    values = np.linspace(0, 1, 7, dtype=np.float32)
    assert "message" in to_record(align_reply(head_mmd2=values))


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"abc", "flat float32"), ("text", "flat float32"), (1.5, "flat float32")],
)
def test_bytes_that_are_no_array_are_refused(data: Any, words: str) -> None:
    text = refused(edited(align_reply(), head_mmd2=data))
    assert words in text
    assert "head_mmd2" in text


def test_an_array_lies_where_its_size_says_and_only_there() -> None:
    many = b"x" * LARGE
    assert refused(edited(align_reply(), update=many), RejectReason.OVERSIZED)
    four = npy(np.zeros(4, np.uint8))
    assert "belong beside" in refused(update_of(four, shape=(4,)))
    twice = with_array("update", Array(np.zeros(LARGE, np.uint8)))
    envelope = twice["message"]
    assert isinstance(envelope, ConfigRecord)
    envelope["update"] = b"1234"
    assert "twice" in refused(twice)


def npy(array: np.ndarray[Any, Any], **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def update_of(
    data: bytes,
    dtype: str = "uint8",
    shape: tuple[int, ...] = (LARGE,),
    stype: str = "numpy.ndarray",
) -> RecordDict:
    return with_array("update", Array(dtype, shape, stype, data))


MANY = npy(np.zeros(LARGE, np.uint8))


@pytest.mark.parametrize(
    "record",
    [
        update_of(JPEG),
        update_of(b""),
        update_of(MANY + b"tail"),
        update_of(MANY[:-1]),
        update_of(MANY, stype="pickle"),
        update_of(MANY, dtype="int8"),
        update_of(MANY, shape=(LARGE + 1,)),
        update_of(MANY.replace(b"(200004,)", b"(900004,)"), shape=(900004,)),
        update_of(MANY.replace(b"(200004,), }     ", b"(200004,), }hide!")),
        update_of(MANY.replace(b"(200004,), }", b"(2 * 10**9,)")),
        update_of(npy(np.zeros((2, LARGE // 2), np.uint8)), shape=(2, LARGE // 2)),
        update_of(npy(np.zeros(LARGE, np.float32)), dtype="float32"),
        update_of(npy(np.zeros(LARGE, np.int8)), dtype="int8"),
        update_of(npy(np.array([{}, {}, {}, {}]), allow_pickle=True)),
    ],
)
def test_arrays_that_are_not_flat_npy_bytes_of_the_right_type(record: RecordDict) -> None:
    assert "belong beside" not in (text := refused(record))
    assert "update" in text


def test_a_promised_size_is_not_allocated() -> None:
    data = MANY.replace(b"(200004,), }" + b" " * 9, b"(99999999999999,), }" + b" ")
    assert len(data) == len(MANY)
    assert "announced" in refused(update_of(data, shape=(99999999999999,)))


def test_big_endian_floats_are_refused() -> None:
    record = with_array(
        "head_mmd2", Array("float32", (3,), "numpy.ndarray", npy(np.ones(3, ">f4")))
    )
    assert "head_mmd2" in refused(record)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_damaged_arrays_never_raise_anything_else(noise: bytes, start: int) -> None:
    data = MANY[:start] + noise + MANY[start + len(noise) :]
    header = len(MANY) - LARGE
    if data[:header] == MANY[:header]:
        assert from_record(update_of(data))  # other numbers
    else:
        refused(update_of(data))
