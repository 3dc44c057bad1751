"""A database is looked at, whoever has it open, and nothing on the disk changes by that."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common.sqlite
from common.sqlite import fault_in, held, is_damage, is_held, looking

WRITES = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute(f"PRAGMA locking_mode = {sys.argv[2]}")
db.execute(f"PRAGMA journal_mode = {sys.argv[3]}")
db.execute("CREATE TABLE rows (number)")
for number in range(100):
    db.execute("INSERT INTO rows VALUES (?)", (number,))
print("written", flush=True)
sys.stdin.read()
db.close()
"""


@contextmanager
def writer(path: Path, locking: str = "NORMAL", journal: str = "WAL") -> Iterator[None]:
    """A process that has written a database and keeps it open; killed where the test raises."""
    command = [sys.executable, "-c", WRITES, str(path), locking, journal]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        try:
            yield
        except BaseException:
            process.kill()
            raise
        process.communicate("")


class PowerCut(Exception):  # noqa: N818
    """Ends a writer without a farewell."""


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def rows(path: Path) -> int:
    with looking(path) as db:
        return int(db.execute("SELECT count(*) FROM rows").fetchone()[0])


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_it_is_read_whole_open_or_closed(tmp_path: Path, journal: str) -> None:
    path = tmp_path / "a.db"
    with writer(path, journal=journal):
        before = contents(tmp_path)
        assert fault_in(path, 10) is None
        assert rows(path) == 100
        assert not held(path)
        assert contents(tmp_path) == before
    before = contents(tmp_path)
    assert list(before) == ["a.db"]
    assert fault_in(path, 10) is None
    assert rows(path) == 100
    assert contents(tmp_path) == before, "no log, no index"


def test_what_a_killed_writer_left_in_its_log_is_read_and_left_there(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with pytest.raises(PowerCut), writer(path):
        raise PowerCut
    before = contents(tmp_path)
    assert len(before) == 3
    assert rows(path) == 100
    assert contents(tmp_path) == before


def test_one_that_a_process_has_for_itself_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with writer(path, "EXCLUSIVE"):
        assert held(path)
        with pytest.raises(sqlite3.OperationalError) as error:
            fault_in(path, 10)
        assert is_held(error.value)
        assert not is_damage(error.value)
    assert not held(path)
    assert not held(tmp_path / "none.db")


def test_nothing_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with writer(path):
        pass
    with looking(path) as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("CREATE TABLE more (number)")


def test_a_check_that_takes_too_long_is_given_up(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(whole[:-1000] + b"\5" * 1000)
    assert fault_in(path, 10) is not None
    monkeypatch.setattr(common.sqlite, "_STEPS", 1)
    assert fault_in(path, -1) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.db"
    with writer(path):
        pass
    return path.read_bytes()


@settings(deadline=None, max_examples=50)
@given(place=st.integers(0, 8191), data=st.binary(min_size=1, max_size=4096))
def test_whatever_is_damaged_nothing_but_an_error_of_sqlite_is_raised(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, place: int, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.db"
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])
    before = contents(path.parent)
    with suppress(sqlite3.Error):
        fault_in(path, 10)
    assert contents(path.parent) == before
