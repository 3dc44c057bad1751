"""The bridge as a whole, with a broker that does as it is told."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.broker import Broker
from common.config import ServerConfig
from common.errors import ConfigError, StateError
from common.mqtt import Connection
from common.outbox import Outbox
from common.processes import Child, free_port
from common.settings import load_settings
from common.topics import ModelNotice, RoundNotice
from server import launch, rollout
from server.bridge import open_telemetry, run_bridge
from server.notices import WAKE_SECONDS, Notices, accuracy_of
from server.registry import STABLE
from server.rollout import RolloutPlan
from server.store import Store
from server.telemetry import NAME, TelemetryStore
from tests.lab.broker import FakeBroker
from tests.lab.replies import DIGEST
from tests.lab.versions import two_versions
from tests.waiting import wait_until

BASE = "fieldfed/valley/oak"
RESULT = (
    b'{"taken": 1, "label": "a", "share": 0.5, "sure": true, "version": 1, "time": 1, "id": %d}'
)


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as fake:
        yield fake


@contextmanager
def bridge(broker: FakeBroker, folder: Path) -> Iterator[list[BaseException]]:
    """A bridge that works while the context is open; what it ended with."""
    ended: list[BaseException] = []
    before = len(broker.visits)
    stop, where = threading.Event(), Broker(host="127.0.0.1", port=broker.port)

    def work() -> None:
        try:
            run_bridge(where, "valley", folder, stop, first_pause=0.01, look_seconds=0.05)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_until(
            lambda: len(broker.visits) > before and len(broker.visits[-1].filters) == 5,
            20,
            "the bridge",
        )
        yield ended
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def results(folder: Path) -> list[int]:
    with TelemetryStore.open(folder / NAME, read_only=True) as told:
        return [row["id"] for row in told._select("SELECT id FROM results ORDER BY id")]


def test_a_result_is_acknowledged_once_it_is_committed(broker: FakeBroker, tmp_path: Path) -> None:
    with bridge(broker, tmp_path):
        with closing(sqlite3.connect(tmp_path / NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # as long as another writes
            broker.push(f"{BASE}/result", RESULT % 7, 1)
            broker.push(f"{BASE}/result", b"none", 2)
            broker.push(f"{BASE}/result", RESULT % 7, 3)
            time.sleep(0.5)  # word of them would have come by now
            assert broker.acknowledged == []
            other.execute("ROLLBACK")
        wait_until(lambda: broker.acknowledged == [1, 2, 3], 20, "word of them")
        assert results(tmp_path) == [7]
    with TelemetryStore.open(tmp_path / NAME, read_only=True) as told:
        counts = {fate: count for fate, count in told.counts().items() if count}
    assert counts == {"stored": 1, "duplicate": 1, "malformed": 1}
    assert not broker.visits[0].clean, "what comes while it is away would be lost"
    assert [one.payload for one in broker.messages] == [b"online", b"offline"]


def test_a_result_that_was_committed_and_not_acknowledged_is_not_doubled(
    broker: FakeBroker, tmp_path: Path
) -> None:
    for _ in range(3):
        broker.acknowledged.clear()
        with bridge(broker, tmp_path):
            broker.push(f"{BASE}/result", RESULT % 7, 1)
            wait_until(lambda: broker.acknowledged == [1], 20, "word of it")
    assert results(tmp_path) == [7]


def test_a_damaged_file_is_set_aside(broker: FakeBroker, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database " * 1000)
    open_telemetry(tmp_path).close()
    assert (tmp_path / f"{NAME}.damaged").read_bytes().startswith(b"no database")
    with bridge(broker, tmp_path) as ended:
        broker.push(f"{BASE}/result", RESULT % 1, 1)
        wait_until(lambda: broker.acknowledged == [1], 20, "word of it")
        with closing(sqlite3.connect(tmp_path / NAME)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        data = bytearray((tmp_path / NAME).read_bytes())
        data[4096:] = b"x" * (len(data) - 4096)
        (tmp_path / NAME).write_bytes(data)
        broker.push(f"{BASE}/result", RESULT % 2, 2)
        wait_until(lambda: ended, 20, "its end")
    assert isinstance(ended[0], StateError)
    assert 2 not in broker.acknowledged
    with bridge(broker, tmp_path):
        broker.push(f"{BASE}/result", RESULT % 2, 2)
        wait_until(lambda: broker.acknowledged[-1] == 2, 20, "word of it")
    assert results(tmp_path) == [2]


def test_a_folder_has_one_bridge(broker: FakeBroker, tmp_path: Path) -> None:
    with (
        bridge(broker, tmp_path),
        pytest.raises(StateError, match="no other process uses it"),
    ):
        where = Broker(host="127.0.0.1", port=broker.port)
        run_bridge(where, "valley", tmp_path, threading.Event())


# --- notices ---------------------------------------------------------------------------------


@pytest.fixture
def connection(broker: FakeBroker, tmp_path: Path) -> Iterator[tuple[Connection, Outbox]]:
    """Of the server, not started."""
    with Outbox.open(tmp_path / "notices.db") as outbox:
        where = Broker(host="127.0.0.1", port=broker.port)
        made = Connection(where, "valley", "server", outbox, first_pause=0.01)
        yield made, outbox
        made.stop()


def opened(store: Store, run: int, number: int, deadline: float) -> None:
    mask = store.run(run).mask
    store.open_round(run, number, kind="align", base=DIGEST, mask=mask, quorum=1, deadline=deadline)


def told(broker: FakeBroker) -> list[tuple[int, int]]:
    found = map(RoundNotice.parse, broker.said("rounds"))
    return [(one.run, one.round) for one in found]


def test_a_round_is_told_once_and_when_it_is_opened_again(
    broker: FakeBroker, connection: tuple[Connection, Outbox], tmp_path: Path
) -> None:
    line, outbox = connection
    notices = Notices(line, outbox, tmp_path, "valley")
    notices.look()  # there is no store yet
    with Store.open(tmp_path / "fieldfed.db") as store:
        notices.look()
        settings = json.dumps({"config": {"rounds": {"deadline_seconds": 5000.0}}})
        run = store.start_run(settings, 1, DIGEST, "{}")
        started = store.run(run).started
        notices.look(started)
        assert outbox.depth.count == 0, "nobody could hear it"
        line.start()
        wait_until(lambda: line.connected, 20, "the line")
        for _ in range(3):
            notices.look(started)
        opened(store, run, 1, started + 9000)
        for _ in range(3):
            notices.look(started)
        opened(store, run, 1, started + 9000)
        notices.look(started + 20_000)
        store.finish_run(run, "failed")
        notices.look()
        wait_until(lambda: len(told(broker)) == 3, 20, "all notices")
        run = store.start_run("{}", 1, DIGEST, "{}")
        notices.look()
        wait_until(lambda: len(told(broker)) == 4, 20, "the next run")
    assert told(broker) == [(1, 0), (1, 1), (1, 1), (2, 0)]
    deadlines = [RoundNotice.parse(one).deadline - started for one in broker.said("rounds")]
    assert deadlines[:3] == [5000, 9000, 20_000 + WAKE_SECONDS]
    assert not any(one.retained for one in broker.messages if one.topic.endswith("/rounds"))


def test_a_bridge_that_is_started_anew_tells_what_is_open(
    broker: FakeBroker, connection: tuple[Connection, Outbox], tmp_path: Path
) -> None:
    """A run that goes on after a power cut waits for farms that may be asleep."""
    line, outbox = connection
    with Store.open(tmp_path / "fieldfed.db") as store:
        store.start_run("{}", 1, DIGEST, "{}")
    line.start()
    wait_until(lambda: line.connected, 20, "the line")
    for _ in range(2):
        Notices(line, outbox, tmp_path, "valley").look()
    wait_until(lambda: told(broker) == [(1, 0), (1, 0)], 20, "both")


def test_channels_are_told_to_latecomers_and_when_they_change(
    broker: FakeBroker,
    connection: tuple[Connection, Outbox],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    line, outbox = connection
    notices = Notices(line, outbox, tmp_path, "valley")
    line.start()

    def said() -> list[ModelNotice]:
        notices.look()
        return [ModelNotice.parse(one) for one in broker.said("models/stable")]

    with two_versions(tmp_path) as registry:
        first = registry.promote(STABLE, 1)
        wait_until(lambda: len(said()) == 1, 20, "the first version")
        plan = RolloutPlan(channel=STABLE, version=2, stages=(0.1, 0.5, 1.0))
        coming = rollout.start(registry, plan)
        wait_until(lambda: len(said()) == 2, 20, "that another is on its way")
        registry.rows.put_rollout(coming.changed(stage=1))
        wait_until(lambda: len(said()) == 3, 20, "its next stage")
        last = registry.promote(STABLE, 2)
        registry.rows.put_rollout(coming.changed(state="done"))
        wait_until(lambda: len(said()) >= 4, 20, "its being named")
    found = said()
    assert [one.version for one in found[:3]] == [1, 1, 1]
    assert [one.counter for one in found[:3]] == [first.counter, coming.counter, coming.counter]
    assert (found[-1].version, found[-1].counter) == (2, last.counter)
    assert [found[0].accuracy, found[-1].accuracy] == [0.9, 0.95]
    assert len(said()) == len(found), "nothing has changed"
    (tmp_path / "registry" / "registry.db").write_bytes(b"no database " * 1000)
    notices.look()
    notices.look()
    assert [record.levelname for record in caplog.records if "nothing new" in record.message] == [
        "WARNING"
    ]


@pytest.mark.parametrize("document", ["", "[]", "{}", '{"body": "{}"}', '{"body": 1}'])
def test_a_manifest_of_another_release_has_no_accuracy(document: str) -> None:
    assert accuracy_of(document) is None


# --- a process of its own --------------------------------------------------------------------


def test_up_starts_and_ends_it(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    text = f'[server]\nname = "valley"\nport = {port}\n[broker]\nhost = "127.0.0.1"\n'
    (tmp_path / "server.toml").write_text(f"{text}port = {broker.port}\n")
    web = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]

    def stand_in(*_: object) -> Child:
        return Child("stand-in", lambda: web, tmp_path / "stand-in.log")

    monkeypatch.setattr(launch, "_superlink", stand_in)
    monkeypatch.setattr(launch, "_superexec", stand_in)
    with launch.serve(load_settings(ServerConfig, tmp_path / "server.toml"), tmp_path):
        wait_until(lambda: broker.visits and broker.visits[0].filters, 30, "the bridge")
    assert broker.said("server/availability") == [b"online", b"offline"]


def test_without_a_section_the_program_says_so(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("seed = 1\n")
    command = [sys.executable, "-P", "-m", "server.bridge", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "has no [broker]" in done.stderr
