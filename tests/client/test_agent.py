"""The device agent: what it tells and hears, and that each part works without the others."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

import client.agent
import client.schedule
from client.agent import Agent
from client.device import Device
from client.ledger import Ledger
from client.lookout import Lookout, tried_file
from client.member import Member
from client.portrait import Portrait
from client.traffic import Counters, keep
from common.config import FarmConfig
from common.errors import AbsentError, ConfigError, DiskError, LaunchError, LinkError
from common.outbox import Outbox
from common.processes import Supervisor, free_port
from common.topics import RESERVED, DeviceState, Event, Telemetry
from server.registry import STABLE
from tests.lab.agent import Place
from tests.lab.broker import FakeBroker
from tests.lab.hub import LabHub
from tests.lab.versions import add_version, model_of, registry_in
from tests.waiting import wait_until

SECONDS = 60.0


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as fake:
        yield fake


def beside(broker: FakeBroker, root: Path, **sections: dict[str, Any]) -> Place:
    """A farm whose agent uses this broker."""
    return Place(root, broker={"host": "127.0.0.1", "port": broker.port}, **sections)


def states(broker: FakeBroker) -> list[DeviceState]:
    return [DeviceState.parse(payload) for payload in broker.said("state")]


def events(broker: FakeBroker, kind: str) -> list[Event]:
    found = [Event.parse(payload) for payload in broker.said("event")]
    return [one for one in found if one.kind == kind]


def supernodes(place: Place) -> list[psutil.Process]:
    """Those of our own that live."""
    found = psutil.Process().children(recursive=True)
    return [one for one in found if _is_supernode(one)]


def _is_supernode(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:2] == ["sleep", "1001"] and "FLWR_HOME" in process.environ()
    except psutil.Error:
        return False


# --- what it tells -----------------------------------------------------------------------------


def test_it_tells_what_it_is_and_how_it_is(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    place = beside(broker, tmp_path, metrics={"port": port})
    keep(place.state, Counters(sent=5, received=7))
    with place.running(monkeypatch) as agent:
        wait_until(lambda: broker.said("telemetry"), SECONDS, "telemetry")
        wait_until(lambda: broker.said("state"), SECONDS, "the state")
        (state,) = states(broker)
        assert (state.farm, state.species, state.classes, state.images) == ("oak", "apple", 3, 48)
        assert (state.version, state.latest, state.asleep) == (None, None, False)
        (started,) = events(broker, "started")
        assert started.words.startswith("fieldfed ")
        telemetry = Telemetry.parse(broker.said("telemetry")[0])
        assert telemetry.memory_bytes == psutil.virtual_memory().total
        assert telemetry.link_sent_bytes == 5
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            shown = answer.read().decode()
        assert 'fieldfed_device_link_bytes_total{direction="up"} 5.0' in shown
        assert (agent.network, agent.device) == ("fieldfed", "oak")

        broker.cut()
        wait_until(lambda: len(broker.said("state")) == 2, SECONDS, "the state again")
        assert states(broker) == [state, state]
        wait_until(lambda: len(broker.said("config")) == 2, SECONDS, "the announcement again")
        (first, _) = [one for one in broker.messages if one.topic.endswith("/config")]
        assert (first.retained, b'"platform":"update"' in first.payload) == (True, True)
        assert broker.visits[-1].filters == [
            "fieldfed/fieldfed/rounds",
            "fieldfed/fieldfed/models/stable",
            "fieldfed/fieldfed/oak/command/install",
        ]
    assert broker.said("availability")[-1] == b"offline"
    with Ledger.open(place.state / "ledger.db") as ledger:
        totals = {one.kind: one for one in ledger.totals()}
    assert set(totals) == {"event", "state", "telemetry", "discovery"}
    assert {one.destination for one in totals.values()} == {f"broker 127.0.0.1:{broker.port}"}
    for kind, name in (("telemetry", "telemetry"), ("state", "state"), ("discovery", "config")):
        said = broker.said(name)[:1]  # said again after the cut, and written down once
        assert (totals[kind].messages, abs(totals[kind].bytes - len(said[0])) < 5) == (1, True)


def test_a_port_that_is_taken_stops_nothing_but_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = Place(tmp_path, metrics={"port": taken.getsockname()[1]})
        with place.running(monkeypatch):
            wait_until(lambda: supernodes(place), SECONDS, "the SuperNode")
    assert "oak runs without" in caplog.text


@pytest.mark.parametrize("name", RESERVED)
def test_names_that_mean_something_else_are_refused(tmp_path: Path, name: str) -> None:
    place = Place(tmp_path, broker={"host": "127.0.0.1"}, farm={"device": name})
    with pytest.raises(ConfigError, match=f"cannot be called '{name}'.*set 'device' in"):
        Agent(place.config, place.config_path, place.state)
    Place(tmp_path, farm={"name": name})
    Agent(place.config, place.config_path, place.state)  # nobody hears of it


# --- what it hears -----------------------------------------------------------------------------


def test_a_farm_that_sleeps_is_woken_by_a_round(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = beside(broker, tmp_path, farm={"link": "metered"})
    with place.running(monkeypatch, awake_minutes=2 / 60):
        wait_until(lambda: events(broker, "asleep"), SECONDS, "sleep")
        wait_until(lambda: states(broker)[-1].asleep, SECONDS, "its state")
        assert not supernodes(place)
        topic, run = "fieldfed/fieldfed/rounds", {"run": 1, "round": 1}
        broker.push(topic, json.dumps(run | {"deadline": time.time() - 1}).encode(), 1)
        wait_until(lambda: broker.acknowledged == [1], SECONDS, "a notice that comes too late")
        time.sleep(2.5)
        assert not events(broker, "woken")
        broker.push(topic, json.dumps(run | {"deadline": time.time() + 99}).encode(), 2)
        wait_until(lambda: events(broker, "woken"), SECONDS, "waking")
        wait_until(lambda: len(events(broker, "asleep")) == 2, SECONDS, "sleep again")
    assert not supernodes(place)


def test_an_order_is_refused_by_a_farm_that_has_joined_nothing(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = beside(broker, tmp_path)
    with place.running(monkeypatch):
        wait_until(lambda: len(broker.visits) and broker.visits[-1].filters, SECONDS, "a line")
        broker.push("fieldfed/fieldfed/oak/command/install", b'{"version":3}', 1)
        wait_until(lambda: events(broker, "update"), SECONDS, "an answer")
    (answer,) = events(broker, "update")
    assert (answer.outcome, answer.version) == ("refused", 3)
    assert "no network" in answer.words


def test_an_order_for_what_the_channel_does_not_name_installs_nothing(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.schedule, "JITTER_SECONDS", 1e6)  # by itself it never looks
    place = beside(broker, tmp_path)
    with ExitStack() as stack:
        registry = stack.enter_context(registry_in(tmp_path / "server"))
        add_version(registry, *model_of())
        registry.promote(STABLE, 1)
        hub = stack.enter_context(LabHub(tmp_path / "server").running())
        hub.join(Device(place.config, place.state), "oak", registry.keys.text)
        agent = stack.enter_context(place.running(monkeypatch))
        assert agent.network == "valley"
        wait_until(lambda: states(broker), SECONDS, "a first state")
        broker.push("fieldfed/valley/oak/command/install", b'{"version":7}', 1)
        wait_until(lambda: events(broker, "update"), SECONDS, "an answer")
        wait_until(lambda: states(broker)[-1].latest == 1, SECONDS, "the version that is offered")
    (answer,) = events(broker, "update")
    assert (answer.outcome, answer.version) == ("refused", 7)
    assert answer.words.endswith("channel 'stable' names version 1: nothing is installed")
    assert states(broker)[-1].version is None
    assert not (place.state / "serving" / "offer.json").exists()
    assert not (place.state / "serving" / "objects").exists()


# --- without the others ------------------------------------------------------------------------


def test_without_broker_hub_and_server_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    with place.running(monkeypatch):
        wait_until(lambda: supernodes(place), SECONDS, "the SuperNode")
    assert not supernodes(place)
    assert not (place.state / "outbox.db").exists()


def test_what_fails_beside_it_does_not_stop_training(
    broker: FakeBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No camera folder, a disk without room for the outbox, sensors and an updater that fail."""

    def failing(*_: object) -> None:
        raise ZeroDivisionError("a sensor")

    real, full = Outbox.open, [DiskError("no space left")]

    def opening(*arguments: Any) -> Outbox:
        if full:
            raise full.pop()
        return real(*arguments)

    monkeypatch.setattr(Lookout, "has_hub", lambda _self: True)
    monkeypatch.setattr(Lookout, "look", failing)
    monkeypatch.setattr(client.schedule, "JITTER_SECONDS", 0.1)
    monkeypatch.setattr("client.agent.Health.measure", failing)
    monkeypatch.setattr(client.agent, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(Outbox, "open", opening)
    place = beside(broker, tmp_path, watch={"folder": str(tmp_path / "nowhere")})
    with place.running(monkeypatch):
        wait_until(lambda: supernodes(place), SECONDS, "the SuperNode")
        wait_until(
            lambda: events(broker, "started"), SECONDS, "what was told before there was room"
        )
        said = ("telling: no space left", "the updater failed", "measuring failed")
        for words in said:
            wait_until(lambda words=words: words in caplog.text, SECONDS, words)  # type: ignore[misc]
        assert supernodes(place)


def test_a_full_disk_at_the_start_delays_training_alone(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = client.launch.supernode, [DiskError("no space left")]

    def starting(*arguments: Any) -> Any:
        if full:
            raise full.pop()
        return real(*arguments)

    monkeypatch.setattr(client.launch, "DISK_SECONDS", 1.0)
    monkeypatch.setattr(client.launch, "supernode", starting)
    place = beside(broker, tmp_path)
    with place.running(monkeypatch):
        wait_until(lambda: supernodes(place), SECONDS, "the SuperNode")
        wait_until(lambda: broker.said("state"), SECONDS, "the state")


def test_a_supernode_that_keeps_dying_is_told(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.agent, "Supervisor", lambda: Hasty(0.05, 0.01))
    monkeypatch.setattr(client.agent, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(client.agent, "WATCH_SECONDS", 0.0)
    place = beside(broker, tmp_path)
    place.supernode("#!/bin/sh\nexit 1\n")
    with place.running(monkeypatch) as agent:
        wait_until(lambda: events(broker, "fault"), SECONDS, "a fault")
        assert agent.faults == ("supernode",)
    (fault,) = events(broker, "fault")
    assert fault.words.startswith("supernode has ended 8 times")


class Hasty(Supervisor):
    """Starts what has ended at once."""

    def _care_for(self, watch: Any) -> None:
        watch.failures = 0
        super()._care_for(watch)


# --- the process -------------------------------------------------------------------------------


@pytest.mark.processes
def test_it_is_light_and_ends_in_time(broker: FakeBroker, tmp_path: Path) -> None:
    place = beside(broker, tmp_path, watch={"folder": str(tmp_path)})
    with subprocess.Popen(place.command, stderr=subprocess.PIPE) as running:
        process = psutil.Process(running.pid)
        try:
            wait_until(lambda: broker.said("telemetry"), SECONDS, "telemetry")
            wait_until(lambda: len(process.children()) >= 3, SECONDS, "its programs")
            assert not any("libtorch" in one.path for one in process.memory_maps())
            assert process.memory_full_info().uss < 80e6
            family = process.children(recursive=True)
            begin = time.monotonic()
            os.kill(running.pid, signal.SIGTERM)
            assert running.wait(30) == 0
            assert time.monotonic() - begin < 10
        finally:
            running.kill()
        assert not psutil.wait_procs(family, 5)[1]
    assert broker.said("availability")[-1] == b"offline"


# --- the updater -------------------------------------------------------------------------------


class Hubless(Member):
    """Reaches no hub."""

    def hub(self, sleep: Any = time.sleep) -> Any:
        raise LinkError("hub at nowhere: unavailable")


@pytest.fixture
def lookout(tmp_path: Path) -> tuple[Lookout, list[Event]]:
    place, told = Place(tmp_path), list[Event]()
    member = Hubless(place.config, place.state)
    return Lookout(member, place.config_path, place.state, told.append), told


def test_what_came_of_a_try_is_told_after_a_kill(
    lookout: tuple[Lookout, list[Event]], tmp_path: Path
) -> None:
    made, told = lookout
    path = tried_file(tmp_path / "oak" / "state")
    path.parent.mkdir()
    path.write_text('[{"outcome": "committed", "version": 3, "words": "version 3 is in use"}]')
    (path.parent / "offered.json").write_text('{"version": 3}')
    for _ in range(2):
        with pytest.raises(LinkError):
            made.look()
    assert told == [
        Event(kind="update", outcome="committed", version=3, words="version 3 is in use")
    ]


def test_by_how_much_a_version_that_stays_out_is_worse_is_remembered(
    lookout: tuple[Lookout, list[Event]], tmp_path: Path
) -> None:
    state = tmp_path / "oak" / "state"
    (state / "serving").mkdir()
    (state / "serving" / "offered.json").write_text('{"version": 4}')
    tried = [
        {"outcome": "committed", "version": 3, "words": "in use", "gain": 0.1},
        {"outcome": "rejected", "version": 4, "words": "worse", "gain": -0.05},
    ]
    tried_file(state).write_text(json.dumps(tried))
    place = Place(tmp_path)
    for _ in range(2):  # also after a restart
        made = Lookout(
            Hubless(place.config, place.state), place.config_path, place.state, lambda _event: None
        )
        with pytest.raises(LinkError):
            made.look()
        portrait = Portrait(place.config, place.state, partial(getattr, made, "offered"))
        assert (portrait.look().latest, portrait.look().gain) == (4, -0.05)


def test_an_order_is_answered_also_when_the_hub_is_away(
    lookout: tuple[Lookout, list[Event]],
) -> None:
    made, told = lookout
    with pytest.raises(LinkError):
        made.look(4)
    (answer,) = told
    assert (answer.outcome, answer.version) == ("refused", 4)
    assert "unavailable" in answer.words


def test_a_channel_that_names_nothing_yet_is_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Empty:
        def latest(self, channel: str) -> Any:
            raise AbsentError(f"hub at here: not found: no channel '{channel}'")

    class Early(Member):
        def hub(self, sleep: Any = time.sleep) -> Any:
            return contextlib.nullcontext(Empty())

    place, told = Place(tmp_path), list[Event]()
    early = Early(place.config, place.state)
    made = Lookout(early, place.config_path, place.state, told.append)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            made.look()
    assert caplog.text.count("takes the first version when it comes") == 1
    assert not told
    with pytest.raises(AbsentError):
        made.look(4)  # an order is answered all the same
    assert [one.outcome for one in told] == ["refused"]


def test_tries_that_fail_are_told_once(
    lookout: tuple[Lookout, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = lookout

    def failing(_version: int | None) -> None:
        raise LaunchError("the try of a version ended with status -9")

    monkeypatch.setattr(made, "_look", failing)
    for _ in range(3):
        with pytest.raises(LaunchError):
            made.look()
    assert [one.kind for one in told] == ["fault"]


# --- its portrait ------------------------------------------------------------------------------


def test_the_last_round_is_that_of_the_newest_answer(tmp_path: Path) -> None:
    place = Place(tmp_path)
    portrait = Portrait(place.config, place.state)
    assert portrait.look().last_round is None
    replies = place.state / "replies"
    replies.mkdir()
    for age, name in ((30, "1-9-align-b"), (20, "2-3-align-b"), (10, "2-4-report-b")):
        path = replies / f"{name}.safetensors"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert portrait.look().last_round == 3


def test_images_that_cannot_be_counted_are_left_out(tmp_path: Path) -> None:
    place = Place(tmp_path)
    config = FarmConfig.model_validate({"farm": {"name": "oak", "data": str(tmp_path / "no")}})
    state = Portrait(config, place.state).look()
    assert (state.classes, state.images, state.species) == (None, None, "no")
