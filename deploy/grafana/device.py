"""The dashboard of one device: what the server heard of it, and what it shows itself."""

from grafana_foundation_sdk.builders import bargauge, stat, timeseries
from grafana_foundation_sdk.models import dashboard as parts
from grafana_foundation_sdk.models import units

from deploy.grafana import boards
from deploy.grafana.names import DEVICE_JOB, Device, Prometheus, Server
from deploy.grafana.panels import (
    DAY,
    HALF,
    Query,
    Size,
    Words,
    age,
    among,
    bars,
    increase,
    lines,
    number,
    of,
)

HOUR = 3600.0
GIB = 2.0**30
FOURTH = Size(6, 4)


def device() -> parts.Dashboard:
    """What the broker brings of a device, and what its own endpoint shows where it is scraped."""
    chosen = boards.values("device", "Device", of(Server.DEVICE_SEEN))
    sections: list[boards.Section] = [
        ("All devices", [counts(), silent(), telemetry()]),
        ("$device, as the server heard of it", [heard(), waiting(), outbox()]),
        (
            "$device, at its own endpoint (where Prometheus is told to scrape it)",
            [answers(), version(), temperature(), disk(), warmth(), link()],
        ),
    ]
    return boards.board(
        "fieldfed-device",
        "fieldfed: device",
        "One device: whether it is there, what waits on it, how it is.",
        [boards.source(), boards.instance(), chosen],
        sections,
    )


def own(name: str, **labels: str) -> str:
    """A series of the device's own endpoint."""
    return among(name, job=DEVICE_JOB, device="$device", **labels)


# --- all devices ---------------------------------------------------------------------------------


def counts() -> stat.Panel:
    """Online and offline."""
    words = Words(
        "Devices",
        "Devices that the broker calls online, and offline. A metered one is offline as it sleeps.",
        units.Short,
        low="text",
    )
    return number(words, Query(of(Server.DEVICES), "{{state}}"), size=Size(6, 8))


def silent() -> bargauge.Panel:
    """Who was not heard of for longest."""
    words = Words(
        "Longest silences",
        "The ten devices that were heard of least recently.",
        units.Seconds,
        steps=((6 * HOUR, "orange"), (2 * DAY, "red")),
    )
    oldest = f"topk(10, {age(of(Server.DEVICE_SEEN))})"
    return bars(words, Query(oldest, "{{device}}"), size=Size(9, 8))


def telemetry() -> timeseries.Panel:
    """Messages by outcome."""
    words = Words(
        "Telemetry in an hour, by outcome",
        "Messages of all devices, by what became of them at the server.",
        units.Short,
    )
    messages = increase(of(Server.TELEMETRY), "1h")
    return lines(words, Query(messages, "{{outcome}}"), size=Size(9, 8), stacked=True)


# --- one, as the server heard of it --------------------------------------------------------------


def heard() -> stat.Panel:
    """When the device was last heard of."""
    words = Words(
        "Last heard of",
        "How long ago anything came from this device.",
        units.DurationSeconds,
        steps=((6 * HOUR, "orange"), (2 * DAY, "red")),
    )
    return number(words, Query(age(of(Server.DEVICE_SEEN, device="$device"))), size=Size(6, 8))


def waiting() -> stat.Panel:
    """What waits on its disk."""
    words = Words(
        "Waiting in its outbox",
        "Messages on the device's disk that the broker had not taken when it last told.",
        units.Short,
        steps=((100, "orange"), (5000, "red")),
        alerts=["FieldfedOutboxGrows"],
    )
    return number(words, Query(of(Server.DEVICE_OUTBOX, device="$device")), size=Size(6, 8))


def outbox() -> timeseries.Panel:
    """What waits on its disk, over time."""
    words = Words(
        "Outbox",
        "Grows while the broker cannot be reached, and empties in order once it can. The oldest "
        "messages go when it is full.",
        units.Short,
        alerts=["FieldfedOutboxGrows"],
    )
    return lines(words, Query(of(Server.DEVICE_OUTBOX, device="$device"), "messages"))


# --- one, at its own endpoint --------------------------------------------------------------------


def answers() -> stat.Panel:
    """Whether Prometheus reaches it."""
    words = Words(
        "Answers Prometheus",
        "1 while the device's own endpoint answers; nothing where it is not scraped.",
        units.Short,
        low="red",
        steps=((1, "green"),),
    )
    return number(words, Query(own(Prometheus.UP)), size=FOURTH)


def version() -> stat.Panel:
    """What it serves with."""
    words = Words(
        "Version",
        "Number of the version that the device classifies with.",
        units.Short,
        low="text",
    )
    return number(words, Query(own(Device.VERSION)), size=FOURTH)


def temperature() -> stat.Panel:
    """Of the processor."""
    words = Words(
        "Temperature",
        "Of the processor. A Raspberry Pi slows down from 80 degrees on.",
        units.Celsius,
        steps=((70, "orange"), (80, "red")),
    )
    return number(words, Query(own(Device.TEMPERATURE)), size=FOURTH)


def disk() -> stat.Panel:
    """Free on the disk of its state."""
    words = Words(
        "Disk free",
        "On the disk that holds the device's state.",
        units.BytesIEC,
        low="red",
        steps=((GIB, "orange"), (4 * GIB, "green")),
    )
    return number(words, Query(own(Device.DISK_FREE)), size=FOURTH)


def warmth() -> timeseries.Panel:
    """Temperature over time."""
    words = Words(
        "Temperature over time",
        "Of the processor.",
        units.Celsius,
        steps=((80, "red"),),
    )
    return lines(words, Query(own(Device.TEMPERATURE), "processor"), size=HALF)


def link() -> timeseries.Panel:
    """Bytes of its link."""
    words = Words(
        "Bytes of its link in an hour",
        "At the socket with the server, sent (up) and received (down).",
        units.BytesIEC,
    )
    return lines(words, Query(increase(own(Device.LINK_BYTES), "1h"), "{{direction}}"), size=HALF)
