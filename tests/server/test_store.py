"""The store: every write wholly there or not, whatever happens to the process."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import RejectReason, StateError
from common.messages import AlignReply, EvaluateReply
from server.migrations import MIGRATIONS, migrate, version_of
from server.rows import SpooledReply
from server.store import CandidateRow, ScoreRow, Store

BASE, NEXT = "aa" * 32, "bb" * 32
# Masks are text to the store; without common.mask, and so without torch, the processes that are
# to be killed start fast.
DENSE_JSON, CUT_JSON = '{"heads": [2, 2]}', '{"heads": [2, 1]}'
DENSE, CUT = (hashlib.sha256(text.encode()).hexdigest() for text in (DENSE_JSON, CUT_JSON))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state" / "fieldfed.db") as opened_store:
        yield opened_store


def reply(farm: str = "mango", **changes: object) -> AlignReply:
    values: dict[str, object] = {
        "run": 1,
        "round": 1,
        "attempt": 1,
        "farm": farm,
        "base": BASE,
        "mask": DENSE,
        "examples": 40,
        "accuracy": 0.5,
        "f1": 0.4,
        "loss": 1.25,
        "dal": 0.1,
        "steps": 4,
        "train_seconds": 1.5,
        "seconds": 3.5,
        "update": np.zeros(3, np.uint8),
    }
    return AlignReply.model_validate(values | changes)


def report(farm: str = "mango", accuracy: float = 0.75) -> EvaluateReply:
    return EvaluateReply(
        run=1,
        round=2,
        attempt=1,
        farm=farm,
        base=NEXT,
        mask=DENSE,
        label="pruned",
        examples=10,
        accuracy=accuracy,
        f1=0.7,
        seconds=1.0,
    )


def spooled(node: int) -> SpooledReply:
    return SpooledReply(Path("/spool/1/1.replies"), 100 * node, 100, "cc" * 32)


def started(store: Store, farms: int = 2) -> int:
    run = store.start_run("{}", 7, BASE, DENSE_JSON, "hello")
    for node in range(1, farms + 1):
        store.upsert_farm(run, node, f"farm-{node}", 10 * node, 3)
    return run


def opened(store: Store, run: int, number: int = 1) -> None:
    store.open_round(run, number, kind="align", base=BASE, mask=DENSE, quorum=2, deadline=99.0)


def candidate(mask: str = DENSE, digest: str = NEXT) -> CandidateRow:
    return CandidateRow(digest, BASE, mask, "{}", 1000, 100, "models/x")


def commit(store: Store, run: int, number: int = 1, mask: str = DENSE) -> None:
    heads = np.arange(4, dtype=np.float32)
    store.commit_round(
        run,
        number,
        candidate=candidate(mask),
        mask_json=None if mask == DENSE else CUT_JSON,
        scores=[
            ScoreRow(None, DENSE, heads, np.ones(6, np.float32)),
            ScoreRow("mango", DENSE, heads * 2),
        ],
        macs_ratio=0.5,
        heads_kept_ratio=0.75,
        mean_accuracy=0.6,
    )


# --- runs and farms ------------------------------------------------------------------------------


def test_a_run_from_start_to_end(store: Store) -> None:
    assert store.latest_run() is None
    run = started(store)
    row = store.run(run)
    assert (row.seed, row.base, row.message, row.state) == (7, BASE, "hello", "running")
    assert row.mask_json == DENSE_JSON
    assert row.mask == DENSE
    store.finish_run(run, "failed", "no farm answered")
    ended = store.latest_run()
    assert ended is not None
    assert (ended.state, ended.detail) == ("failed", "no farm answered")
    assert ended.finished is not None
    assert ended.finished >= ended.started


def test_a_new_run_stops_the_one_left_unfinished(store: Store) -> None:
    first, second = started(store), started(store)
    assert [(row.run, row.state) for row in store.runs()] == [
        (first, "stopped"),
        (second, "running"),
    ]


def test_the_store_and_the_mask_agree_on_digests(store: Store) -> None:
    from common.mask import Mask

    mask = Mask(((0, 1), (1,)), ((0, 2), (0, 1)), (2, 2), (3, 3))
    assert store.run(store.start_run("{}", 0, BASE, mask.to_json())).mask == mask.digest


def test_an_unknown_run_is_an_error(store: Store) -> None:
    with pytest.raises(StateError, match="no run 9"):
        store.run(9)


def test_tau_is_frozen_once(store: Store) -> None:
    run = started(store)
    assert store.tau(run) is None
    store.freeze_tau(run, 0.25)
    store.freeze_tau(run, 0.5)
    assert store.tau(run) == 0.25


def test_farms_are_met_again(store: Store) -> None:
    run = started(store)
    store.upsert_farm(run, 2, "farm-2", 55, 4)
    store.record_rejection(run, 1, 2, RejectReason.STALE, "late")
    first, second = store.farms(run)
    assert (first.node, first.rejected) == (1, 0)
    assert (second.examples, second.classes, second.rejected) == (55, 4, 1)
    assert second.last_seen == pytest.approx(time.time(), abs=60)


# --- rounds --------------------------------------------------------------------------------------


def test_a_reply_counts_once(store: Store) -> None:
    run = started(store)
    opened(store, run)
    assert store.record_reply(run, 1, 2, 1, 500, reply(), spooled(2))
    assert not store.record_reply(run, 1, 2, 2, 500, reply(accuracy=1.0), spooled(3))
    assert store.record_reply(run, 1, 1, 1, 400, reply("rice"), spooled(1))
    rows = store.replies(run, 1)
    assert [(row.node, row.farm, row.accuracy) for row in rows] == [
        (1, "rice", 0.5),
        (2, "mango", 0.5),
    ]
    assert store.spooled_paths(run) == [spooled(1).path]
    assert [row.spooled for row in store.replies(run, 1)] == [spooled(1), spooled(2)]
    up = {row.node: row.bytes_up for row in store.traffic(run)}
    assert up == {1: 400, 2: 1000}  # what travelled twice is counted twice


def test_a_reply_whose_body_is_lost_is_taken_again(store: Store) -> None:
    run = started(store)
    opened(store, run)
    store.record_reply(run, 1, 2, 1, 500, reply(), spooled(2))
    store.drop_reply(run, 1, 2)
    assert store.replies(run, 1) == []
    assert store.record_reply(run, 1, 2, 1, 500, reply(), spooled(2))
    commit(store, run)
    store.drop_reply(run, 1, 2)
    assert len(store.replies(run, 1)) == 1


def test_replies_need_an_open_round_and_a_known_farm(store: Store) -> None:
    run = started(store)
    with pytest.raises(StateError, match="not open"):
        store.record_reply(run, 1, 1, 1, 5, reply(), spooled(1))
    opened(store, run)
    with pytest.raises(StateError, match="FOREIGN KEY"):
        store.record_reply(run, 1, 99, 1, 5, reply(), spooled(1))
    assert store.traffic(run) == []  # a refused write leaves nothing behind
    commit(store, run)
    with pytest.raises(StateError, match="not open"):
        store.record_reply(run, 1, 1, 1, 5, reply(), spooled(1))


def test_a_round_is_reopened_after_a_crash_and_keeps_its_replies(store: Store) -> None:
    run = started(store)
    opened(store, run)
    store.record_reply(run, 1, 1, 1, 5, reply(), spooled(1))
    opened(store, run)
    (row,) = store.rounds(run)
    assert (row.attempt, row.state, row.quorum, row.deadline) == (2, "open", 2, 99.0)
    assert len(store.replies(run, 1)) == 1


def test_commit_keeps_everything_of_a_round(store: Store) -> None:
    run = started(store)
    assert store.last_committed(run) is None
    opened(store, run)
    store.record_reply(run, 1, 1, 1, 5, reply(), spooled(1))
    commit(store, run, mask=CUT)
    (row,) = store.rounds(run)
    assert (row.state, row.participants) == ("committed", 1)
    assert (row.macs_ratio, row.heads_kept_ratio, row.mean_accuracy) == (0.5, 0.75, 0.6)
    assert row.finished is not None
    assert store.last_committed(run) == (1, candidate(CUT))
    assert store.candidates(run) == {1: candidate(CUT)}
    assert store.masks(run) == {DENSE: DENSE_JSON, CUT: CUT_JSON}
    assert store.mask(CUT) == CUT_JSON
    with pytest.raises(StateError, match="no mask"):
        store.mask(BASE)
    assert store.spooled_paths(run) == []


def test_only_the_beginning_and_the_end_of_a_round_wait_for_the_disk(store: Store) -> None:
    def waits() -> bool:
        return int(store._select("PRAGMA synchronous")[0][0]) == 2  # FULL

    run = started(store)
    opened(store, run)
    assert waits()
    store.record_sent(run, 1, 1, 1, 100)
    assert not waits()
    commit(store, run)
    assert waits()


def test_scores_come_back_as_they_went(store: Store) -> None:
    run = started(store)
    for number in (1, 2):
        opened(store, run, number)
        commit(store, run, number)
    scores = store.scores(run)
    assert list(scores) == [1, 2]
    agreed, farm = scores[1]
    assert (agreed.farm, farm.farm) == (None, "mango")
    np.testing.assert_array_equal(farm.heads, np.array([0, 2, 4, 6], np.float32))
    assert agreed.neurons is not None
    assert agreed.neurons.shape == (6,)
    assert farm.neurons is None


def test_a_round_commits_once(store: Store) -> None:
    run = started(store)
    with pytest.raises(StateError, match="not open"):
        commit(store, run)
    opened(store, run)
    commit(store, run)
    with pytest.raises(StateError, match="not open"):
        commit(store, run)
    with pytest.raises(StateError, match="cannot be reopened"):
        opened(store, run)


def test_a_commit_that_fails_leaves_the_round_open(store: Store) -> None:
    run = started(store)
    opened(store, run)
    with pytest.raises(StateError):  # a mask that nobody has stored
        store.commit_round(
            run,
            1,
            candidate=candidate(CUT),
            macs_ratio=1,
            heads_kept_ratio=1,
            mean_accuracy=1,
        )
    assert [row.state for row in store.rounds(run)] == ["open"]
    assert store.candidates(run) == {}
    commit(store, run)


def test_the_tenth_round_is_later_than_the_ninth(store: Store) -> None:
    run = started(store)
    for number in (9, 10):
        opened(store, run, number)
        commit(store, run, number)
    last = store.last_committed(run)
    assert last is not None
    assert last[0] == 10


def test_evaluation_rounds_stand_beside_alignment(store: Store) -> None:
    run = started(store)
    opened(store, run)
    store.open_round(run, 1, kind="evaluate", base=BASE, mask=DENSE, quorum=1, deadline=1.0)
    assert [(row.kind, row.state) for row in store.rounds(run)] == [
        ("align", "open"),
        ("evaluate", "open"),
    ]
    assert store.last_committed(run) is None


# --- records -------------------------------------------------------------------------------------


def test_rejections_by_reason(store: Store) -> None:
    run = started(store)
    store.record_rejection(run, 1, None, RejectReason.LOST, "gone")
    store.record_rejection(run, 2, 1, RejectReason.SHAPE, "7 numbers")
    assert [(row.round, row.node, row.reason) for row in store.rejections(run)] == [
        (1, None, RejectReason.LOST),
        (2, 1, RejectReason.SHAPE),
    ]
    counts = store.rejection_counts(run)
    assert set(counts) == set(RejectReason)
    assert (counts[RejectReason.SHAPE], counts[RejectReason.STALE]) == (1, 0)


def test_traffic_adds_up_by_round_farm_and_kind(store: Store) -> None:
    run = started(store)
    opened(store, run)
    store.record_sent(run, 1, 1, 1, 100)
    store.record_sent(run, 1, 1, 2, 150)
    store.record_sent(run, 1, 1, 1, 10, "evaluate")
    store.record_reply(run, 1, 1, 2, 70, reply(), spooled(1))
    aligned, evaluated = store.traffic(run)
    assert (aligned.farm, aligned.requests, aligned.attempt) == ("farm-1", 2, 2)
    assert (aligned.bytes_down, aligned.bytes_up) == (250, 70)
    assert (evaluated.kind, evaluated.bytes_down, evaluated.bytes_up) == ("evaluate", 10, 0)


def test_reports_by_label(store: Store) -> None:
    run = started(store)
    assert store.record_report(run, "pruned", 2, 30, report())
    assert not store.record_report(run, "pruned", 2, 30, report(accuracy=1.0))
    assert store.record_report(run, "dense", 1, 30, report("rice"))
    assert [(row.label, row.farm) for row in store.reports(run)] == [
        ("dense", "rice"),
        ("pruned", "mango"),
    ]
    (row,) = store.reports(run, "pruned")
    assert (row.accuracy, row.f1, row.base, row.size_bytes, row.round) == (0.75, 0.7, NEXT, 30, 2)
    assert {(line.node, line.bytes_up) for line in store.traffic(run)} == {(1, 30), (2, 60)}


# --- the file ------------------------------------------------------------------------------------


def test_a_reader_in_another_connection_sees_commits_and_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "fieldfed.db"
    with Store.open(path) as writer:
        run = started(writer)
        with Store.open(path, read_only=True) as reader:
            opened(writer, run)
            assert len(reader.rounds(run)) == 1
            with pytest.raises(StateError, match="readonly"):
                reader.finish_run(run, "done")
    with Store.open(path, read_only=True) as reader:  # also without a writer
        assert len(reader.farms(run)) == 2


def test_a_reader_does_not_create_a_database(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="start the server once"):
        Store.open(tmp_path / "none.db", read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fieldfed.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StateError, match=r"fieldfed\.db"):
        Store.open(path)


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fieldfed.db"
    Store.open(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for read_only in (False, True):
        with pytest.raises(StateError, match="install the newer fieldfed"):
            Store.open(path, read_only=read_only)


def test_an_older_database_is_brought_up_to_date_by_a_writer_only(tmp_path: Path) -> None:
    path = tmp_path / "fieldfed.db"
    sqlite3.connect(path).close()
    path.touch()
    with pytest.raises(StateError, match="start the server once"):
        Store.open(path, read_only=True)
    with Store.open(path) as store:
        assert store.runs() == []


def test_the_settings_of_the_connection(store: Store) -> None:
    pragmas = {
        name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_migration_that_fails_is_rolled_back_whole() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    broken = (*MIGRATIONS, ("CREATE TABLE extra (x)", "this is no SQL"))
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, broken)
    assert version_of(connection) == len(MIGRATIONS)
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert "extra" not in tables
    assert "runs" in tables
    mended = (*MIGRATIONS, ("CREATE TABLE extra (x)",))
    migrate(connection, mended)
    assert version_of(connection) == len(mended)
    connection.close()


# Forks a process per line of input, each to be killed, for the imports take longer than the test.
COMMITTERS = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_store as t

def commit_for_ever():
    store = t.Store.open(Path(sys.argv[1]))
    run = t.started(store)
    for number in range(1, 100000):
        t.opened(store, run, number)
        if number == 1:
            print(os.getpid(), flush=True)
        for node in (1, 2):
            reply = t.reply(f"farm{node}", round=number)
            store.record_reply(run, number, node, 1, 5, reply, t.spooled(node))
        t.commit(store, run, number, t.CUT)

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        commit_for_ever()
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_killed_at_any_instant_every_round_is_wholly_there_or_not(tmp_path: Path) -> None:
    path, here = tmp_path / "fieldfed.db", Path(__file__).parent
    committers = subprocess.Popen(
        [sys.executable, "-c", COMMITTERS, str(path), str(here), str(here.parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with committers:
        assert committers.stdin is not None
        assert committers.stdout is not None
        for pause in np.linspace(0.0, 0.1, 9):
            committers.stdin.write(b"go\n")
            committers.stdin.flush()
            victim = int(committers.stdout.readline())
            time.sleep(pause)
            os.kill(victim, signal.SIGKILL)
            assert committers.stdout.readline() == b"gone\n"
            with Store.open(path) as store:
                assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
                assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
                _check_rounds(store)
    assert committers.returncode == 0


def _check_rounds(store: Store) -> None:
    last = store.latest_run()
    assert last is not None
    rounds, candidates = store.rounds(last.run), store.candidates(last.run)
    scores = store.scores(last.run)
    assert [row.round for row in rounds] == list(range(1, len(rounds) + 1))
    for row in rounds:
        committed = row.state == "committed"
        assert committed or row.round == len(rounds)
        assert (row.round in candidates) == committed
        assert len(scores.get(row.round, [])) == (2 if committed else 0)
        assert (row.participants == 2) == committed
        assert len(store.replies(last.run, row.round)) <= 2
