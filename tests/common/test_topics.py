"""Messages over MQTT: what is read is checked, and names no file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import topics
from common.errors import ProtocolError

KINDS = (
    topics.DeviceState,
    topics.Telemetry,
    topics.Result,
    topics.Event,
    topics.Install,
    topics.ModelNotice,
    topics.RoundNotice,
)
TELEMETRY = topics.Telemetry(
    uptime_seconds=12.5,
    cpu_ratio=0.25,
    memory_used_bytes=3,
    memory_bytes=8,
    disk_free_bytes=5,
    temperature_celsius=51.5,
)


def test_a_topic_is_taken_apart_as_it_was_put_together() -> None:
    for part in topics.PARTS:
        assert topics.Topic.parse(f"fieldfed/net/pi-3/{part}") == ("net", "pi-3", part)
    for other in (
        topics.models("net", "stable"),
        topics.rounds("net"),
        topics.install("net", "pi-3"),
        "fieldfed/net/server/state",
        "fieldfed/net/models/state",
        "fieldfed/net/pi-3/secrets",
        "",
    ):
        assert topics.Topic.parse(other) is None


def test_a_message_says_only_what_is_known_and_is_read_as_it_was() -> None:
    body = TELEMETRY.body()
    assert set(body) == {
        *("uptime_seconds", "cpu_ratio", "memory_used_bytes", "memory_bytes", "disk_free_bytes"),
        *("temperature_celsius", "outbox_messages", "outbox_bytes", "dropped_messages"),
    }
    sent = body | {"id": 7, "time": 1.5, "of_a_later_release": [1]}
    assert topics.Telemetry.parse(json.dumps(sent).encode()) == TELEMETRY


def test_a_fault_names_the_field_and_not_the_value() -> None:
    sent = json.dumps(TELEMETRY.body() | {"cpu_ratio": 17.25}).encode()
    with pytest.raises(ProtocolError, match=r"^no Telemetry: cpu_ratio: ") as raised:
        topics.Telemetry.parse(sent)
    assert "17.25" not in str(raised.value)
    with pytest.raises(ProtocolError, match="at most 65536 are read"):
        topics.Event.parse(b" " * (topics.MOST_BYTES + 1))


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text().map(str.encode) | st.just(b'{"share": NaN}'))
def test_whatever_comes_is_a_message_or_a_protocol_error(payload: bytes) -> None:
    for kind in KINDS:
        with pytest.raises(ProtocolError):
            kind.parse(payload)


def test_no_message_has_a_field_for_a_file() -> None:
    names = {name for kind in KINDS for name in kind.model_fields}
    assert not {"image", "path", "file", "name", "folder"} & names
