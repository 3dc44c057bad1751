"""Messages that wait: none is lost that was put, none repeats an id, and the disk is not filled."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common.sqlite
from common.errors import ConfigError, DiskError, ProtocolError, RejectReason, StateError
from common.outbox import KINDS, LEAST_BYTES, RESERVED_IDS, Depth, Kind, Outbox

PUTS = """
import sys
from pathlib import Path
from common.outbox import KINDS, Outbox
with Outbox.open(Path(sys.argv[1]), clock=lambda: 1.0) as outbox:
    for number in range(1_000_000):
        print(outbox.put(KINDS[number % 3], "farm", {"number": number}), flush=True)
"""


def bytes_of(path: Path) -> int:
    """On disk, with all that SQLite puts beside it."""
    return sum(one.stat().st_size for one in path.parent.glob(f"{path.name}*"))


def ids(outbox: Outbox) -> list[int]:
    return [one.id for one in outbox.waiting(1_000_000)]


def numbers(outbox: Outbox, kind: Kind) -> list[int]:
    found = outbox.waiting(1_000_000)
    return [json.loads(one.payload)["number"] for one in found if one.kind == kind]


def fill(outbox: Outbox, kind: Kind, count: int, size: int = 200) -> None:
    for number in range(count):
        outbox.put(kind, "farm", {"number": number, "leaf": "x" * size})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "outbox.db"


def test_messages_wait_in_order_until_they_are_removed(path: Path) -> None:
    with Outbox.open(path, clock=lambda: 1.5) as outbox:
        first = outbox.put("telemetry", "farm/telemetry", {"b": [1, None], "a": "\u00e4"})
        others = [outbox.put(kind, "farm", {}) for kind in KINDS]
        (oldest,) = outbox.waiting(1)
        assert oldest.payload == (
            f'{{"a":"\\u00e4","b":[1,null],"id":{first},"time":1.5}}'.encode()
        )
        assert (oldest.kind, oldest.topic) == ("telemetry", "farm/telemetry")
        assert [one.kind for one in outbox.waiting(9)][1:] == list(KINDS)
        assert [one.id for one in outbox.waiting(2, after=first)] == others[:2]
        outbox.remove([first, others[1], 5])
        assert ids(outbox) == [others[0], others[2]]
        size = sum(len(one.payload) for one in outbox.waiting(9))
        assert outbox.depth == Depth(2, size)
    with Outbox.open(path) as again:
        assert ids(again) == [others[0], others[2]]
        assert again.depth == Depth(2, size)
        assert again.dropped == {"telemetry": 0, "event": 0, "result": 0}


def test_who_listens_hears_of_each_message(path: Path) -> None:
    with Outbox.open(path) as outbox:
        heard = []
        outbox.listen(lambda: heard.append(outbox.depth.count))
        fill(outbox, "event", 3)
        assert heard == [1, 2, 3]


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": object()}])
def test_what_is_no_json_is_not_put(path: Path, body: dict[str, float]) -> None:
    with Outbox.open(path) as outbox:
        with pytest.raises(ProtocolError, match="no JSON"):
            outbox.put("event", "farm", body)
        assert outbox.depth.count == 0


def test_what_never_fits_is_not_put_and_costs_nothing(path: Path) -> None:
    with Outbox.open(path, LEAST_BYTES) as outbox:
        fill(outbox, "telemetry", 10)
        with pytest.raises(ProtocolError, match="at most 4000 pass") as caught:
            outbox.put("result", "farm", {"x": "x" * 4000})
        assert caught.value.reason is RejectReason.OVERSIZED
        assert numbers(outbox, "telemetry") == list(range(10))
    with pytest.raises(ConfigError, match="at least 64000"):
        Outbox.open(path, LEAST_BYTES - 1)


def test_what_no_broker_takes_is_counted_as_dropped(path: Path) -> None:
    with Outbox.open(path) as outbox:
        kept, refused = (outbox.put("event", "farm", {}) for _ in range(2))
        outbox.refuse(refused)
        assert ids(outbox) == [kept]
        assert outbox.dropped["event"] == 1


def test_threads_put_while_another_removes(path: Path) -> None:
    with Outbox.open(path) as outbox:
        threads = [threading.Thread(target=fill, args=(outbox, kind, 60)) for kind in KINDS]
        for thread in threads:
            thread.start()
        taken: list[int] = []
        while any(thread.is_alive() for thread in threads) or outbox.depth.count:
            some = [one.id for one in outbox.waiting(7)]
            outbox.remove(some)
            taken += some
        assert taken == sorted(set(taken))
        assert len(taken) == 180


# --- marks -----------------------------------------------------------------------------------


def test_a_mark_is_kept_with_its_message_or_neither(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Outbox.open(path) as outbox:
        assert outbox.marked("lines") is None
        outbox.put("result", "farm", {"number": 1}, ("lines", 7))
        with pytest.raises(ProtocolError):
            outbox.put("result", "farm", {"number": float("nan")}, ("lines", 8))
        assert outbox.marked("lines") == 7
        real = common.sqlite.writing

        @contextmanager
        def full(*arguments: Any, **how: Any) -> Iterator[Any]:
            with real(*arguments, **how) as run:
                yield run
                raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch, pytest.raises(StateError):
            patch.setattr("common.outbox.writing", full)
            outbox.put("result", "farm", {"number": 2}, ("lines", 9))
        assert outbox.marked("lines") == 7
    with Outbox.open(path) as again:
        assert again.marked("lines") == 7
        assert numbers(again, "result") == [1]


def test_marks_outlive_room_being_made_and_are_no_kind_of_message(path: Path) -> None:
    with Outbox.open(path, LEAST_BYTES) as outbox:
        outbox.put("result", "farm", {"number": 0}, ("event", 5))
        fill(outbox, "telemetry", 500)
        assert outbox.dropped["telemetry"] > 0
        assert outbox.dropped["event"] == 0
    with Outbox.open(path, LEAST_BYTES) as again:
        assert again.marked("event") == 5


def test_of_a_file_that_is_damaged_while_it_is_used_the_marks_are_still_known(path: Path) -> None:
    with Outbox.open(path) as outbox:
        outbox.put("result", "farm", {"number": 0}, ("lines", 5))
        outbox._begin_anew(common.sqlite._Damaged("as a damaged page would say"))
        assert outbox.marked("lines") == 5
        assert ids(outbox) == []


# --- kills, power cuts, clocks ---------------------------------------------------------------


def test_a_kill_at_any_instant_loses_nothing_that_was_put(path: Path) -> None:
    draw, known = random.Random(3), list[int]()
    for _ in range(5):
        putting = subprocess.Popen(
            [sys.executable, "-P", "-c", PUTS, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert putting.stdout is not None
        with putting.stdout as lines:
            until = draw.randrange(1, 300)
            said = [int(next(lines)) for _ in range(until)]
            os.kill(putting.pid, signal.SIGKILL)
            said += [int(line) for line in lines if line.endswith("\n")]
        putting.wait(10)
        assert said == sorted(said)
        assert not known or said[0] > known[-1], "an id was given out twice"
        with Outbox.open(path, clock=lambda: 1.0) as outbox:
            found = ids(outbox)
        assert set(known) | set(said) <= set(found)
        assert len(found) - len(known) - len(said) in (0, 1)  # put, and killed before it was said
        known = found


def test_ids_do_not_repeat_when_a_power_cut_takes_the_last_telemetry(
    path: Path, tmp_path: Path
) -> None:
    outbox = Outbox.open(path, clock=lambda: 1.0)
    outbox.put("result", "farm", {})
    shutil.copytree(path.parent, tmp_path / "synced")
    lost = [outbox.put("telemetry", "farm", {}) for _ in range(50)]
    outbox.close()
    with Outbox.open(tmp_path / "synced" / path.name, clock=lambda: 1.0) as again:
        assert len(ids(again)) == 1
        assert again.put("telemetry", "farm", {}) > lost[-1]


def test_ids_go_on_behind_those_that_were_reserved(path: Path) -> None:
    with Outbox.open(path, clock=lambda: 1.0) as outbox:
        outbox._next += RESERVED_IDS - 1  # as after so many messages
        given = [outbox.put("event", "farm", {}) for _ in range(3)]
    with Outbox.open(path, clock=lambda: 1.0) as again:
        assert again.put("event", "farm", {}) > given[-1] == given[0] + 2


def test_a_new_file_begins_with_the_time(path: Path) -> None:
    with Outbox.open(path, clock=lambda: 1e9) as outbox:
        assert outbox.put("event", "farm", {}) >= 10**15
    shutil.rmtree(path.parent)
    with Outbox.open(path, clock=lambda: 1e9 + 1) as outbox:
        assert outbox.put("event", "farm", {}) >= 10**15 + 10**6


# --- damage ----------------------------------------------------------------------------------


def harm(path: Path, how: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "cut inside a page": whole[: middle + 100],
            "garbage": b"garbage" * 100,
            "garbage inside": whole[:1024] + b"\xff" * (middle - 1024) + whole[middle:],
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "cut inside a page", "garbage", "garbage inside"])
def test_a_damaged_file_is_set_aside(
    path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Outbox.open(path, clock=lambda: 1.0) as outbox:
        fill(outbox, "result", 100)
        last = ids(outbox)[-1]
    harm(path, how)
    damaged = path.read_bytes()
    with Outbox.open(path, clock=lambda: 1.0) as again:
        assert again.depth == Depth(0, 0)
        assert again.put("result", "farm", {}) > last
    aside = path.with_name("outbox.db.damaged").read_bytes()
    assert aside[100:] == damaged[100:]  # SQLite counts openings in the first 100
    assert "is damaged" in caplog.text
    with Outbox.open(path) as third:
        assert third.depth.count == 1


def test_damage_while_it_is_open_stops_nobody(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Outbox.open(path, clock=lambda: 1.0) as outbox:
        fill(outbox, "event", 100)
        last = ids(outbox)[-1]
        outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        outbox._db.execute("PRAGMA shrink_memory")
        harm(path, "garbage inside")
        assert ids(outbox) == []
        found = outbox.put("result", "farm", {})
        assert found > last
        assert ids(outbox) == [found]
    assert "is damaged" in caplog.text


def test_another_version_and_another_process_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.sqlite, "BUSY_SECONDS", 0.1)
    with Outbox.open(path) as outbox:
        with pytest.raises(StateError, match="no other process uses it"):
            Outbox.open(path)
        outbox._db.execute("PRAGMA user_version = 2")
    with pytest.raises(StateError, match=r"'.*outbox\.db': it is of version 2"):
        Outbox.open(path)


# --- room ------------------------------------------------------------------------------------


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Inside, no file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_loses_nothing_that_was_put(path: Path, kind: Kind) -> None:
    with Outbox.open(path) as outbox:
        kept = [outbox.put("result", "farm", {"leaf": "x" * 500}) for _ in range(20)]
        with full_disk(path.with_name("outbox.db-wal").stat().st_size + 8000):
            with pytest.raises(DiskError, match="check that the disk has room"):
                while True:
                    kept.append(outbox.put(kind, "farm", {"leaf": "x" * 500}))
            assert ids(outbox) == kept
        assert outbox.depth.count == len(kept)
        kept.append(outbox.put(kind, "farm", {}))
    with Outbox.open(path) as again:
        assert ids(again) == kept == sorted(set(kept))


def test_the_disk_is_full_and_the_file_damaged(path: Path) -> None:
    with Outbox.open(path) as outbox:
        fill(outbox, "event", 100)
        outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        outbox._db.execute("PRAGMA shrink_memory")
        harm(path, "garbage inside")
        with full_disk(1000), pytest.raises(DiskError):
            ids(outbox)
        fill(outbox, "event", 2)
        assert numbers(outbox, "event") == [0, 1]


def test_telemetry_is_thinned_from_the_oldest_on_and_results_stay(path: Path) -> None:
    largest = 0
    with Outbox.open(path, LEAST_BYTES) as outbox:
        for number in range(3000):
            outbox.put("telemetry", "farm", {"number": number})
            if number % 100 == 0:
                outbox.put("result", "farm", {"number": number})
                outbox.put("event", "farm", {"number": number})
            largest = max(largest, bytes_of(path))
        assert LEAST_BYTES // 2 < largest < LEAST_BYTES
        left = numbers(outbox, "telemetry")
        assert numbers(outbox, "result") == list(range(0, 3000, 100))
        assert numbers(outbox, "event") == list(range(0, 3000, 100))
        assert dict(outbox.dropped) == {"telemetry": 3000 - len(left), "event": 0, "result": 0}
    assert len(left) > 50
    assert left[-1] == 2999
    gaps = [later - earlier for earlier, later in pairwise(left)]
    third = len(gaps) // 3
    assert sum(gaps[:third]) > 2 * sum(gaps[third : 2 * third]) > 2 * sum(gaps[-third:])
    with Outbox.open(path, LEAST_BYTES) as again:
        assert again.dropped["telemetry"] == 3000 - len(left)
        assert numbers(again, "telemetry") == left


def test_events_go_before_results_and_the_oldest_first(path: Path) -> None:
    with Outbox.open(path, LEAST_BYTES) as outbox:
        fill(outbox, "telemetry", 20)
        fill(outbox, "event", 60)
        fill(outbox, "result", 60)
        assert outbox.dropped["telemetry"] == 20
        left = numbers(outbox, "event")
        assert 0 < len(left) < 60
        assert left == list(range(60 - len(left), 60))
        assert numbers(outbox, "result") == list(range(60))
        fill(outbox, "result", 200)
        assert numbers(outbox, "event") == []
        newest = numbers(outbox, "result")
        assert newest == list(range(200 - len(newest), 200))
        assert outbox.dropped == {"telemetry": 20, "event": 60, "result": 260 - len(newest)}
        fill(outbox, "telemetry", 5)
        assert numbers(outbox, "result") == newest
        assert bytes_of(path) < LEAST_BYTES


def test_an_empty_outbox_gives_its_disk_back(path: Path) -> None:
    with Outbox.open(path) as outbox:
        fill(outbox, "telemetry", 3000)
        assert bytes_of(path) > 600_000
        while some := ids(outbox)[:500]:
            outbox.remove(some)
        assert bytes_of(path) < 20_000
        fill(outbox, "result", 3)
        assert numbers(outbox, "result") == [0, 1, 2]


def test_a_smaller_bound_is_kept_to(path: Path) -> None:
    with Outbox.open(path) as outbox:
        fill(outbox, "telemetry", 1000)
        fill(outbox, "result", 20)
    with Outbox.open(path, LEAST_BYTES) as smaller:
        assert bytes_of(path) < LEAST_BYTES
        assert numbers(smaller, "result") == list(range(20))
        assert 10 < len(numbers(smaller, "telemetry")) < 200
        fill(smaller, "telemetry", 300)
        assert bytes_of(path) < LEAST_BYTES


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KINDS), st.integers(1, 40), st.integers(0, 3500)),
        st.tuples(st.just("remove"), st.integers(1, 40), st.just(0)),
        st.tuples(st.just("open again"), st.just(1), st.just(0)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=25)
@given(STEPS)
def test_whatever_happens_the_bound_holds_and_all_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("outbox") / "outbox.db"
    outbox, put, removed, last = Outbox.open(path, LEAST_BYTES), Counter[str](), Counter[str](), 0
    try:
        for what, count, size in steps:
            if what == "open again":
                outbox.close()
                outbox = Outbox.open(path, LEAST_BYTES)
            elif what == "remove":
                oldest = outbox.waiting(count)
                outbox.remove([one.id for one in oldest])
                removed.update(one.kind for one in oldest)
            else:
                (kind,) = (kind for kind in KINDS if kind == what)
                for _ in range(count):
                    before, last = last, outbox.put(kind, "farm", {"leaf": "x" * size})
                    assert last > before
                    assert bytes_of(path) < LEAST_BYTES
                put[kind] += count
            found = outbox.waiting(100_000)
            assert [one.id for one in found] == sorted({one.id for one in found})
            assert outbox.depth == Depth(len(found), sum(len(one.payload) for one in found))
            waits = Counter(one.kind for one in found)
            for kind in KINDS:
                assert put[kind] == removed[kind] + waits[kind] + outbox.dropped[kind]
    finally:
        outbox.close()


@pytest.mark.parametrize(("kind", "level"), [("telemetry", 1), ("event", 2), ("result", 2)])
def test_what_is_dear_is_synced_with_each_put(path: Path, kind: Kind, level: int) -> None:
    with Outbox.open(path) as outbox:
        outbox.put(kind, "farm", {})
        assert outbox._db.execute("PRAGMA synchronous").fetchone() == (level,)  # 1 NORMAL, 2 FULL
        assert outbox._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
