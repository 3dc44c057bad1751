"""Protocols: what was said once is read for ever, and none changes without its number."""

import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord

from common import protocols
from common.config import TrainConfig
from common.errors import ProtocolError, RejectReason
from common.messages import (
    KINDS,
    AlignRequest,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Lesson,
    Refusal,
    from_parts,
    spoken,
    to_parts,
)
from common.protocols import ADDED, PROTOCOL, SCHEMAS
from common.wire import from_record, to_record
from tests.lab import golden

OLD = PROTOCOL - 1
DIGEST = "a" * 64
WORK: dict[str, Any] = {
    "run": 1,
    "round": 2,
    "attempt": 1,
    "seed": 3,
    "base": DIGEST,
    "mask": DIGEST,
    "train": TrainConfig(),
}
SAID = [(number, name) for number in sorted(SCHEMAS) for name in golden.read(number)]
NEW_FIELD = ("align.steps", "align.train.proximal", "align.privacy.delta", "hello_reply.classes")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """These fields and this value are new in the present protocol."""
    added = (*NEW_FIELD, "align.criterion=magnitude", "align.anchors")
    monkeypatch.setattr(protocols, "ADDED", {PROTOCOL: added})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is new in the present protocol, as it once was."""
    fields = ("body_bytes", "body_kind=hub", "body_object")
    of_work = [f"{kind}.{field}" for kind in ("align", "evaluate") for field in fields]
    monkeypatch.setattr(protocols, "ADDED", {PROTOCOL: ("hello_reply.hub", *of_work)})


def test_two_protocols_are_spoken_at_most_and_the_newest_adds_to_the_other() -> None:
    assert sorted(SCHEMAS) == [OLD, PROTOCOL]
    assert set(ADDED) == {PROTOCOL}


@pytest.mark.parametrize("number", sorted(SCHEMAS))
def test_no_schema_changes_without_its_number(number: int) -> None:
    made = golden.schema_of(number)
    kept = (golden.FOLDER / f"protocol-{number}" / "schema.json").read_text()
    told = "messages differ: see what to do after a change in common/protocols.py"
    assert json.loads(kept) == made, told
    assert golden.digest_of(made) == SCHEMAS[number], told
    assert kept == golden.text_of(made)


def test_a_change_of_a_schema_would_be_noticed(pretend: None) -> None:
    changed = golden.schema_of(OLD)
    assert golden.digest_of(changed) != SCHEMAS[OLD]
    assert "steps" not in changed["align"]
    assert "delta" not in str(changed["align"]["privacy"])
    assert "magnitude" not in str(changed["align"]["criterion"])
    assert "magnitude" in str(golden.schema_of(PROTOCOL)["align"]["criterion"])


def test_every_kind_was_recorded() -> None:
    for number in SCHEMAS:
        assert {name.split()[1] for name in golden.read(number)} == set(KINDS)


@pytest.mark.parametrize(("number", "name"), SAID)
def test_what_was_said_is_read_and_said_the_same(number: int, name: str) -> None:
    record = golden.read(number)[name]
    message = from_record(record)
    assert message.protocol == number
    assert name.endswith(f" {golden.shape_of(message)}")
    assert golden.as_json(to_record(message)) == golden.as_json(record)
    again = from_parts(*to_parts(message))
    assert golden.as_json(to_record(again)) == golden.as_json(record)


@pytest.mark.parametrize("number", [OLD - 1, PROTOCOL + 1])
def test_other_numbers_are_refused_naming_both_and_who_is_to_upgrade(number: int) -> None:
    ours = f"{OLD} and {PROTOCOL}"
    behind = str(number) if number < OLD else ours
    message = HelloRequest(protocol=number)
    reads: list[Callable[[], object]] = [
        lambda: from_record(to_record(message)),
        lambda: from_parts(*to_parts(message)),
    ]
    for read in reads:
        with pytest.raises(ProtocolError) as told:
            read()
        assert told.value.reason is RejectReason.PROTOCOL
        assert f"protocol {number}, this program speaks {ours}" in str(told.value)
        assert str(told.value).endswith(f"upgrade the side that speaks {behind}")


def test_a_refusal_is_read_whatever_its_number() -> None:
    for number in (1, OLD, PROTOCOL, PROTOCOL + 9):
        refusal = Refusal(reason="protocol", detail="no", protocol=number)
        assert from_record(to_record(refusal)) == refusal
        assert from_parts(*to_parts(refusal)) == refusal
    assert not [name for names in ADDED.values() for name in names if name.startswith("refusal.")]


def test_an_older_message_has_no_newer_field(hub: None) -> None:
    reply = HelloReply(farm="apple", examples=3, classes=2, hub=True)
    assert '"hub"' in to_record(reply)["message"]["json"]  # type: ignore[operator]
    old = spoken(reply, OLD)
    assert '"hub"' not in to_record(old)["message"]["json"]  # type: ignore[operator]
    assert from_record(to_record(old)) == HelloReply(
        farm="apple", examples=3, classes=2, protocol=OLD
    )
    smuggled = to_record(reply)
    cast(ConfigRecord, smuggled["message"])["protocol"] = OLD
    with pytest.raises(ProtocolError, match=f"protocol {OLD} has no 'hub'"):
        from_record(smuggled)
    text, arrays = to_parts(reply)
    with pytest.raises(ProtocolError, match=f"protocol {OLD} has no 'hub'"):
        from_parts(text.replace(f'"protocol":{PROTOCOL}', f'"protocol":{OLD}'), arrays)


def test_a_request_that_needs_what_is_newer_is_not_made(hub: None) -> None:
    whole = EvaluateRequest(**WORK, label="probe", body_kind="full", body=np.ones(9, np.uint8))
    assert spoken(whole, OLD).protocol == OLD
    fetched: dict[str, Any] = {"body_kind": "hub", "body_object": DIGEST, "body_bytes": 9}
    for request in (
        EvaluateRequest(**WORK, label="probe", **fetched),
        AlignRequest(**WORK, body_object=DIGEST),
    ):
        with pytest.raises(ProtocolError, match=f"protocol {OLD} has no 'body") as told:
            spoken(request, OLD)
        assert told.value.reason is RejectReason.PROTOCOL
        assert f"upgrade the side that speaks {OLD}" in str(told.value)


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({}, None),
        ({"privacy": {"clip": 1.0}}, None),
        ({"steps": 3}, "'steps'"),
        ({"train": TrainConfig(proximal=0.5)}, "'train.proximal'"),
        ({"privacy": {"clip": 1.0, "delta": 1e-3}}, "'privacy.delta'"),
        ({"anchors": np.ones(3, np.uint8)}, "'anchors'"),
        ({"criterion": "magnitude"}, "'criterion' = 'magnitude'"),
        ({"criterion": "taylor"}, None),
    ],
)
def test_fields_parts_arrays_and_values_may_be_new(
    pretend: None, changes: dict[str, Any], lacks: str | None
) -> None:
    request = AlignRequest(**WORK | changes)
    if lacks is not None:
        with pytest.raises(ProtocolError, match=f"protocol {OLD} has no {lacks}"):
            spoken(request, OLD)
        return
    old = spoken(request, OLD)
    text = str(to_record(old)["message"]["json"])
    assert not [word for word in ('"steps"', '"proximal"', '"delta"') if word in text]
    for again in (from_record(to_record(old)), from_parts(*to_parts(old))):
        assert again == old
    assert "proximal" in to_parts(request)[0], "a copy is made shorter, not what is said"


def test_a_reply_leaves_out_what_is_newer_but_not_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        protocols, "ADDED", {PROTOCOL: ("hello_reply.held", "hello_reply.farm=oak")}
    )
    reply = HelloReply(farm="apple", examples=3, classes=2, held=(DIGEST,))
    assert '"held"' not in str(to_record(spoken(reply, OLD))["message"]["json"])
    with pytest.raises(ProtocolError, match="has no 'farm' = 'oak'"):
        spoken(HelloReply(farm="oak", examples=3, classes=2), OLD)


def test_an_older_farm_is_not_asked_to_teach_a_student() -> None:
    student = EvaluateRequest(**WORK, label="student", base_kind="student")
    taught = AlignRequest(**WORK, base_kind="student", lesson=Lesson(teacher=DIGEST))
    alone = AlignRequest(**WORK, lesson=Lesson(teacher=DIGEST))
    for request, lacks in ((student, "base_kind"), (taught, "base_kind"), (alone, "lesson")):
        assert from_record(to_record(request)) == request
        assert from_parts(*to_parts(request)) == request
        with pytest.raises(ProtocolError, match=f"protocol 3 has no '{lacks}'"):
            spoken(request, 3)
    assert protocols.has("align", "lesson", 4)
    assert not protocols.has("align", "lesson", 3)
    assert protocols.has("align", "privacy", 3)
