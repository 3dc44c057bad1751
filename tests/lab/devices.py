"""What devices told a server over MQTT, without any."""

from pathlib import Path

from common.topics import DeviceState, Result, Telemetry
from server import telemetry
from server.arrivals import Arrivals, Batch, Message, Said, There, values_of


def tell(folder: Path) -> None:
    """Two devices, one of which is called like its farm; some of their messages were bad."""
    state = DeviceState(farm="farm0", release="1.0", species="class0")
    measured = Telemetry(
        uptime_seconds=5,
        cpu_ratio=0.5,
        memory_used_bytes=1,
        memory_bytes=2,
        disk_free_bytes=3,
        outbox_messages=7,
    )
    result = Result(taken=1.0, label="class0", share=0.5, sure=True, version=1)
    batch = Batch(
        news=[
            There("farm0", True),
            There("gate", False),
            Said("farm0", state),
            Message("farm0", "telemetry", 1, 1.0, values_of("telemetry", measured)),
            Message("farm0", "results", 2, 1.0, values_of("results", result)),
            Message("farm0", "results", 2, 1.0, values_of("results", result)),
        ],
        seen={"farm0": 1_700_000_000.0},
    )
    batch.fates["malformed"] += 3
    with Arrivals.open(folder / telemetry.NAME) as arrivals:
        arrivals.keep(batch, 1_700_000_000.0)
