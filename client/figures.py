"""A device's own figures for Prometheus: seven series, on this machine alone.

    fieldfed_device_version                          version it serves with
    fieldfed_device_last_round                       newest round that its farm answered
    fieldfed_device_temperature_celsius
    fieldfed_device_disk_free_bytes
    fieldfed_device_outbox_messages                  that wait for the broker
    fieldfed_device_link_bytes_total{direction=}     up and down, over the farm's life

What is not known has no series, so that nobody takes a 0 for a measurement. No label is a name:
Prometheus itself says which device it asked.
"""

import contextlib
import threading
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.exposition import MetricsServer
from common.services import MetricsConfig
from common.topics import DeviceState, Telemetry

PREFIX = "fieldfed_device_"


class DeviceFigures(Collector):
    """Shows what it was told last, in whatever thread; assign anew whenever there is news."""

    def __init__(self) -> None:
        self.state: DeviceState | None = None
        self.telemetry: Telemetry | None = None

    def collect(self) -> list[Metric]:
        """Every family; those of which nothing is known have no series."""
        state, telemetry = self.state, self.telemetry
        found: list[Metric] = []
        if state is not None:
            found += _of_state(state)
        if telemetry is not None:
            found += _of_telemetry(telemetry)
        return found


def _of_state(state: DeviceState) -> list[Metric]:
    return [
        _gauge("version", "Version that the device serves with", state.version),
        _gauge("last_round", "Newest round that the farm answered", state.last_round),
    ]


def _of_telemetry(seen: Telemetry) -> list[Metric]:
    return [
        _gauge("temperature_celsius", "The hottest place of the CPU", seen.temperature_celsius),
        _gauge("disk_free_bytes", "Free where the farm keeps its state", seen.disk_free_bytes),
        _gauge("outbox_messages", "Messages that wait for the broker", seen.outbox_messages),
        _link(seen),
    ]


def _gauge(name: str, what: str, value: float | None) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, what)
    if value is not None:
        family.add_metric([], value)
    return family


def _link(seen: Telemetry) -> Metric:
    """``_total`` is added to the name where it is written."""
    what = "Bytes at the farm's socket with its server, over the farm's life"
    family = CounterMetricFamily(f"{PREFIX}link_bytes", what, labels=["direction"])
    for direction, value in (("up", seen.link_sent_bytes), ("down", seen.link_received_bytes)):
        if value is not None:
            family.add_metric([direction], value)
    return family


@contextlib.contextmanager
def showing(config: MetricsConfig, figures: DeviceFigures) -> Iterator[MetricsServer]:
    """Answer Prometheus in a thread of its own while the context is open.

    Raises:
        ConfigError: others than this machine would be listened for.
        LaunchError: something else listens there.
    """
    with MetricsServer(config, figures) as server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
