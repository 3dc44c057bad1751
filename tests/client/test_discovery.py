"""What Home Assistant is told: fields that exist, units that fit, one way to install."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel

from client.discovery import SENSORS, UPDATE_TEMPLATE, payload, topic
from common import topics
from common.errors import ConfigError
from common.topics import DeviceState, Install, Telemetry, Topic

STATE = DeviceState(
    farm="oak",
    release="0.1.0",
    model="Raspberry Pi 5",
    version=14,
    latest=15,
    gain=0.0184,
    accuracy=0.8766,
    last_round=6,
)
TELEMETRY = Telemetry(
    uptime_seconds=5,
    cpu_ratio=0.256,
    memory_used_bytes=1_500_000_000,
    memory_bytes=4_000_000_000,
    disk_free_bytes=7_260_000_000,
    temperature_celsius=51.54,
    link_sent_bytes=1_230_000,
    link_received_bytes=20_000_000,
    outbox_messages=3,
)
LEAST = {"state": DeviceState(farm="a", release="1"), "telemetry": Telemetry(uptime_seconds=0)}
MESSAGES: Mapping[str, type[BaseModel]] = {"state": DeviceState, "telemetry": Telemetry}
# of home-assistant.io/integrations/sensor: units that go with a class, and its classes of state
UNITS: Mapping[str | None, tuple[set[str | None], set[str | None]]] = {
    "data_size": ({"MB", "GB"}, {"measurement", "total_increasing"}),
    "temperature": ({"\u00b0C"}, {"measurement"}),
    None: ({"%", None}, {"measurement", None}),
}
# keys that are documented for these entities, or shared by all of them
KEYS = {
    *("platform", "unique_id", "name", "state_topic", "value_template", "unit_of_measurement"),
    *("device_class", "state_class", "entity_category", "expire_after"),
    *("command_topic", "payload_install"),
}
# what may be in the JSON of an update entity: another key, or a null, and all of it is dropped
UPDATE_KEYS = {"installed_version", "latest_version", "title"}
TOPIC = re.compile(r"homeassistant/(?P<component>\w+)/(?P<object_id>[a-zA-Z0-9_-]+)/config")
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True)

templates = ImmutableSandboxedEnvironment()
templates.filters["to_json"] = json.dumps


def told(state: DeviceState = STATE, network: str = "net", device: str = "pi-3") -> dict[str, Any]:
    found = json.loads(payload(network, device, state))
    assert isinstance(found, dict)
    return found


def rendered(template: str, message: Any) -> str:
    """What Home Assistant makes of a message that came."""
    return templates.from_string(template).render(value_json=json.loads(json.dumps(message.body())))


def fields_of(template: str) -> set[str]:
    tree = templates.parse(template)
    names = {one.name for one in tree.find_all(nodes.Name)} - {"now", "new", "gain", "title"}
    assert names == {"value_json"}, "nothing else is known there"
    return {one.attr for one in tree.find_all(nodes.Getattr)}


def test_one_message_in_the_documented_form() -> None:
    said = told()
    assert said.keys() == {"device", "origin", "components", "availability_topic", "qos"}
    assert said["origin"] == {"name": "fieldfed", "sw_version": "0.1.0"}
    assert said["device"]["model"] == "Raspberry Pi 5"
    components = said["components"].values()
    assert {one["platform"] for one in components} == {"sensor", "update"}
    assert len({one["unique_id"] for one in components}) == len(components) == len(SENSORS) + 1
    for one in components:
        assert one.keys() <= KEYS
        assert None not in one.values()
    named = TOPIC.fullmatch(topic("net", "pi-3"))
    assert named is not None
    assert named["component"] == "device"
    assert said["device"]["identifiers"] == [named["object_id"]]


def test_it_listens_where_the_device_speaks() -> None:
    said = told()
    assert Topic.parse(said["availability_topic"]) == ("net", "pi-3", "availability")
    for key, one in said["components"].items():
        part = "state" if key == "update" else SENSORS[key].part
        assert Topic.parse(one["state_topic"]) == ("net", "pi-3", part)


@pytest.mark.parametrize("key", SENSORS)
def test_a_sensor_shows_a_field_that_there_is(key: str) -> None:
    sensor = SENSORS[key]
    assert fields_of(sensor.template)
    assert fields_of(sensor.template) <= MESSAGES[sensor.part].model_fields.keys()
    full = {"state": STATE, "telemetry": TELEMETRY}[sensor.part]
    assert float(rendered(sensor.template, full)) > 0
    least = rendered(sensor.template, LEAST[sensor.part])
    assert least == ("0" if key == "outbox" else "None"), "Home Assistant's word for unknown"


def test_values_are_in_their_units() -> None:
    both = {"state": STATE, "telemetry": TELEMETRY}
    shown = {key: rendered(one.template, both[one.part]) for key, one in SENSORS.items()}
    assert shown == {
        "version": "14",
        "accuracy": "87.7",
        "last_round": "6",
        "cpu": "25.6",
        "memory": "1500.0",
        "disk": "7.26",
        "temperature": "51.5",
        "sent": "1.23",
        "received": "20.0",
        "outbox": "3",
    }


@pytest.mark.parametrize("key", SENSORS)
def test_units_and_classes_fit_together(key: str) -> None:
    sensor, shown = SENSORS[key], told()["components"][key]
    units, states = UNITS[sensor.device_class]
    assert sensor.unit in units
    assert sensor.state_class in states
    assert shown.get("unit_of_measurement") == sensor.unit
    assert shown.get("device_class") == sensor.device_class
    assert ("expire_after" in shown) == (sensor.part == "telemetry")


def test_telemetry_expires_after_three_that_did_not_come() -> None:
    said = json.loads(payload("net", "pi-3", STATE, telemetry_seconds=300))
    assert said["components"]["cpu"]["expire_after"] == 900


# --- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "title", "versions"),
    [
        ({}, "model 14 -> 15, +1.8 points on your field", ("14", "15")),
        ({"gain": -0.05}, "model 14 -> 15, -5.0 points on your field", ("14", "15")),
        ({"gain": None}, "model 14 -> 15", ("14", "15")),
        ({"version": None, "gain": None}, "model none -> 15", ("0", "15")),
        ({"latest": 14}, "model 14", ("14", "14")),
        ({"latest": None}, "model 14", ("14", "14")),
        ({"version": None, "latest": None, "gain": None}, "model none", ("0", "0")),
    ],
)
def test_an_update_says_what_it_brings(
    changes: dict[str, Any], title: str, versions: tuple[str, str]
) -> None:
    said = json.loads(rendered(UPDATE_TEMPLATE, STATE.model_copy(update=changes)))
    assert said.keys() == UPDATE_KEYS
    assert said["title"] == title
    assert (said["installed_version"], said["latest_version"]) == versions
    assert fields_of(UPDATE_TEMPLATE) <= DeviceState.model_fields.keys()


def test_installing_goes_the_one_way_there_is() -> None:
    update = told()["components"]["update"]
    assert update["command_topic"] == topics.install("net", "pi-3")
    assert Install.parse(update["payload_install"].encode()) == Install(version=15)


@pytest.mark.parametrize("latest", [None, 0])
def test_where_nothing_is_offered_there_is_no_button(latest: int | None) -> None:
    update = told(STATE.model_copy(update={"latest": latest}))["components"]["update"]
    assert not update.keys() & {"command_topic", "payload_install"}


# --- names ---------------------------------------------------------------------------------------


def test_it_stays_small_whatever_the_names() -> None:
    state = STATE.model_copy(update={"model": "\u00e4" * 100, "release": "\u00e4" * 40})
    assert len(payload("n" * 40, "d" * 40, state)) < 8_000


@settings(deadline=None)
@given(st.text(max_size=50), st.text(max_size=100))
def test_no_name_gets_out_of_its_place(name: str, model: str) -> None:
    state = STATE.model_copy(update={"model": model})
    try:
        said = told(state, device=name)
    except ConfigError:
        assert not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name)
        with pytest.raises(ConfigError):
            topic(name, "pi-3")
        said = told(state, device="pi-3")
        name = "pi-3"
    plain = told(STATE, device=name)
    assert said["device"].pop("model", "") == model
    plain["device"].pop("model")
    assert said == plain, "a model shows nowhere else"
    assert topic("net", name).count("/") == 3


@settings(deadline=None)
@given(NAMES, NAMES)
def test_names_are_in_topics_and_never_in_templates(network: str, device: str) -> None:
    components = told(network=network, device=device)["components"]
    expected = {key: one.template for key, one in SENSORS.items()} | {"update": UPDATE_TEMPLATE}
    assert {key: one["value_template"] for key, one in components.items()} == expected
    for one in components.values():
        assert one["state_topic"].startswith(f"fieldfed/{network}/{device}/")


@settings(deadline=None)
@given(st.text("a_1", min_size=2, max_size=8), st.data())
def test_no_two_devices_share_a_place(text: str, data: st.DataObject) -> None:
    cuts = st.integers(1, len(text) - 1)
    pairs = [
        (text[:cut], text[cut:].lstrip("_") or "a") for cut in data.draw(st.tuples(cuts, cuts))
    ]
    (a, b), (c, d) = pairs
    assert (topic(a, b) == topic(c, d)) == ((a, b) == (c, d))
    assert topic(f"{a}_{b}", c) != topic(a, f"{b}_{c}")
