"""A device introduces itself to Home Assistant: one retained message with all of its entities.

    homeassistant/device/OBJECT_ID/config

The format is that of MQTT device discovery (Home Assistant 2024.11 and later; home-assistant.io/
integrations/mqtt), with its keys in full: ``device``, ``origin`` and ``components``, each component
with ``platform`` and ``unique_id``. Values come from the device's own topics (common/topics.py):
templates pick them from its JSON, and nothing is published twice.

Installing goes the one way there is: the button publishes :class:`~common.topics.Install`, and the
device then takes what its channel names, if it is signed and no worse. The number in that message
is fixed where it is announced, so a device announces itself anew when its channel names another
version; where it names none, there is no button.

A message that Home Assistant cannot use is dropped whole: a null or an unknown key in the JSON of
an update entity is enough. So templates leave out what is not known.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from common import topics
from common.errors import ConfigError
from common.outbox import JSON, text_of
from common.topics import DeviceState, Install, Part

PREFIX: Final = "homeassistant"
LONGEST_NAME: Final = 40
EXPIRE_PERIODS: Final = 3
"""Telemetry that did not come so many times is no longer believed."""
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}")

Payload = dict[str, JSON]


class Sensor(NamedTuple):
    """One value of a message: how it is called, found and shown."""

    name: str
    part: Part
    template: str
    unit: str | None = None
    device_class: str | None = None
    state_class: str | None = None
    diagnostic: bool = True


def _value(field: str, expression: str = "{}") -> str:
    """A template that yields a field, or says that it is not known where the message lacks it."""
    said = expression.format(f"value_json.{field}")
    return f"{{{{ {said} if value_json.{field} is defined else none }}}}"


_PERCENT, _MEGABYTES, _GIGABYTES = (
    "(100 * {}) | round(1)",
    "({} / 1e6) | round(2)",
    "({} / 1e9) | round(2)",
)

SENSORS: Final[Mapping[str, Sensor]] = {
    "version": Sensor("Model version", "state", _value("version"), diagnostic=False),
    "accuracy": Sensor(
        "Accuracy", "state", _value("accuracy", _PERCENT), "%", None, "measurement", False
    ),
    "last_round": Sensor("Last round", "state", _value("last_round"), None, None, "measurement"),
    "cpu": Sensor("CPU", "telemetry", _value("cpu_ratio", _PERCENT), "%", None, "measurement"),
    "memory": Sensor(
        "Memory used",
        "telemetry",
        _value("memory_used_bytes", _MEGABYTES),
        *("MB", "data_size", "measurement"),
    ),
    "disk": Sensor(
        "Disk free",
        "telemetry",
        _value("disk_free_bytes", _GIGABYTES),
        *("GB", "data_size", "measurement"),
    ),
    "temperature": Sensor(
        "Temperature",
        "telemetry",
        _value("temperature_celsius", "{} | round(1)"),
        *("°C", "temperature", "measurement"),
    ),
    "sent": Sensor(
        "Sent to the server",
        "telemetry",
        _value("link_sent_bytes", _MEGABYTES),
        *("MB", "data_size", "total_increasing"),
    ),
    "received": Sensor(
        "Received from the server",
        "telemetry",
        _value("link_received_bytes", _MEGABYTES),
        *("MB", "data_size", "total_increasing"),
    ),
    "outbox": Sensor(
        "Messages waiting", "telemetry", _value("outbox_messages"), None, None, "measurement"
    ),
}

UPDATE_TEMPLATE: Final = (
    "{% set now = value_json.version | default(0) %}"
    "{% set new = value_json.latest | default(now) %}"
    "{% set gain = value_json.gain | default(none) %}"
    "{% set title = 'model ' ~ (now if now else 'none') %}"
    "{% if new != now %}{% set title = title ~ ' -> ' ~ new %}"
    "{% if gain is not none %}"
    "{% set title = title ~ ', ' ~ '%+.1f' % (100 * gain) ~ ' points on your field' %}"
    "{% endif %}{% endif %}"
    "{{ {'installed_version': now | string, 'latest_version': new | string, 'title': title}"
    " | to_json }}"
)
"""Versions are texts there; 0 stands for none, below every version that there can be."""


def topic(network: str, device: str) -> str:
    """Where a device is announced; an empty retained message there takes it back.

    Raises:
        ConfigError: a name cannot be part of a topic.
    """
    return f"{PREFIX}/device/{_object_id(network, device)}/config"


def payload(
    network: str, device: str, state: DeviceState, telemetry_seconds: float = 60.0
) -> bytes:
    """What is announced, as JSON.

    Args:
        network: its name.
        device: its name; no other of the network has it.
        state: of the device; announce it anew when ``latest``, ``release`` or ``model`` change.
        telemetry_seconds: between two messages of telemetry.

    Raises:
        ConfigError: a name cannot be part of a topic.
    """
    identity, base = _object_id(network, device), f"fieldfed/{network}/{device}"
    expires = max(int(EXPIRE_PERIODS * telemetry_seconds), 1)
    components: Payload = {
        key: _sensor(sensor, f"{identity}_{key}", base, expires) for key, sensor in SENSORS.items()
    }
    components["update"] = _update(network, device, state.latest, f"{identity}_update", base)
    said: Payload = {
        "device": _about(identity, device, state),
        "origin": {"name": "fieldfed", "sw_version": state.release},
        "components": components,
        "availability_topic": f"{base}/availability",
        "qos": 1,
    }
    return text_of(said).encode()


def _object_id(network: str, device: str) -> str:
    """Different for every pair of names: "a_b" and "c" are not "a" and "b_c"."""
    for name in (network, device):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"'{name}' cannot be part of a topic; use A-Z a-z 0-9 _ -")
    return f"fieldfed_{len(network)}_{network}_{device}"


def _about(identity: str, device: str, state: DeviceState) -> Payload:
    about: Payload = {
        "identifiers": [identity],
        "name": device,
        "manufacturer": "fieldfed",
        "sw_version": state.release,
    }
    return about | {"model": state.model} if state.model else about


def _sensor(sensor: Sensor, unique: str, base: str, expires: int) -> Payload:
    shown: dict[str, Any] = {
        "unit_of_measurement": sensor.unit,
        "device_class": sensor.device_class,
        "state_class": sensor.state_class,
        "entity_category": "diagnostic" if sensor.diagnostic else None,
        "expire_after": expires if sensor.part == "telemetry" else None,
    }
    return {
        "platform": "sensor",
        "unique_id": unique,
        "name": sensor.name,
        "state_topic": f"{base}/{sensor.part}",
        "value_template": sensor.template,
    } | {key: value for key, value in shown.items() if value is not None}


def _update(network: str, device: str, latest: int | None, unique: str, base: str) -> Payload:
    said: Payload = {
        "platform": "update",
        "unique_id": unique,
        "name": "Model",
        "state_topic": f"{base}/state",
        "value_template": UPDATE_TEMPLATE,
    }
    if not latest:
        return said
    command = text_of(Install(version=latest).body())
    return said | {"command_topic": topics.install(network, device), "payload_install": command}
