"""What deploy/compose.yaml starts: nobody is root without need, nothing is open without need.

That it is what the compose specification allows is for docker-compose to say
(tests/system/test_compose.py).
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import ServerConfig
from common.services import require_near
from common.settings import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OUTSIDE = {"8443:8443", "8444:8444", "8883:8883"}
INSIDE = {"127.0.0.1:3000:3000", "127.0.0.1:9465:9465"}
"""For browsers on this machine."""
OTHERS = {"secrets", "images"}
"""Folders beside the file that are an operator's."""

each = pytest.mark.parametrize("name", SERVICES)


@each
def test_no_service_may_do_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service.get("cap_add", [])) <= ({"CHOWN"} if name == "mosquitto-owner" else set())
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert not service.keys() & {"privileged", "devices", "pid", "ipc"}
    assert "/var/run/docker.sock" not in str(service)


@each
def test_services_come_back_and_are_looked_after(name: str) -> None:
    service = SERVICES[name]
    once = name == "mosquitto-owner"
    assert service["restart"] == ("no" if once else "unless-stopped")
    assert ("disable" in service["healthcheck"]) == once


@each
def test_images_have_a_version(name: str) -> None:
    repository, _, tag = SERVICES[name]["image"].rpartition(":")
    assert repository
    assert tag not in {"", "latest"}
    assert re.match(r"v?\d", tag)


def test_only_what_farms_need_is_open() -> None:
    published = {port for service in SERVICES.values() for port in service.get("ports", [])}
    assert published == OUTSIDE | INSIDE
    inside = {name for name, one in SERVICES.items() if one.get("network_mode") == "service:net"}
    assert {"net", "mosquitto-owner"} == SERVICES.keys() - inside
    assert all("ports" not in SERVICES[name] for name in inside)


def test_the_page_is_shown_where_it_is_published_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SERVICES["server"]["environment"].items():
        monkeypatch.setenv(name, value)
    (tmp_path / "server.toml").write_text("seed = 1\n")
    config = load_settings(ServerConfig, tmp_path / "server.toml").page
    assert config is not None
    require_near(config, "[page]")
    assert config.host == "0.0.0.0"  # of the containers' network, which net's ports lead into
    assert f"127.0.0.1:{config.port}:{config.port}" in SERVICES["net"]["ports"]


def test_a_farm_is_started_only_when_asked_for() -> None:
    assert {name for name, one in SERVICES.items() if one.get("profiles")} == {"client"}


def test_what_is_written_lies_in_volumes_and_no_secret_in_the_file() -> None:
    used = set()
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.rsplit(":", 2 if mount.endswith(":ro") else 1)[0]
            if source.startswith((".", "$")):
                assert mount.endswith(":ro"), mount
            else:
                used.add(source)
    assert used == COMPOSE["volumes"].keys()
    assert not re.search(r"(?i)(password|secret|token)\w*[:=] *['\"]?[\w-]{6,}", str(SERVICES))


def test_every_file_that_it_names_is_there() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            if mount.startswith("./"):
                folder = mount.split(":")[0].removeprefix("./")
                assert folder.split("/")[0] in OTHERS or (DEPLOY / folder).exists(), mount
        if build := service.get("build"):
            context = (DEPLOY / build["context"]).resolve()
            assert (context / build["dockerfile"]).is_file()
