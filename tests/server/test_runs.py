"""A wanted run whose server process died is started again; one that ended or was stopped is not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

import server.runs
from common.config import ServerConfig
from common.errors import ConfigError, LaunchError
from common.mask import Mask
from common.spec import ModelSpec
from server.launch import Network, RunStatus
from server.runs import ActiveRun, Keeper, ended, keeper_of, play
from server.settings import RunSettings
from server.store import Store

SPEC = ModelSpec(name="any", image_size=32, heads=(2,), neurons=(8,), head_width=4, width=8)
MASK = Mask.dense(SPEC).to_json()
SETTINGS = RunSettings(config=ServerConfig())


@dataclass
class Flower:
    """Flower's side: runs by number, and whether their server processes live."""

    living: set[int] = field(default_factory=set)
    submitted: list[Path] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    reachable: bool = True

    def submit(self, _network: Network, settings: Path) -> int:
        self._reach()
        self.submitted.append(settings)
        self.living.add(len(self.submitted))
        return len(self.submitted)

    def status(self, _network: Network, number: int) -> RunStatus:
        self._reach()
        state = "running" if number in self.living else "finished:failed"
        return RunStatus(number, state, "", 0, 0)

    def stop(self, _network: Network, number: int) -> None:
        self.stopped.append(number)

    def _reach(self) -> None:
        if not self.reachable:
            raise LaunchError("the server is not up")


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    found = Flower()
    monkeypatch.setattr(server.runs, "submit_run", found.submit)
    monkeypatch.setattr(server.runs, "run_status", found.status)
    monkeypatch.setattr(server.runs, "stop_run", found.stop)
    monkeypatch.setattr(server.runs, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(server.runs, "WAIT_SECONDS", 0.0)
    return found


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network("127.0.0.1", 8000, tmp_path)


def wanted(network: Network, flower: Flower, after: int = 0) -> None:
    number = flower.submit(network, network.state_dir / "run-model.json")
    active = ActiveRun(flower_run=number, settings=str(flower.submitted[-1]), after=after)
    (network.state_dir / "active-run.json").write_text(active.model_dump_json())


def recorded(network: Network, label: str = "") -> int:
    with Store.open(network.state_dir / "fieldfed.db") as store:
        return store.start_run(SETTINGS.model_dump_json(), 0, "0" * 64, MASK, label)


def test_a_dead_run_is_started_again_with_the_same_settings(
    network: Network, flower: Flower
) -> None:
    wanted(network, flower)
    recorded(network)
    keeper = Keeper(network)
    assert not keeper.check(), "it is still alive"
    flower.living.clear()
    assert keeper.check()
    assert flower.submitted[0] == flower.submitted[1]
    assert not keeper.check()


def test_a_folder_that_was_restored_elsewhere_goes_on_with_its_own_settings(
    network: Network, flower: Flower, tmp_path: Path
) -> None:
    wanted(network, flower)
    flower.living.clear()
    elsewhere = Network("127.0.0.1", 8000, tmp_path / "elsewhere")
    elsewhere.state_dir.mkdir()
    (network.state_dir / "active-run.json").rename(elsewhere.state_dir / "active-run.json")
    assert Keeper(elsewhere).check()
    assert flower.submitted[-1] == elsewhere.state_dir / "run-model.json"


def test_a_run_that_died_before_its_first_line_is_started_again(
    network: Network, flower: Flower
) -> None:
    wanted(network, flower)
    flower.living.clear()
    assert Keeper(network).check()


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_run_that_ended_is_left_alone(network: Network, flower: Flower, state: str) -> None:
    wanted(network, flower)
    run = recorded(network)
    with Store.open(network.state_dir / "fieldfed.db") as store:
        store.finish_run(run, "done" if state == "done" else "failed")
    flower.living.clear()
    assert not Keeper(network).check()
    wanted(network, flower, after=run)
    flower.living.clear()
    assert Keeper(network).check(), "the same settings, run once more"


def test_a_run_that_ends_while_flower_is_asked_is_left_alone(
    network: Network, flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(network: Network, number: int) -> RunStatus:
        with Store.open(network.state_dir / "fieldfed.db") as store:
            store.finish_run(run, "done")
        flower.living.clear()
        return flower.status(network, number)

    wanted(network, flower)
    run = recorded(network)
    monkeypatch.setattr(server.runs, "run_status", ends)
    assert not Keeper(network).check()
    assert len(flower.submitted) == 1


def test_without_a_wanted_run_or_a_server_nothing_is_started(
    network: Network, flower: Flower
) -> None:
    assert not Keeper(network).check()
    (network.state_dir / "active-run.json").write_text('{"flower_run": ')
    assert not Keeper(network).check(), "cut off by a power cut"
    wanted(network, flower)
    flower.reachable = False
    assert not Keeper(network).check()


def test_a_run_that_dies_at_once_is_not_started_without_a_pause(
    network: Network, flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.runs, "WAIT_SECONDS", 60.0)
    wanted(network, flower)
    keeper = Keeper(network)
    flower.living.clear()
    assert keeper.check()
    flower.living.clear()
    assert not keeper.check()


def test_ctrl_c_stops_the_run_for_good(
    network: Network, flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.runs, "follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        play(network, SETTINGS, Console())
    assert flower.stopped == [1]
    flower.living.clear()
    assert not Keeper(network).check()


def test_who_plays_orders_is_always_wanted(network: Network, flower: Flower) -> None:
    region = ServerConfig.model_validate({"region": {"centre": "coop", "port": 9}})
    keeper = keeper_of(region, network)
    assert keeper.check()
    assert not keeper.check()
    assert flower.submitted == [network.state_dir / "server.toml"]
    with Store.open(network.state_dir / "fieldfed.db") as store:
        store.finish_run(recorded(network), "done")
    flower.living.clear()
    assert keeper.check()
    assert len(flower.submitted) == 2


def test_an_ordinary_server_keeps_only_what_was_started(network: Network, flower: Flower) -> None:
    assert not keeper_of(ServerConfig(), network).check()
    assert not flower.submitted


# --- once ----------------------------------------------------------------------------------------


def test_a_run_of_another_label_or_one_that_goes_on_does_not_stand_in_the_way(
    network: Network,
) -> None:
    assert ended(network.state_dir, "spring") is None
    with_end(network, "autumn")
    assert ended(network.state_dir, "spring") is None
    recorded(network, "spring")
    assert ended(network.state_dir, "spring") is None


def test_a_run_that_is_done_is_told_also_when_others_followed(network: Network) -> None:
    number = with_end(network, "spring")
    with_end(network, "autumn")
    assert ended(network.state_dir, "spring") == number


def test_of_two_runs_of_a_label_the_later_counts(network: Network) -> None:
    with_end(network, "spring")
    recorded(network, "spring")
    assert ended(network.state_dir, "spring") is None


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_a_run_that_failed_is_not_tried_again(
    network: Network, state: Literal["failed", "stopped"]
) -> None:
    with_end(network, "spring", state)
    with pytest.raises(ConfigError, match=f"'spring' {state}: no rain; .*another --label"):
        ended(network.state_dir, "spring")


def with_end(
    network: Network, label: str, state: Literal["done", "failed", "stopped"] = "done"
) -> int:
    """A run of a label that came to its end."""
    number = recorded(network, label)
    with Store.open(network.state_dir / "fieldfed.db") as store:
        store.finish_run(number, state, "no rain")
    return number
