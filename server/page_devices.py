"""Devices: what each runs and how it is doing.

What devices said to the hub of a version is in the registry; how they are doing comes over MQTT,
which server/bridge.py writes to a database of its own. A section of it belongs below ``_versions``.
"""

from xml.etree.ElementTree import Element

from server.facts import Sources
from server.markup import Child
from server.page_shell import Tone, empty, farm_link, heading, moment, pill, section, table
from server.story import percent

TONES: dict[str, Tone] = {"committed": "good", "rejected": "calm"}
WORDS = {"committed": "in use", "rejected": "not better", "rolled_back": "gone back from"}


def devices_page(sources: Sources) -> list[Element | None]:
    """The parts of the page."""
    note = "What every device made of the newest version that it tried, as it told the hub."
    return [heading("Devices", note), _versions(sources)]


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
