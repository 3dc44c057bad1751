"""What a device is told, and what it makes of it."""

import json
import logging
from typing import Any

import pytest

from client.faults import DEATHS, WELL_SECONDS, WITHIN_SECONDS, Faults
from client.notices import Notices
from client.teller import plain
from common.errors import DiskError
from common.processes import Child


class Device:
    """Writes down what it was told to do."""

    def __init__(self) -> None:
        self.did: list[Any] = []
        self.full = False
        self.notices = Notices(
            "valley",
            "oak",
            "stable",
            wake=self.wake,
            news=lambda: self.did.append("news"),
            install=self.did.append,
            seen=lambda: 5,
            clock=lambda: 1000.0,
        )

    def wake(self) -> None:
        if self.full:
            raise DiskError("no space left")
        self.did.append("wake")

    def hear(self, topic: str, body: Any, retained: bool = False) -> list[Any]:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        before = len(self.did)
        self.notices.take(f"fieldfed/valley/{topic}", payload, retained)
        return self.did[before:]


MODEL = {"channel": "stable", "counter": 6, "version": 3}


def test_what_it_subscribes_to() -> None:
    assert Device().notices.topics == (
        "fieldfed/valley/rounds",
        "fieldfed/valley/models/stable",
        "fieldfed/valley/oak/command/install",
    )


def test_a_round_wakes_it_until_its_deadline() -> None:
    oak = Device()
    assert oak.hear("rounds", {"run": 1, "round": 2, "deadline": 1001}) == ["wake"]
    assert oak.hear("rounds", {"run": 1, "round": 2, "deadline": 999}) == []
    oak.full = True  # which must not be raised: the broker would send it again
    assert oak.hear("rounds", {"run": 1, "round": 2, "deadline": 1001}) == []


def test_news_of_its_channel_are_looked_at_once() -> None:
    oak = Device()
    assert oak.hear("models/stable", MODEL, retained=True) == ["news"]
    assert oak.hear("models/stable", MODEL | {"counter": 5}) == []
    assert oak.hear("models/stable", MODEL | {"channel": "canary"}) == []
    assert oak.hear("models/canary", MODEL) == []


def test_an_order_is_taken_unless_it_would_come_again_and_again() -> None:
    oak = Device()
    assert oak.hear("oak/command/install", {"version": 7}) == [7]
    assert oak.hear("oak/command/install", {"version": 7}, retained=True) == []
    assert oak.hear("elm/command/install", {"version": 7}) == []


@pytest.mark.parametrize("topic", ["rounds", "models/stable", "oak/command/install"])
@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b"{}", {"version": 0, "deadline": -1}, b"x" * 70_000]
)
def test_what_cannot_be_read_is_left_out(
    topic: str, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert Device().hear(topic, body) == []
    assert "is left out" in caplog.text


# --- what is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("the disk of '/home/jo ann/state' is full", "the disk of a file is full"),
        ("see /var/log/x.log: or /tmp/a", "see a file: or a file"),
        ("macro-F1 0.900 and/or 3/4 of them", "macro-F1 0.900 and/or 3/4 of them"),
        ("x" * 900, "x" * 500),
    ],
)
def test_events_name_no_files(words: str, told: str) -> None:
    assert plain(words) == told


class Program(Child):
    """One that has a process id, and no more."""

    def __init__(self, name: str) -> None:
        self.name, self.number = name, 1

    @property
    def pid(self) -> int | None:
        return self.number


def test_a_program_that_keeps_dying_is_told_once_until_it_is_well_again() -> None:
    now, told = [0.0], list[tuple[str, int]]()
    faults = Faults(lambda *what: told.append(what), lambda: now[0])
    one, other = Program("camera"), Program("supernode")

    def die(program: Program, seconds: float) -> None:
        now[0] += seconds
        program.number += 1
        faults.look([one, other])

    faults.look([one, other])
    for _ in range(DEATHS + 3):
        die(one, 20)
    assert told == [("camera", DEATHS)]
    assert "camera" in faults.names
    now[0] += WELL_SECONDS
    faults.look([one, other])
    assert not faults.names
    for _ in range(DEATHS):
        die(one, 20)
    assert len(told) == 2
    for _ in range(3 * DEATHS):  # seldom: a server that goes away now and then
        die(other, WITHIN_SECONDS / (DEATHS - 1) + 1)
    assert len(told) == 2
