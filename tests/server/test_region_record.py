"""Sealed records: what a region has sealed for this centre and question, and nothing else."""

import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import FieldfedError, ProtocolError, RefusalError, RefuseReason, RejectReason
from common.mask import Mask
from common.messages import AlignRequest, EvaluateReply, EvaluateRequest, HelloReply, Reply
from common.signing import TrustedKey
from server.keys import SigningKeys
from server.region_desk import KEPT, Desk
from server.region_record import (
    HELLO,
    MAGIC,
    Order,
    RegionReply,
    Terms,
    key_of,
    opened,
    sealed,
)
from tests.lab.replies import DIGEST
from tests.server.test_region_sums import SPEC, reply

RUN, OTHER = "1" * 64, "2" * 64
MASK = Mask.dense(SPEC)
NOW = datetime.now(UTC)
TRAIN = {"trainable": "bias"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SigningKeys:
    return SigningKeys.create(tmp_path_factory.mktemp("north"), "north")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> SigningKeys:
    return SigningKeys.create(tmp_path_factory.mktemp("south"), "south")


def align(
    number: int = 1, attempt: int = 1, folded: int | None = None, base: str = DIGEST
) -> AlignRequest:
    return AlignRequest.model_validate(
        {
            "run": 1,
            "round": number,
            "attempt": attempt,
            "seed": 0,
            "base": base,
            "mask": MASK.digest,
            "train": TRAIN,
            "folded": folded,
        }
    )


def evaluate(number: int = 1) -> EvaluateRequest:
    return EvaluateRequest.model_validate(
        {
            "run": 1,
            "round": number,
            "attempt": 1,
            "seed": 0,
            "base": DIGEST,
            "mask": MASK.digest,
            "train": TRAIN,
            "label": "model",
        }
    )


def order(
    request: AlignRequest | EvaluateRequest | None = None, run_id: str = RUN, centre: str = "coop"
) -> Order:
    terms = Terms(
        centre=centre,
        run_id=run_id,
        rounds=3,
        criterion="taylor",
        exponent=0.0,
        mask=MASK.to_json(),
    )
    return Order(terms, request or align())


KEY = key_of(RUN, align())


def record(keys: SigningKeys, key: str = KEY, centre: str = "coop", region: str = "north") -> bytes:
    return sealed(reply(farm=region), region, centre, key, keys)


def look(data: bytes, keys: SigningKeys, key: str = KEY) -> Reply:
    return opened(data, region="north", centre="coop", key=key, keys=keys.keys, now=NOW)


def test_what_was_sealed_is_what_is_opened(keys: SigningKeys) -> None:
    found = look(record(keys), keys)
    assert isinstance(found, RegionReply)
    assert found.farms == 3
    np.testing.assert_array_equal(found.totals, np.array([9.0, 3.0], np.float32))
    assert record(keys) == record(keys)


def test_every_kind_of_reply_can_be_sealed(keys: SigningKeys) -> None:
    hello = HelloReply(farm="north", examples=9, classes=4, held=(DIGEST,))
    assert look(sealed(hello, "north", "coop", HELLO, keys), keys, HELLO) == hello
    report = EvaluateReply(
        **evaluate().identity(),
        farm="north",
        label="model",
        examples=9,
        accuracy=0.5,
        f1=0.5,
        seconds=1.0,
    )
    assert look(sealed(report, "north", "coop", KEY, keys), keys) == report


def unsigned(data: bytes) -> bytes:
    length = struct.unpack("<4sI", data[:8])[1]
    seal = data[8 : 8 + length]
    bare = seal[: seal.index(b'"signatures"')] + b'"signatures":{}}'
    return struct.pack("<4sI", MAGIC, len(bare)) + bare + data[8 + length :]


def altered(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def resealed(data: bytes) -> bytes:
    return data.replace(b"north", b"nerth", 1)


@pytest.mark.parametrize(
    ("spoil", "reason", "said"),
    [
        (unsigned, RefuseReason.UNSIGNED, "no signature"),
        (altered, RefuseReason.TAMPERED, "changed on its way"),
        (resealed, RefuseReason.TAMPERED, "not what key"),
        (lambda data: data[:-3], RefuseReason.TAMPERED, "changed on its way"),
        (lambda _: b"", RefuseReason.MALFORMED, "no sealed record"),
        (lambda _: b"FFSR\xff\xff\xff\xff", RefuseReason.MALFORMED, "no sealed record"),
    ],
)
def test_what_is_no_seal_of_the_region_is_refused_by_name(
    keys: SigningKeys, spoil: Callable[[bytes], bytes], reason: RefuseReason, said: str
) -> None:
    with pytest.raises(RefusalError, match=said) as caught:
        look(spoil(record(keys)), keys)
    assert caught.value.reason is reason
    assert "region north" in str(caught.value)


def test_another_regions_record_is_refused(keys: SigningKeys, others: SigningKeys) -> None:
    with pytest.raises(RefusalError) as caught:
        look(record(others), keys)  # which claims to be of north
    assert caught.value.reason is RefuseReason.WRONG_KEY


@pytest.mark.parametrize(
    ("key", "centre", "region", "said"),
    [
        (key_of(RUN, align(2)), "coop", "north", "question 'align-2-1111"),
        (key_of(OTHER, align()), "coop", "north", "question 'align-1-2222"),
        (key_of(RUN, align(base=OTHER)), "coop", "north", "question 'align-1-1111.*-2222"),
        (HELLO, "coop", "north", "question 'hello'"),
        (KEY, "union", "north", "centre 'union'"),
        (KEY, "coop", "south", "region 'south'"),
    ],
)
def test_a_record_for_another_round_run_or_centre_is_refused(
    keys: SigningKeys, key: str, centre: str, region: str, said: str
) -> None:
    with pytest.raises(RefusalError, match=said) as caught:
        look(record(keys, key, centre, region), keys)
    assert caught.value.reason is RefuseReason.FOREIGN


def test_a_region_cannot_speak_for_another(keys: SigningKeys) -> None:
    data = sealed(reply(farm="south"), "north", "coop", KEY, keys)
    with pytest.raises(ProtocolError, match="signed a reply of 'south'"):
        look(data, keys)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damage_anywhere_is_noticed(keys: SigningKeys, data: st.DataObject) -> None:
    whole = bytearray(record(keys))
    seal_end = 8 + struct.unpack("<4sI", whole[:8])[1]
    place = data.draw(st.integers(0, len(whole) - 1))
    # the last digit of base64 has bits that say nothing
    assume(not whole.index(b'"signatures"') < place < seal_end)
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FieldfedError):
        look(bytes(whole), keys)


def test_a_key_that_counts_no_longer_seals_nothing(keys: SigningKeys) -> None:
    old = TrustedKey(id=keys.keys.keys[0].id, public=keys.keys.keys[0].public, until=NOW)
    known = keys.keys.model_copy(update={"keys": (old,)})
    with pytest.raises(RefusalError) as caught:
        opened(record(keys), region="north", centre="coop", key=KEY, keys=known, now=NOW)
    assert caught.value.reason is RefuseReason.EXPIRED


# --- orders --------------------------------------------------------------------------------------


def test_an_order_is_read_as_it_was_written() -> None:
    first = order()
    again = Order.from_bytes(first.to_bytes())
    assert again.terms == first.terms
    assert again.request == first.request
    assert again.key == KEY


def test_an_order_with_another_mask_is_refused() -> None:
    other = order(align().model_copy(update={"mask": DIGEST}))
    with pytest.raises(ProtocolError) as caught:
        Order.from_bytes(other.to_bytes())
    assert caught.value.reason is RejectReason.FOREIGN_MASK


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_garbage_is_no_order(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Order.from_bytes(data)


# --- the desk ------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Desk.at(tmp_path) as desk:
        yield desk


def test_the_first_answer_stands(desk: Desk) -> None:
    desk.give(order().to_bytes())
    current = desk.current()
    assert current is not None
    assert desk.take(KEY, 1) is None
    desk.answer(current, b"sealed", refusal=False)
    desk.give(order(align(attempt=2)).to_bytes())
    assert desk.current() is None
    assert [desk.take(KEY, 1), desk.take(KEY, 2)] == [b"sealed", b"sealed"]


def test_a_refusal_is_for_one_attempt(desk: Desk) -> None:
    desk.give(order().to_bytes())
    desk.answer(order(), b"refused", refusal=True)
    assert desk.current() is None
    assert desk.take(KEY, 1) == b"refused"
    desk.give(order(align(attempt=2)).to_bytes())
    current = desk.current()
    assert current is not None
    assert current.request.attempt == 2
    assert desk.take(KEY, 2) is None


def test_the_newest_order_counts(desk: Desk) -> None:
    desk.give(order().to_bytes())
    desk.give(order(evaluate()).to_bytes())
    current = desk.current()
    assert current is not None
    assert current.request.kind == "evaluate"


def test_answers_go_when_the_centre_needs_them_no_more(desk: Desk) -> None:
    desk.introduce(b"hello")
    desk.answer(order(align(1)), b"one", refusal=False)
    desk.answer(order(align(2)), b"two", refusal=False)  # nothing of it counts yet
    assert desk.take(KEY, 1) == b"one"
    desk.answer(order(align(3, folded=1)), b"three", refusal=False)
    assert desk.take(KEY, 1) is None
    assert desk.take(key_of(RUN, align(2)), 1) == b"two"
    desk.answer(order(align(1), run_id=OTHER), b"anew", refusal=False)
    assert desk.take(key_of(RUN, align(2)), 1) is None
    assert desk.take(HELLO, 1) == b"hello"


def test_no_more_than_a_few_answers_are_kept(desk: Desk) -> None:
    for number in range(1, KEPT + 5):
        desk.answer(order(align(number)), b"x", refusal=False)
    kept = [number for number in range(1, KEPT + 5) if desk.take(key_of(RUN, align(number)), 1)]
    assert kept == list(range(5, KEPT + 5))
