"""The relay encrypts what a SuperNode says, with the farm's certificate; and says what is wrong."""

import logging
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import client.relay
from client.door import Way
from client.relay import Relay
from common.door import CHECK, FLEET
from tests.lab.door import LabDoor, Link, stranger
from tests.waiting import wait_until

HEAD = (
    "POST {path} HTTP/1.1\r\nHost: x\r\nFlwr-Public-Key: a2V5\r\nContent-Length: {length}\r\n\r\n"
)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[LabDoor]:
    with Link().running() as link, LabDoor(tmp_path / "server", link).running() as running:
        yield running


def relay_of(way: Way, state: Path, poll_seconds: float | None = None) -> Relay:
    return Relay(way.address, state, poll_seconds, way.tls)


def say(relay: Relay, path: str, body: bytes = b"") -> bytes:
    """One plain request, as a SuperNode makes it."""
    host, _, port = relay.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as near:
        near.sendall(HEAD.format(path=path, length=len(body)).encode() + body)
        answer = b""
        try:
            while not answer.endswith(body) or b"\r\n\r\n" not in answer:
                more = near.recv(65_536)
                if not more:
                    break
                answer += more
        except ConnectionError:
            pass
        return answer


@pytest.mark.parametrize("poll_seconds", [None, 0.1])
def test_a_supernode_needs_no_tls_of_its_own(
    door: LabDoor, tmp_path: Path, poll_seconds: float | None
) -> None:
    body = bytes(range(256)) * 4000
    with relay_of(door.way(), tmp_path / "state", poll_seconds) as relay:
        assert say(relay, FLEET + "register-node").startswith(b"HTTP/1.1 200")
        answer = say(relay, FLEET + "push-object", body)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(body)
        assert relay.counters.sent > len(body)
        assert relay.counters.received > len(body)
    assert [heard.path for heard in door.link.heard] == [
        FLEET + "register-node",
        FLEET + "push-object",
    ]


def test_a_supernode_that_hangs_up_leaves_nothing_open(door: LabDoor, tmp_path: Path) -> None:
    with relay_of(door.way(), tmp_path / "state") as relay:
        for _ in range(30):  # more than a farm may have open at once
            assert say(relay, FLEET + "register-node").startswith(b"HTTP/1.1 200")


def test_a_renewed_certificate_is_shown_without_a_restart(door: LabDoor, tmp_path: Path) -> None:
    identity = door.member()
    way = door.way()
    with relay_of(Way(door.address, way.tls), tmp_path / "state") as relay:
        assert say(relay, CHECK).startswith(b"HTTP/1.1 200")
        door.authority.revoke("apple")
        wait_until(lambda: not say(relay, CHECK).startswith(b"HTTP/1.1 200"), 10, "no")
        ca = door.authority.server_credentials().ca
        identity.accept(door.authority.sign(identity.request()), ca)
        assert say(relay, CHECK).startswith(b"HTTP/1.1 200")


def test_what_is_wrong_with_the_server_is_said_once(
    door: LabDoor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = LabDoor(tmp_path / "other", door.link).member()
    with relay_of(Way(door.address, other.tls), tmp_path / "state") as relay:
        for _ in range(3):
            assert say(relay, CHECK) == b""
    assert caplog.text.count("not of the network that this farm joined") == 1


def test_an_expired_certificate_is_said_and_nothing_is_sent(
    door: LabDoor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = door.member()
    later = datetime.now(UTC) + timedelta(days=500)
    with relay_of(Way(door.address, lambda: identity.tls(later)), tmp_path / "s") as relay:
        assert say(relay, CHECK) == b""
        assert relay.counters.sent == 0
    assert "expired on" in caplog.text
    assert "join the network again" in caplog.text


def test_a_server_without_tls_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, door: LabDoor
) -> None:
    plain = Way(f"127.0.0.1:{door.link.port}", stranger)
    with relay_of(plain, tmp_path / "state") as relay:
        assert say(relay, CHECK) == b""
    assert "does not speak TLS; check the port" in caplog.text


def test_the_door_is_patient_for_longer_than_the_relay_relies_on(door: LabDoor) -> None:
    from server.door import IDLE_SECONDS

    assert client.relay.TLS_STALE_SECONDS < IDLE_SECONDS
