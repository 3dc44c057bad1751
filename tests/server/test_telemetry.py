"""What devices told: kept once, read back as it was said, and let go of when it is old."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common.errors import DiskError
from common.topics import DeviceState, Event, Result, Telemetry
from server import arrivals, retention
from server.arrivals import Ages, Arrivals, Batch, Message, Said, There, values_of
from server.bridge import Bridge
from server.figures import reading
from server.retention import AGES, DAY, Retention, shortened
from server.telemetry import COLUMNS, HOUR, NAME, Fate, Measured, Table, TelemetryStore
from server.telemetry import LabelHour as Hour

NOW = 1_800_000_000.0
MEASURED = Telemetry(
    uptime_seconds=5,
    cpu_ratio=0.5,
    memory_used_bytes=1,
    memory_bytes=2,
    disk_free_bytes=3,
    throttled=True,
    outbox_messages=7,
)
RESULT = Result(taken=NOW, label="scab", share=0.5, sure=True, version=1)
EVENT = Event(kind="update", words="it is in use", outcome="committed", version=3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Arrivals]:
    with Arrivals.open(tmp_path / NAME) as opened:
        yield opened


def row(device: str, number: int, body: Telemetry | Result | Event, time: float = NOW) -> Message:
    table: Table = {Telemetry: "telemetry", Result: "results", Event: "events"}[type(body)]  # type: ignore[assignment]
    return Message(device, table, number, time, values_of(table, body))


def keep(store: Arrivals, *news: There | Said | Message, now: float = NOW) -> Counter[Fate]:
    return store.keep(Batch(list(news), {one.device: now for one in news}), now)


def ids(store: Arrivals, table: str = "telemetry") -> list[int]:
    return [row["id"] for row in store._select(f"SELECT id FROM {table} ORDER BY id")]


# --- kept and read ---------------------------------------------------------------------------


def test_columns_are_those_of_the_messages(store: Arrivals) -> None:
    kinds: dict[str, type[BaseModel]] = {"telemetry": Telemetry, "results": Result, "events": Event}
    for table, columns in COLUMNS.items():
        found = [one["name"] for one in store._select(f"PRAGMA table_info({table})")]
        assert found == ["device", "id", "time", "received", *columns]
        assert set(columns) == set(kinds[table].model_fields)


def test_what_was_said_is_read_back(store: Arrivals, tmp_path: Path) -> None:
    state = DeviceState(farm="apple", release="1.2", version=4, asleep=True)
    keep(store, There("oak", True), Said("oak", state), row("oak", 1, MEASURED, NOW - 9))
    keep(store, row("oak", 2, RESULT), row("oak", 3, EVENT, NOW - 1), There("gate", False))
    with reading(TelemetryStore, tmp_path / NAME) as told:
        gate, oak = told.devices()
        assert (gate.name, gate.presence, gate.farm, gate.state) == ("gate", "offline", None, None)
        assert (oak.farm, oak.presence, oak.seen, oak.since) == ("apple", "online", NOW, NOW)
        assert (oak.state, oak.outbox) == (state, 7)
        assert told.device("oak") == oak
        assert told.device("elm") is None
        assert told.presence() == {"online": 1, "offline": 1, "never": 0}
        assert told.newest("oak") == Measured(NOW - 9, MEASURED)
        assert told.newest("gate") is None
        (event,) = told.events()
        assert (event.device, event.time, event.received) == ("oak", NOW - 1, NOW)
        assert (event.kind, event.outcome, event.version) == ("update", "committed", 3)
        assert told.events(device="gate") == []
        assert told.counts() == dict.fromkeys(get_args(Fate), 0) | {"stored": 6}


def test_results_are_counted_by_hour_and_label(store: Arrivals) -> None:
    begin = NOW // HOUR * HOUR
    said = [(0, "scab", True), (10, "scab", False), (20, "well", True), (HOUR, "scab", True)]
    for number, (after, label, sure) in enumerate(said):
        body = RESULT.model_copy(update={"taken": begin + after, "label": label, "sure": sure})
        keep(store, row("oak" if number else "elm", number, body))
    first, second = int(begin), int(begin) + HOUR
    assert store.labels_by_hour(begin, begin + 2 * HOUR) == [
        Hour(first, "scab", 2, 1),
        Hour(first, "well", 1, 1),
        Hour(second, "scab", 1, 1),
    ]
    assert store.labels_by_hour(begin, begin + HOUR, "elm") == [Hour(first, "scab", 1, 1)]
    assert store.labels_by_hour(begin + HOUR, begin + HOUR) == []


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12)), max_size=8)))
def test_a_message_is_kept_once_whatever_comes_again(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[str, int]]]
) -> None:
    """Also across restarts, and also one that comes late."""
    path = tmp_path_factory.mktemp("told") / NAME
    fates: Counter[Fate] = Counter()
    for batch in batches:
        with Arrivals.open(path) as store:
            fates += keep(store, *(row(name, number, RESULT) for name, number in batch))
    sent = [one for batch in batches for one in batch]
    with Arrivals.open(path) as store:
        found = store._select("SELECT name, id FROM results JOIN devices ON number = device")
    assert Counter((one["name"], one["id"]) for one in found) == Counter(set(sent))
    assert (fates["stored"], fates["duplicate"]) == (len(set(sent)), len(sent) - len(set(sent)))


def test_a_batch_is_kept_whole_or_not_at_all(store: Arrivals) -> None:
    store.limit(200_000)
    with pytest.raises(DiskError):
        keep(store, *(row("oak", number, RESULT) for number in range(10_000)))
    assert store.devices() == []
    assert ids(store, "results") == []
    assert store.counts()["stored"] == 0


def test_what_fits_no_row_does_not_stop_the_others(store: Arrivals) -> None:
    bad = Message("oak", "results", 2, NOW, ("not a time", "scab", 0.5, True, 1))
    large = Message("oak", "results", 3, NOW, (1.0, "scab", 0.5, True, 2**64))
    fates = keep(store, row("oak", 1, RESULT), bad, large, row("oak", 4, RESULT))
    assert fates == {"stored": 2, "malformed": 2}
    assert ids(store, "results") == [1, 4]


def test_as_many_devices_as_may_be(store: Arrivals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MOST_DEVICES", 3)
    monkeypatch.setattr(arrivals, "MOST_OF_FARM", 2)
    apple, rice = (DeviceState(farm=farm, release="1") for farm in ("apple", "rice"))
    fates = keep(store, *(Said(name, apple) for name in "abc"))
    assert fates == {"stored": 2, "crowded": 1}, "the farm is full"
    assert keep(store, Said("c", rice), Said("a", rice), Said("b", apple)) == {
        "stored": 2,
        "duplicate": 1,
    }
    assert keep(store, There("d", True), There("a", True)) == {"crowded": 1, "stored": 1}
    assert [one.name for one in store.devices()] == ["a", "b", "c"]


def test_only_what_a_power_cut_may_take_is_not_synced(store: Arrivals) -> None:
    assert not Batch([row("oak", 1, MEASURED)]).durable
    for one in (row("oak", 1, RESULT), row("oak", 1, EVENT), There("oak", True)):
        assert Batch([row("oak", 1, MEASURED), one]).durable
    keep(store, row("oak", 1, MEASURED))
    assert store._pragma("synchronous") == 1
    keep(store, row("oak", 2, RESULT))
    assert store._pragma("synchronous") == 2


# --- retention -------------------------------------------------------------------------------


def test_of_old_telemetry_one_an_hour_stays_and_then_none(store: Arrivals) -> None:
    quarters = [NOW - 3 * DAY + 900 * number for number in range(4 * 24 * 3)]
    for number, when in enumerate(quarters):
        keep(store, row("oak", number, MEASURED, when), now=when)
    Retention(store).step(NOW)
    old = [number for number, when in enumerate(quarters) if when < NOW - AGES.raw]
    left = ids(store)
    assert left[len([one for one in left if one in old]) :] == list(range(len(old), len(quarters)))
    hours = [quarters[number] // HOUR for number in left if number in old]
    assert hours == sorted(set(hours))
    assert len(hours) in (24, 25)
    Retention(store).step(NOW)
    assert ids(store) == left, "what is thin stays"
    Retention(store).step(NOW + AGES.telemetry)
    assert ids(store) == []


def test_ages_count_from_when_it_came(store: Arrivals) -> None:
    keep(store, row("oak", 1, RESULT, time=0.0), row("oak", 2, EVENT, time=9e9))
    Retention(store).step(NOW + AGES.results - 1)
    assert ids(store, "results") == [1]
    Retention(store).step(NOW + AGES.results + 1)
    assert ids(store, "results") == ids(store, "events") == []
    assert store.devices() == [], "nobody has heard of it for as long"


def test_a_full_file_lets_go_of_telemetry_first(store: Arrivals) -> None:
    for number in range(40):
        before = NOW - number * HOUR / 2
        news = [row("oak", 100 * number + one, MEASURED, before + one) for one in range(100)]
        keep(store, *news, row("oak", 100_000 + number, RESULT), now=before)
    most = store.used_bytes // 3
    care = Retention(store, most_bytes=most)
    for _ in range(retention.TELEMETRY_FIRST):
        care.step(NOW)
    assert store.used_bytes <= most
    assert len(ids(store)) < 4000
    assert len(ids(store, "results")) == 40


def test_a_device_that_says_too_much_takes_no_others_place(
    store: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "MOST_ROWS", dict.fromkeys(COLUMNS, 100))
    for module in (arrivals, retention):
        monkeypatch.setattr(module, "STEP_ROWS", 30)
    keep(store, *(row("loud", number, RESULT) for number in range(1000)))
    keep(store, *(row("quiet", 5000 + number, RESULT) for number in range(100)))
    Retention(store).step(NOW)
    assert ids(store, "results") == [*range(900, 1000), *range(5000, 5100)]


def test_ages_are_halved_and_grow_again() -> None:
    assert shortened(AGES, 0) == AGES
    assert shortened(AGES, 2) == Ages(AGES.raw / 4, AGES.telemetry / 4, AGES.results, AGES.events)
    far = shortened(AGES, retention.TELEMETRY_FIRST + 1)
    assert (far.results, far.events) == (AGES.results / 2, AGES.events / 2)


def test_a_file_that_may_not_grow_says_so_and_goes_on_when_there_is_room(store: Arrivals) -> None:
    store.limit(200_000)
    with pytest.raises(DiskError, match="full"):
        for begin in range(0, 10_000, 100):
            keep(store, *(row("oak", begin + number, RESULT) for number in range(100)))
    known = ids(store, "results")
    assert store.used_bytes <= 200_000
    store.thin(store.numbers()[0], Ages(0, 0, 0, 0), NOW + 1)
    keep(store, row("oak", 10_000, RESULT))
    assert known[0] == 0
    assert ids(store, "results") == [10_000]


# --- the border ------------------------------------------------------------------------------


def took(path: Path, *messages: tuple[str, bytes]) -> Bridge:
    Arrivals.open(path).close()
    bridge = Bridge(path, "valley", clock=lambda: NOW)
    for topic, payload in messages:
        bridge.take(topic, payload, False)
    bridge.keep()
    return bridge


def stamped(body: Telemetry | Result | Event, **more: object) -> bytes:
    return json.dumps({**body.body(), "id": 1, "time": NOW, **more}).encode()


BASE = "fieldfed/valley/oak"


@pytest.mark.parametrize(
    ("topic", "payload", "fate"),
    [
        (f"{BASE}/result", stamped(RESULT), "stored"),
        (f"{BASE}/telemetry", stamped(MEASURED), "stored"),
        (f"{BASE}/event", stamped(EVENT, later="field"), "stored"),
        (f"{BASE}/availability", b"online", "stored"),
        (f"{BASE}/availability", b"asleep", "malformed"),
        (f"{BASE}/result", RESULT.model_dump_json().encode(), "malformed"),
        (f"{BASE}/result", stamped(RESULT, id=-1), "malformed"),
        (f"{BASE}/result", stamped(RESULT, id=2**63), "malformed"),
        (f"{BASE}/result", stamped(RESULT, version=2**63), "malformed"),
        (f"{BASE}/result", stamped(RESULT, share=1.5), "malformed"),
        (f"{BASE}/telemetry", stamped(MEASURED, dropped_messages=10**30), "malformed"),
        (
            f"{BASE}/event",
            b'{"kind": "started", "words": "\\ud800", "id": 1, "time": 1}',
            "malformed",
        ),
        (f"{BASE}/event", b"\xff\xfe", "malformed"),
        (f"{BASE}/event", b"", "malformed"),
        (f"{BASE}/event", b"[" * 60_000, "malformed"),
        (f"{BASE}/event", b" " * 70_000, "oversized"),
        ("fieldfed/other/oak/event", stamped(EVENT), "foreign"),
        ("fieldfed/valley/a b/event", stamped(EVENT), "foreign"),
        ("fieldfed/valley/models/event", stamped(EVENT), "foreign"),
        ("fieldfed/valley//event", stamped(EVENT), "foreign"),
    ],
)
def test_what_is_no_message_is_counted_and_left_out(
    tmp_path: Path, topic: str, payload: bytes, fate: Fate
) -> None:
    took(tmp_path / NAME, (topic, payload))
    with Arrivals.open(tmp_path / NAME) as store:
        assert {name: count for name, count in store.counts().items() if count} == {fate: 1}
        assert len(store.devices()) == (fate == "stored")


def test_what_the_server_says_is_not_heard(tmp_path: Path) -> None:
    took(tmp_path / NAME, ("fieldfed/valley/server/availability", b"online"))
    with Arrivals.open(tmp_path / NAME) as store:
        assert sum(store.counts().values()) == 0


texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)
names = st.sampled_from([*Telemetry.model_fields, *Result.model_fields, "id", "time", "kind"])
bodies = st.dictionaries(names, values).map(lambda body: json.dumps(body).encode())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([f"{BASE}/{part}" for part in ("state", "result", "telemetry")])
            | texts,
            bodies | st.binary(max_size=60),
            st.booleans(),
        ),
        max_size=10,
    )
)
def test_nothing_that_comes_raises(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[str, bytes, bool]]
) -> None:
    path = tmp_path_factory.mktemp("told") / NAME
    Arrivals.open(path).close()
    bridge = Bridge(path, "valley")
    for message in messages:
        bridge.take(*message)
    bridge.keep()
    with Arrivals.open(path) as store:
        assert sum(store.counts().values()) == len(messages)


def test_a_flood_is_written_now_and_then_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = 2 * arrivals.MOST_OF_FARM * 50
    took(tmp_path / NAME, *((f"{BASE}/event", b"none") for _ in range(count)))
    with Arrivals.open(tmp_path / NAME) as store:
        assert store.counts()["malformed"] == count
    assert len(caplog.records) == 1


def test_what_was_left_at_the_broker_tells_not_when_a_device_was_heard_of(tmp_path: Path) -> None:
    path = tmp_path / NAME
    Arrivals.open(path).close()
    bridge = Bridge(path, "valley", clock=lambda: NOW)
    bridge.take(f"{BASE}/availability", b"offline", True)
    bridge.keep()
    with Arrivals.open(path) as store:
        (oak,) = store.devices()
    assert (oak.presence, oak.seen) == ("offline", None)


def test_damage_is_told_apart_from_a_file_that_is_busy(tmp_path: Path) -> None:
    bridge = took(tmp_path / NAME, (f"{BASE}/result", stamped(RESULT)))
    with closing(sqlite3.connect(tmp_path / NAME)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray((tmp_path / NAME).read_bytes())
    data[4096:] = b"x" * (len(data) - 4096)
    (tmp_path / NAME).write_bytes(data)
    bridge.take(f"{BASE}/result", stamped(RESULT, id=2), False)
    with pytest.raises(Exception, match=r"malformed|damaged"):
        bridge.keep()
    assert bridge.damaged.is_set()
