"""Locks that processes hold against each other."""

import threading
from pathlib import Path

import pytest

from common.errors import StateError
from common.files import only_one


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / "lock"
    with only_one(lock), pytest.raises(StateError, match="wait until it ends"), only_one(lock):
        pass
    with only_one(lock):
        pass


def test_who_waits_gets_it_when_the_other_is_done(tmp_path: Path) -> None:
    lock, order = tmp_path / "lock", list[str]()

    def other() -> None:
        with only_one(lock, seconds=60):
            order.append("the other")

    with only_one(lock):
        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.5)
        order.append("the first")
    waiting.join(60)
    assert order == ["the first", "the other"]
