"""What devices in the field read and say beside training does not change under them."""

import json

import pytest

from tests.lab import documents

KEPT = json.loads(documents.PATH.read_text())
NOW = documents.described()


def test_everything_is_kept_on_record() -> None:
    assert {part: sorted(of) for part, of in KEPT.items()} == {
        part: sorted(of) for part, of in NOW.items()
    }


@pytest.mark.parametrize("name", KEPT["strict"])
def test_a_document_that_is_read_strictly_stays_as_it_is(name: str) -> None:
    told = f"devices of an older release refuse this {name}: give it another format"
    assert NOW["strict"][name] == KEPT["strict"][name], told


@pytest.mark.parametrize("name", KEPT["mqtt"])
def test_messages_over_mqtt_only_gain_fields_that_may_be_absent(name: str) -> None:
    kept, now = KEPT["mqtt"][name], NOW["mqtt"][name]
    assert now["required"] == kept["required"]
    assert {field: now["fields"].get(field) for field in kept["fields"]} == kept["fields"]


@pytest.mark.parametrize("name", KEPT["hub"])
def test_messages_of_the_hub_only_gain_fields(name: str) -> None:
    assert {**NOW["hub"][name], **KEPT["hub"][name]} == NOW["hub"][name]
