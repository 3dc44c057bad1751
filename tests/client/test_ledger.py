"""What left the farm: nothing that did is missing, and it stays small."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client import ledger as module
from client import traffic
from client.cli import app
from client.ledger import FILE, HOUR, KEPT_HOURS, Kind, Ledger, Row, Total, kinds_of
from client.ledger_cli import NEVER, seconds_of
from client.traffic import Counters
from common import hub_pb2, topics
from common.errors import ConfigError, DiskError, StateError
from common.messages import EvaluateReply, HelloReply, Refusal, Reply
from common.outbox import KINDS
from common.wire import _array_fields
from tests.lab.replies import DIGEST, align_reply

BROKER, SERVER = "broker 192.0.2.7:8883", "server 192.0.2.7:8000"
DAY = 86_400
NOON = 1_800_000_000 // DAY * DAY + DAY / 2
ADDS = """
import sys
from pathlib import Path
from client.ledger import Kind, Ledger
with Ledger.open(Path(sys.argv[1])) as ledger:
    for number in range(int(sys.argv[2])):
        ledger.add(list(Kind)[number % 3], 10, f"broker {number % 2}")
        print(number + 1, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / FILE


def ledger_at(path: Path, now: float = NOON) -> Ledger:
    return Ledger.open(path, clock=lambda: now)


def adding(path: Path, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-c", ADDS, str(path), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def bytes_in(path: Path) -> int:
    with Ledger.open(path) as ledger:
        return sum(one.bytes for one in ledger.totals())


def overwrite(path: Path, first: int = 0) -> None:
    """Garbage in place of what is in the file, which keeps its length."""
    with path.open("r+b") as file:
        file.seek(first)
        file.write(b"garbage " * ((path.stat().st_size - first) // 8))


# --- what is written down ------------------------------------------------------------------------


def test_what_leaves_within_an_hour_is_one_row(path: Path) -> None:
    with ledger_at(path) as ledger:
        for moment in (NOON, NOON + 1, NOON + HOUR - 1, NOON + HOUR):
            ledger.add(Kind.TELEMETRY, 300, BROKER, moment)
        ledger.add(Kind.TELEMETRY, 5, "broker 192.0.2.8:1883", NOON)
        ledger.add(Kind.UPDATE, 60_000, SERVER)
        assert ledger.rows() == [
            Row("telemetry", BROKER, 3, 900, int(NOON)),
            Row("telemetry", "broker 192.0.2.8:1883", 1, 5, int(NOON)),
            Row("update", SERVER, 1, 60_000, int(NOON)),
            Row("telemetry", BROKER, 1, 300, int(NOON) + HOUR),
        ]
    with ledger_at(path) as again:
        assert again.totals() == [
            Total("telemetry", BROKER, 4, 1200),
            Total("telemetry", "broker 192.0.2.8:1883", 1, 5),
            Total("update", SERVER, 1, 60_000),
        ]
        assert again.totals(NOON + HOUR + 100) == [Total("telemetry", BROKER, 1, 300)]
        assert [row.time for row in again.rows(NOON + HOUR)] == [int(NOON) + HOUR]
        assert again.rows(NOON + 2 * HOUR) == []


ADDED = st.tuples(
    st.sampled_from(Kind), st.integers(0, 10**9), st.sampled_from("abc"), st.integers(0, 5 * HOUR)
)


@settings(deadline=None, max_examples=30)
@given(st.lists(ADDED, max_size=30))
def test_sums_are_those_of_what_was_added(
    tmp_path_factory: pytest.TempPathFactory, added: list[tuple[Kind, int, str, int]]
) -> None:
    with ledger_at(tmp_path_factory.mktemp("farm") / FILE) as ledger:
        for kind, size, place, moment in added:
            ledger.add(kind, size, place, moment)
        expected: dict[tuple[str, str], tuple[int, int]] = {}
        for kind, size, place, _ in added:
            count, before = expected.get((kind, place), (0, 0))
            expected[kind, place] = count + 1, before + size
        found = ledger.totals()
        assert {(t.kind, t.destination): (t.messages, t.bytes) for t in found} == expected
        assert sum(row.bytes for row in ledger.rows()) == sum(one[1] for one in added)


def test_threads_share_a_ledger(path: Path) -> None:
    with ledger_at(path) as ledger:

        def add() -> None:
            for _ in range(50):
                ledger.add(Kind.EVENT, 1, BROKER)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.totals() == [Total("event", BROKER, 200, 200)]


def test_processes_share_a_ledger(path: Path) -> None:
    processes = [adding(path, 40) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert bytes_in(path) == 3 * 40 * 10


def test_a_kill_loses_nothing_that_was_added(path: Path) -> None:
    killed = adding(path, 1_000_000)
    assert killed.stdout is not None
    said = [int(killed.stdout.readline()) for _ in range(200)]
    os.kill(killed.pid, signal.SIGKILL)
    said += [int(line) for line in killed.stdout.read().split()[:-1]]
    assert killed.wait(timeout=20) == -signal.SIGKILL
    killed.stdout.close()
    assert bytes_in(path) >= 10 * said[-1]
    with Ledger.open(path) as ledger:
        ledger.add(Kind.EVENT, 1, BROKER)


# --- what stays out of it ------------------------------------------------------------------------


def test_there_is_no_kind_for_an_image_or_a_classifier() -> None:
    assert not [kind for kind in Kind for word in ("image", "photo", "classif") if word in kind]
    assert set(KINDS) <= set(Kind)
    assert {*topics.PARTS} <= set(Kind)


def test_every_array_of_a_reply_is_of_a_kind() -> None:
    arrays = {kind: set(_array_fields(kind)) for kind in get_args(Reply)}
    counted = {"update", "head_importance", "head_mmd2", "neuron_importance", "moments"}
    assert {name for names in arrays.values() for name in names} == counted, (
        "say in client/ledger.py what the new array is; no image and no classifier leaves a farm"
    )


def test_no_message_to_the_hub_or_broker_can_hold_bytes() -> None:
    for message in (hub_pb2.ChannelRequest, hub_pb2.FetchRequest, hub_pb2.Want):
        fields = message.DESCRIPTOR.fields
        assert not [one.name for one in fields if one.type == one.TYPE_BYTES]
    for kind in (topics.DeviceState, topics.Telemetry, topics.Result, topics.Event):
        assert "binary" not in json.dumps(kind.model_json_schema())


def test_a_reply_is_taken_apart() -> None:
    update = np.zeros(1000, np.uint8)
    plain = align_reply(update)
    assert kinds_of(plain, 1700) == {Kind.UPDATE: 1000, Kind.METRICS: 700}
    assert kinds_of(align_reply(update, moments=np.zeros(300, np.uint8)), 1700) == {
        Kind.UPDATE: 1000,
        Kind.MOMENTS: 300,
        Kind.METRICS: 400,
    }
    heads, neurons = np.zeros(72, np.float32), np.zeros(500, np.uint8)
    scored = align_reply(update, head_importance=heads, head_mmd2=heads, neuron_importance=neurons)
    assert kinds_of(scored, 2800) == {
        Kind.UPDATE: 1000,
        Kind.SCORES: 2 * 4 * 72 + 500,
        Kind.METRICS: 2800 - 1000 - 2 * 4 * 72 - 500,
    }
    shared = plain.model_dump(include=set(EvaluateReply.model_fields) - {"kind", "label"})
    report = EvaluateReply(**shared, label="probe")
    assert kinds_of(report, 900) == {Kind.REPORT: 900}
    hello = HelloReply(farm="oak", examples=3, classes=2, held=(DIGEST,))
    assert kinds_of(hello, 300) == {Kind.HELLO: 300}
    assert kinds_of(Refusal(reason="data"), 200) == {Kind.REFUSAL: 200}


# --- how long it gets ----------------------------------------------------------------------------


def fill(ledger: Ledger, hours: int, kinds: int) -> None:
    """Something of so many kinds in each of the hours before now, as if it had been added."""
    ledger.add(Kind.HELLO, 1, BROKER)
    last, db = int(NOON) // HOUR, ledger._open()
    names = list(Kind)[:kinds]
    rows = ((last - ago, kind) for ago in range(hours, 0, -1) for kind in names)
    db.execute("BEGIN")
    db.executemany("INSERT INTO sent VALUES (?, ?, 1, 60, 123456)", rows)
    db.execute("COMMIT")


def test_telemetry_of_every_minute_is_a_row_an_hour(path: Path) -> None:
    with ledger_at(path) as ledger:
        for minute in range(1440):
            ledger.add(Kind.TELEMETRY, 350, BROKER, NOON + 60 * minute)
        assert len(ledger.rows()) == 24
        assert ledger.totals() == [Total("telemetry", BROKER, 1440, 1440 * 350)]
    assert path.stat().st_size < 50_000


def test_two_years_are_kept_in_a_few_megabytes(path: Path) -> None:
    with ledger_at(path) as ledger:
        fill(ledger, hours=int(2.3 * 365 * 24), kinds=8)
    with ledger_at(path, NOON + HOUR) as ledger:
        ledger.add(Kind.TELEMETRY, 1, BROKER)
        hours = {row.time for row in ledger.rows()}
    assert len(hours) == KEPT_HOURS + 1 >= 2 * 365 * 24
    assert (min(hours), max(hours)) == (NOON + HOUR - KEPT_HOURS * HOUR, NOON + HOUR)
    assert path.stat().st_size < 8_000_000


def test_a_busy_farm_gets_no_longer_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 1000)
    with ledger_at(path) as ledger:
        fill(ledger, hours=300, kinds=5)
    with ledger_at(path, NOON + HOUR) as ledger:
        assert 990 < len(ledger.rows()) <= 1000
        assert ledger.rows()[-1].time == NOON


def test_a_wrong_clock_throws_nothing_away(path: Path) -> None:
    with ledger_at(path) as ledger:
        ledger.add(Kind.UPDATE, 60_000, SERVER)
    with ledger_at(path, NOON + 70 * 365 * DAY) as ledger:
        ledger.add(Kind.UPDATE, 1, SERVER)
    with ledger_at(path, 0.0) as ledger:
        ledger.add(Kind.UPDATE, 1, SERVER)
        assert [row.bytes for row in ledger.rows()] == [1, 60_000, 1]


# --- disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 4096])
def test_a_damaged_file_is_set_aside(
    path: Path, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger_at(path) as ledger:
        ledger.add(Kind.UPDATE, 60_000, SERVER)
    overwrite(path, first)
    with ledger_at(path) as ledger:
        ledger.add(Kind.EVENT, 1, BROKER)
        assert ledger.totals() == [Total("event", BROKER, 1, 1)]
    assert path.with_name(f"{FILE}.damaged").exists()
    assert "set aside" in caplog.text


def test_damage_is_set_aside_once_nobody_else_writes_there(path: Path) -> None:
    with ledger_at(path) as before:
        before.add(Kind.UPDATE, 60_000, SERVER)
    with ledger_at(path) as other, ledger_at(path) as ledger:
        assert len(other.rows()) == 1
        overwrite(path)
        ledger.add(Kind.EVENT, 1, BROKER)
        assert not path.with_name(f"{FILE}.damaged").exists()
        other.close()
        ledger.add(Kind.EVENT, 1, BROKER)
        assert path.with_name(f"{FILE}.damaged").exists()
        assert ledger.totals() == [Total("event", BROKER, 2, 2)], "what waited is in the new one"
        other.add(Kind.EVENT, 5, BROKER)
        assert ledger.totals() == [Total("event", BROKER, 3, 7)]


def test_a_full_disk_stops_nothing_and_loses_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger_at(path) as ledger:
        ledger.add(Kind.UPDATE, 1, SERVER)

        def full() -> None:
            (pages,) = ledger._open().execute("PRAGMA page_count").fetchone()
            ledger._open().execute(f"PRAGMA max_page_count = {pages}")

        for number in range(60):
            full()  # also after it was opened anew
            ledger.add(Kind.EVENT, 1, f"broker {number:0150d}")
        assert ledger._waiting
        assert sum("not written down" in text for text in caplog.messages) == 1
        full()
        ledger.close()  # vain as well
        ledger.add(Kind.EVENT, 1, "broker")
        assert not ledger._waiting
        assert sum(one.messages for one in ledger.totals()) == 62


def test_a_folder_that_cannot_be_written_stops_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("a file is in the way")
    ledger = ledger_at(path)
    for _ in range(3):
        ledger.add(Kind.EVENT, 2, BROKER)
    with pytest.raises(DiskError, match="check that the disk has room"):
        ledger.totals()
    assert len([one for one in caplog.records if one.levelno == logging.ERROR]) == 1
    path.parent.unlink()
    ledger.close()
    assert bytes_in(path) == 6


def test_what_waits_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    path.parent.write_text("a file is in the way")
    ledger = ledger_at(path)
    for number in (0, 1, 2, 3, 4, 0):
        ledger.add(Kind.EVENT, 1, f"broker {number}")
    path.parent.unlink()
    ledger.close()
    assert bytes_in(path) == 4


def test_a_file_of_a_later_release_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger_at(path) as ledger:
        ledger.add(Kind.UPDATE, 1, SERVER)
        ledger._open().execute("PRAGMA user_version = 9")
    with ledger_at(path) as ledger:
        ledger.add(Kind.UPDATE, 1, SERVER)
        assert "update this program" in caplog.text
        with pytest.raises(StateError):
            ledger.rows()


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    (tmp_path / "farm.toml").write_text('[farm]\nname = "oak"\ndata = "images"\n')
    return tmp_path


def shown(*arguments: str, width: str = "100") -> str:
    done = CliRunner().invoke(app, ["ledger", *arguments], env={"COLUMNS": width})
    assert done.exit_code == 0, done.output
    return done.output


def test_a_farmer_sees_what_left(farm: Path, path: Path) -> None:
    assert shown(str(farm)) == f"nothing left this farm\n{NEVER}\n"
    assert not path.exists()
    with Ledger.open(path) as ledger:
        ledger.add(Kind.UPDATE, 61_234, SERVER, time.time() - 8 * DAY)
        for _ in range(3):
            ledger.add(Kind.TELEMETRY, 400, BROKER)
    traffic.keep(path.parent, Counters(sent=70_000, received=1))
    lines = shown(str(farm)).splitlines()
    assert [line.strip(" \u2502").split() for line in lines if "192" in line] == [
        ["broker", "192.0.2.7:8883", "\u2502", "telemetry", "\u2502", "3", "\u2502", "1,200"],
        ["server", "192.0.2.7:8000", "\u2502", "update", "\u2502", "1", "\u2502", "61,234"],
    ]
    assert lines[-2] == "images: 0 bytes; classifiers: 0 bytes"
    assert lines[-1].startswith("at the socket with the server, over the farm's life: 70,000 bytes")
    assert "update" not in shown(str(farm), "--since", "7d")
    found = json.loads(shown(str(farm), "--json"))
    assert found["totals"][1] == {
        "kind": "update",
        "destination": SERVER,
        "messages": 1,
        "bytes": 61_234,
    }
    assert (found["images_bytes"], found["classifiers_bytes"]) == (0, 0)
    assert found["socket_sent_bytes"] == 70_000
    assert {row["time"] % HOUR for row in found["hours"]} == {0}


def test_it_can_be_looked_at_while_others_write(farm: Path, path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.add(Kind.EVENT, 1, BROKER)
        assert "event" in shown(str(farm))
        ledger.add(Kind.EVENT, 1, BROKER)
        assert json.loads(shown(str(farm), "--json"))["totals"][0]["messages"] == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("12h", 12 * HOUR), ("7d", 7 * DAY), ("4w", 28 * DAY)]
)
def test_spans_of_time(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1d", "7 d", "1.5h", "7days"])
def test_what_is_no_span_of_time(text: str) -> None:
    with pytest.raises(ConfigError, match="say 12h, 7d or 4w"):
        seconds_of(text)


def test_only_a_farm_has_a_ledger(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["ledger", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
