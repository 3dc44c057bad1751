"""A full disk ends no run and loses no finished training; a wrong clock changes nothing."""

import itertools
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client.state
import server.models
import server.spool
from common.errors import DiskError
from common.files import write_atomically
from common.messages import AlignRequest, Reply, Request
from server.store import Store
from tests.lab.network import Lab


class Disk:
    """In place of a function that writes: full from write ``first`` on, until there is room."""

    def __init__(self, first: int, write: Callable[..., Any] = write_atomically) -> None:
        self._first, self._write, self._writes, self.room = first, write, 0, False

    def __call__(self, path: Path, *arguments: Any, **options: Any) -> Any:
        self._writes += 1
        if self._writes >= self._first and not self.room:
            raise DiskError(f"cannot write '{path}': No space left on device")
        return self._write(path, *arguments, **options)


def digests(lab: Lab, run: int) -> list[str]:
    with lab.store() as store:
        return [row.digest for row in store.candidates(run).values()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run comes to when nothing happens."""
    lab = Lab(tmp_path_factory.mktemp("calm"), prune_heads=0.4)
    lab.run()
    return digests(lab, 1)


@pytest.mark.parametrize(
    ("module", "write", "first"),
    [
        (server.spool, "append", 2),
        (server.spool, "append", 4),
        (server.models, "write_atomically", 3),
        (server.models, "write_atomically", 4),
        (server.models, "write_atomically", 5),
    ],
)
def test_a_run_goes_on_when_the_servers_disk_has_room_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calm: list[str],
    module: Any,
    write: str,
    first: int,
) -> None:
    lab = Lab(tmp_path, prune_heads=0.4)
    disk = Disk(first, getattr(module, write))
    monkeypatch.setattr(module, write, disk)
    with pytest.raises(DiskError, match="No space left"):
        lab.run()
    with lab.store() as store:
        assert store.run(1).state == "running"
    disk.room = True
    lab.run()
    with lab.store() as store:
        assert [run.state for run in store.runs()] == ["done"]
    assert digests(lab, 1) == calm


@pytest.mark.parametrize("damage", [b"", b"half a candidate", None])
def test_a_smaller_model_that_did_not_reach_the_disk_is_made_again_from_its_step(
    tmp_path: Path, calm: list[str], damage: bytes | None
) -> None:
    lab = Lab(tmp_path, prune_heads=0.4)

    def power_cut(_node: int, request: Request, _reply: Reply) -> None:
        if isinstance(request, AlignRequest) and request.base == calm[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(fault=power_cut)
    with lab.store() as store:
        assert digests(lab, 1) == calm[:1]
        assert store.candidates(1)[1].mask != store.run(1).mask, "it was not a prune event"
        candidate = Path(store.candidates(1)[1].path)
    candidate.unlink() if damage is None else candidate.write_bytes(damage)
    aligned = [request for _, request in lab.run().requests if isinstance(request, AlignRequest)]
    assert {request.round for request in aligned} == {2}
    assert digests(lab, 1) == calm


def test_a_full_database_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    with Store.open(tmp_path / "fieldfed.db") as store:
        pages = store._select("PRAGMA page_count")[0][0]
        store._select(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DiskError, match="full"):
            store.start_run("{}" * 100_000, 0, "aa" * 32, "{}")
    with sqlite3.connect(tmp_path / "fieldfed.db") as whole:
        assert whole.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_farm_sends_what_it_cannot_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: list[str]
) -> None:
    lab, disk = Lab(tmp_path, prune_heads=0.4), Disk(1)
    monkeypatch.setattr(client.state.FarmState, "save_reply", lambda *_: disk(tmp_path / "x", b""))
    lab.run()
    found = digests(lab, 1)
    assert len(found) == len(calm)
    # what coding lost of the first updates could not be kept either: later rounds lack it
    assert found[0] == calm[0]
    with lab.store() as store:
        assert store.run(1).state == "done"
        assert not any(store.rejection_counts(1).values())


def test_a_farm_that_can_keep_nothing_says_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path, settings={"rounds": {"quorum": 0.5}})
    keep = client.state.FarmState.save_backbone

    def save(state: client.state.FarmState, *arguments: Any, **rules: Any) -> None:
        if state.folder.name == "farm1":
            raise DiskError(f"cannot write '{state.folder}': No space left on device")
        keep(state, *arguments, **rules)

    monkeypatch.setattr(client.state.FarmState, "save_backbone", save)
    lab.run()
    with lab.store() as store:
        assert store.run(1).state == "done"
        assert {row.farm for row in store.replies(1, 1)} == {"farm0", "farm2"}
        details = {row.detail for row in store.rejections(1)}
    assert details == {"internal: farm1: its disk is full or its state folder cannot be used"}


def test_a_clock_that_jumps_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: list[str]
) -> None:
    lab, jumps = Lab(tmp_path, prune_heads=0.4), itertools.cycle([0.0, 1e6, -3e6, 40.0])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    lab.run()
    assert digests(lab, 1) == calm
