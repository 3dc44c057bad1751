"""Results on their way from the watcher to the outbox: each once, in order, whoever is killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import client.results
from client.results import MARK, Results
from common.errors import DiskError
from common.outbox import Outbox
from common.topics import Result


def live(folder: Path, point: int = 0, when: str = "never") -> None:
    """Hand results on in a process that is killed at the n-th put: before, after, or at the end."""
    if (child := os.fork()) == 0:
        try:
            _hand_on(folder, point, when)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.waitstatus_to_exitcode(status) == 0


def _hand_on(folder: Path, point: int, when: str) -> None:
    outbox, count = Outbox.open(folder / "outbox.db"), 0

    def put(result: Result, number: int) -> None:
        nonlocal count
        count += 1
        if when == "before" and count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        outbox.put("result", "farm/result", result.body(), (MARK, number))
        if when == "after" and count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    results = Results(folder / "results.jsonl", put, outbox.marked(MARK) or 0)
    while results.hand_on():
        pass
    if when == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


def line(number: int, **changes: Any) -> bytes:
    fields = {
        "image": f"{number}.jpg",
        "class": "scab",
        "likely": [{"class": "scab", "probability": 0.75}, {"class": "rot", "probability": 0.25}],
        "seconds": 0.1,
        "state": [number * 10**9, 1000],
        "number": number,
        "version": 3,
    }
    return b"\n" + json.dumps(fields | changes).encode()


def numbers(outbox: Outbox) -> list[int]:
    """Of the lines, which are in the time of the photographs here."""
    return [int(json.loads(one.payload)["taken"]) for one in outbox.waiting(100_000)]


@pytest.mark.parametrize("when", ["before", "after", "end"])
@pytest.mark.parametrize("point", [1, 2, 5])
def test_a_kill_at_any_point_loses_none_and_repeats_none(
    tmp_path: Path, point: int, when: str
) -> None:
    results = tmp_path / "results.jsonl"
    results.write_bytes(b"".join(line(number) for number in range(1, 7)))
    for at in (point, 1, 10**9):
        live(tmp_path, at, when)
    with results.open("ab") as file:
        file.write(line(7))
    live(tmp_path)
    with Outbox.open(tmp_path / "outbox.db") as outbox:
        assert numbers(outbox) == list(range(1, 8))
        assert outbox.marked(MARK) == 7


class World:
    """A watcher that writes, an agent that reads and is killed, and a disk full at times."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        self.kept: list[int] = []
        self.written: list[int] = []
        self.mark = 0
        self.full = False
        self.restart()

    def restart(self) -> None:
        self.results = Results(self.path, self.put, self.mark)

    def put(self, result: Result, number: int) -> None:
        if self.full:
            raise DiskError("no space left")
        assert result.taken == number
        self.kept.append(number)
        self.mark = number

    def write(self, **changes: Any) -> None:
        number = len(self.written) + 1
        self.written.append(number if "error" not in changes else -1)
        with self.path.open("ab") as file:
            file.write(line(number, **changes))

    def tear(self) -> None:
        with self.path.open("ab") as file:
            file.write(line(999)[:40])

    def rotate(self) -> None:
        # the watcher does so every 10 MB, long after all was read
        while self.read():
            pass
        if self.path.exists() and not self.full:
            self.path.replace(self.path.with_name("results.1.jsonl"))

    def read(self) -> bool:
        try:
            return self.results.hand_on()
        except DiskError:
            assert self.full
            return False

    def do(self, what: str) -> None:
        match what:
            case "write":
                self.write()
            case "unreadable":
                self.write(error="cannot be read")
            case "full" | "room":
                self.full = what == "full"
            case _:
                getattr(self, what)()


STEPS = st.sampled_from(
    ["write", "write", "write", "unreadable", "tear", "rotate", "read", "restart", "full", "room"]
)


@settings(deadline=None, max_examples=200)
@given(steps=st.lists(STEPS, max_size=60), most=st.integers(1, 5))
@example(steps=["write", "rotate", "write", "rotate", "write"], most=1).via("an inode comes again")
def test_whatever_happens_each_line_is_handed_on_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], most: int
) -> None:
    world = World(tmp_path_factory.mktemp("results"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.results, "MOST", most)
        for step in steps:
            world.do(step)
        world.full = False
        while world.read():
            pass
    assert world.kept == [one for one in world.written if one > 0]


def test_what_a_result_says_of_a_line(tmp_path: Path) -> None:
    kept: list[Result] = []
    path = tmp_path / "results.jsonl"
    path.write_bytes(line(1) + line(2, **{"class": None}) + line(3, likely=[]) + b"\n5\nno json")
    assert not Results(path, lambda result, _number: kept.append(result), 0).hand_on()
    assert kept == [
        Result(taken=1, label="scab", share=0.75, sure=True, version=3),
        Result(taken=2, label="scab", share=0.75, sure=False, version=3),
    ]
    assert "1.jpg" not in str(kept)


def test_half_a_line_waits_for_the_other_half(tmp_path: Path) -> None:
    kept: list[int] = []
    path, whole = tmp_path / "results.jsonl", line(2)
    path.write_bytes(line(1) + whole[:30])
    results = Results(path, lambda _result, number: kept.append(number), 0)
    results.hand_on()
    assert kept == [1]
    with path.open("ab") as file:
        file.write(whole[30:])
    results.hand_on()
    assert kept == [1, 2]


def test_there_are_no_results_yet(tmp_path: Path) -> None:
    assert not Results(tmp_path / "results.jsonl", lambda *_: pytest.fail("what?"), 0).hand_on()
