"""Which settings belong to a run that was interrupted."""

import json

import pytest

from common.broker import Broker
from common.config import NetworkConfig, ServerConfig
from common.door import DoorConfig
from common.plan import PlanConfig
from common.services import HubConfig, MetricsConfig, PageConfig
from server.settings import RunSettings

SETTINGS = RunSettings(config=ServerConfig(seed=3, plan=PlanConfig(rounds=4)))


def changed(**values: object) -> str:
    """Stored settings that differ from those."""
    config = SETTINGS.config.model_copy(update=values)
    return SETTINGS.model_copy(update={"config": config}).model_dump_json()


@pytest.mark.parametrize(
    "stored",
    [
        changed(),
        changed(hub=HubConfig(port=9000)),
        changed(door=DoorConfig()),
        changed(metrics=MetricsConfig()),
        changed(page=PageConfig()),
        changed(broker=Broker(host="broker.example.org", username="server")),
        changed(server=NetworkConfig(port=9001)),
    ],
)
def test_where_a_server_listens_is_no_part_of_a_run(stored: str) -> None:
    assert SETTINGS.are_those_of(stored)


def test_a_setting_that_an_older_release_did_not_know_has_its_default() -> None:
    stored = json.loads(SETTINGS.model_dump_json())
    del stored["config"]["metrics"], stored["config"]["train"]["error_feedback"]
    assert SETTINGS.are_those_of(json.dumps(stored))


@pytest.mark.parametrize(
    "stored",
    [
        changed(seed=4),
        changed(plan=PlanConfig(rounds=5)),
        SETTINGS.model_copy(update={"label": "dense"}).model_dump_json(),
        '{"config": {"unknown": 1}}',
        "half a li",
    ],
)
def test_other_settings_are_another_run(stored: str) -> None:
    assert not SETTINGS.are_those_of(stored)
