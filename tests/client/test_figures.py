"""A device's own figures: seven series at most, on this machine alone."""

import http.client
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from client.figures import DeviceFigures, showing
from common.config import FarmConfig, ServerConfig
from common.errors import ConfigError, LaunchError
from common.processes import free_port
from common.settings import load_settings
from common.topics import DeviceState, Telemetry

STATE = DeviceState(farm="oak", release="0.1.0", version=14, latest=15, last_round=6)
TELEMETRY = Telemetry(
    uptime_seconds=5,
    temperature_celsius=51.5,
    disk_free_bytes=7_000_000,
    outbox_messages=3,
    link_sent_bytes=100,
    link_received_bytes=2000,
)
SHOWN = {
    "fieldfed_device_version": 14,
    "fieldfed_device_last_round": 6,
    "fieldfed_device_temperature_celsius": 51.5,
    "fieldfed_device_disk_free_bytes": 7_000_000,
    "fieldfed_device_outbox_messages": 3,
    "fieldfed_device_link_bytes_total up": 100,
    "fieldfed_device_link_bytes_total down": 2000,
}


def told(state: DeviceState | None, telemetry: Telemetry | None) -> DeviceFigures:
    figures = DeviceFigures()
    figures.state, figures.telemetry = state, telemetry
    return figures


def series(text: str) -> dict[str, float]:
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_seven_series_say_what_was_told() -> None:
    assert series(generate_latest(told(STATE, TELEMETRY)).decode()) == SHOWN
    assert len(SHOWN) == 7


def test_what_is_not_known_has_no_series() -> None:
    assert series(generate_latest(told(None, None)).decode()) == {}
    nothing = DeviceState(farm="oak", release="0.1.0"), Telemetry(uptime_seconds=0)
    assert series(generate_latest(told(*nothing)).decode()) == {
        "fieldfed_device_outbox_messages": 0
    }


def config_of(folder: Path, port: int | None) -> FarmConfig:
    section = "" if port is None else f"port = {port}\n"
    path = folder / "farm.toml"
    path.write_text(f'[farm]\nname = "oak"\ndata = "images"\n[metrics]\n{section}')
    return load_settings(FarmConfig, path)


def test_over_http(tmp_path: Path) -> None:
    config = config_of(tmp_path, free_port()).metrics
    assert config is not None

    def ask(path: str) -> tuple[int, str]:
        with closing(http.client.HTTPConnection(config.host, config.port, timeout=20)) as opened:
            opened.request("GET", path)
            answer = opened.getresponse()
            return answer.status, answer.read().decode()

    figures = told(STATE, None)
    with showing(config, figures):
        assert ask("/healthz") == (200, "ok\n")
        assert len(series(ask("/metrics")[1])) == 2
        figures.telemetry = TELEMETRY
        status, text = ask("/metrics")
        assert (status, series(text)) == (200, SHOWN)
        assert ask("/readyz") == (404, "only /metrics, /healthz are here\n")
        with pytest.raises(LaunchError, match="choose another port"), showing(config, figures):
            pass
    with pytest.raises(ConnectionRefusedError):
        ask("/healthz")


def test_other_machines_are_not_listened_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, None).metrics
    assert config is not None
    anywhere = config.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"), showing(anywhere, DeviceFigures()):
        pass


def test_a_farm_may_be_on_its_servers_machine(tmp_path: Path) -> None:
    config = config_of(tmp_path, None).metrics
    servers = ServerConfig.model_validate({"metrics": {}, "page": {}})
    assert config is not None
    assert servers.metrics is not None
    assert servers.page is not None
    assert len({config.port, servers.metrics.port, servers.page.port}) == 3
