"""Devices: what each runs and how it is doing.

How they are doing comes over MQTT, which server/bridge.py writes to a database of its own; what
they said to the hub of a version is in the registry.
"""

from collections.abc import Mapping
from xml.etree.ElementTree import Element

from common.topics import Telemetry
from server.facts import Sources
from server.markup import Child
from server.page_shell import Tone, empty, farm_link, heading, moment, pill, section, table
from server.story import count_text, percent, size_text
from server.telemetry import DeviceRow, Measured, Presence

TONES: dict[str, Tone] = {"committed": "good", "rejected": "calm"}
PRESENT: Mapping[Presence, Tone] = {"online": "good", "offline": "bad", "never": "calm"}
MOST_DEVICES = 1000
"""Shown: the first by name."""
NONE = "-"
WORDS = {"committed": "in use", "rejected": "not better", "rolled_back": "gone back from"}


def devices_page(sources: Sources) -> list[Element | None]:
    """The parts of the page."""
    note = "How each is, as it tells the broker, and what it made of versions, as it tells the hub."
    return [heading("Devices", note), _present(sources), _versions(sources)]


def _present(sources: Sources) -> Element:
    devices = [] if sources.told is None else sources.told.devices(MOST_DEVICES)
    if sources.told is None or not devices:
        words = "No device has told how it is. They do over MQTT: [broker] in server.toml"
        return section("present", "On the broker", empty(words))
    newest = sources.told.newest_of_all(MOST_DEVICES)
    lines = [_line(row, newest.get(row.name)) for row in devices]
    columns = (
        *("Device", "Farm", "Now", "Heard of", "Version", "Temperature", "Processor"),
        *("Memory", "Disk free", "Waiting"),
    )
    shown = table("present", "Devices on the broker", columns, lines, words=(1, 2, 3))
    counts = sources.told.presence()
    note = f"{counts['online']} online, {counts['offline']} offline."
    return section("present", "On the broker", shown, note=note)


def _line(row: DeviceRow, measured: Measured | None) -> list[Child]:
    state, now = row.state, None if measured is None else measured.telemetry
    asleep = state is not None and state.asleep and row.presence == "offline"
    used = None
    if now is not None and now.memory_used_bytes is not None and now.memory_bytes:
        used = now.memory_used_bytes / now.memory_bytes
    return [
        row.name,
        NONE if row.farm is None else farm_link(row.farm),
        pill("asleep" if asleep else row.presence, "calm" if asleep else PRESENT[row.presence]),
        NONE if row.seen is None else moment(row.seen),
        NONE if state is None or state.version is None else f"version {state.version}",
        _temperature(now),
        percent(None if now is None else now.cpu_ratio, 0),
        percent(used, 0),
        NONE if now is None or now.disk_free_bytes is None else size_text(now.disk_free_bytes),
        NONE if row.outbox is None else count_text(row.outbox),
    ]


def _temperature(now: Telemetry | None) -> Child:
    """In degrees, with what a Pi says of its supply and its clock."""
    if now is None:
        return NONE
    if now.under_voltage:
        return pill("under-voltage", "bad")
    if now.throttled:
        return pill("throttled", "warn")
    found = now.temperature_celsius
    return NONE if found is None else f"{found:.0f} °C"


def _versions(sources: Sources) -> Element:
    rows = [] if sources.registry is None else sources.registry.newest_installs()
    if not rows:
        words = (
            "No device has reported. Devices do so when they try a version: [hub] in server.toml"
        )
        return section("devices", "Versions on devices", empty(words))
    lines: list[list[Child]] = [
        [
            row.device,
            farm_link(row.farm),
            f"version {row.version}",
            pill(WORDS.get(row.outcome, row.outcome), TONES.get(row.outcome, "bad")),
            percent(row.accuracy_before),
            percent(row.accuracy_after),
            moment(row.received),
            row.detail,
        ]
        for row in rows
    ]
    columns = ("Device", "Farm", "Version", "Outcome", "Before", "After", "When", "Detail")
    shown = table("devices", "Devices by farm", columns, lines, words=(1, 2, 3, 6, 7))
    return section("devices", "Versions on devices", shown)
