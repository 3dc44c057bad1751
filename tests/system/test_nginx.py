"""A real nginx before the door: every test of the door once more, and what nginx adds.

What farms may say is decided by the door, with nginx before it as without.
"""

import http.client
import logging
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from client.door import Conversation
from common.door import CHECK
from common.errors import LinkError
from tests.lab.door import LabDoor, Link, stranger
from tests.server.test_door import *  # noqa: F403  every test of the door
from tests.server.test_door import works
from tests.system.nginx import LOCAL, behind_nginx, marks, nginx
from tests.waiting import wait_until

__all__ = ["behind_nginx"]
pytestmark = marks


def test_it_is_nginx_that_is_asked(door: LabDoor) -> None:
    assert works(door, door.member().tls())
    log = door.folder / "before" / "access.log"
    wait_until(lambda: log.exists() and log.read_text().startswith(LOCAL), 10, "a line of nginx")


def test_the_door_hears_who_calls(
    door: LabDoor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.door.STRANGERS_PER_ADDRESS", 0)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(LinkError),
        Conversation(door.address, stranger()) as one,
    ):
        one.ask(CHECK, b"")
    wait_until(lambda: f"too many connections of {LOCAL}" in caplog.text, 10, "the address")


def test_nothing_is_said_without_tls(door: LabDoor, link: Link) -> None:
    with (
        closing(http.client.HTTPConnection(LOCAL, door.port, timeout=30)) as line,
        pytest.raises((ConnectionError, http.client.HTTPException)),
    ):
        line.request("POST", CHECK)
        line.getresponse()
    assert not link.heard


def test_an_address_has_so_many_connections(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LabDoor, "before", (partial(nginx, most=3),))
    with LabDoor(tmp_path, link).running() as door, ExitStack() as stack:
        member = door.member().tls()
        for _ in range(3):
            stack.enter_context(Conversation(door.address, member)).ask(CHECK, b"")
        assert not works(door, member)
        stack.close()
        wait_until(lambda: works(door, member), 10, "room again")
