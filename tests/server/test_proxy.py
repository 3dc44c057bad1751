"""The line by which a TCP proxy says who calls, and the door that believes it."""

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import server.proxy
from client.door import Conversation, ask
from common.door import CHECK, DoorConfig
from common.errors import LinkError, ProtocolError
from server.members import address_of
from server.proxy import LINE_BYTES, UNKNOWN, announced
from tests.lab.door import LabDoor, Link, stranger
from tests.lab.proxy import LINE, Saying
from tests.waiting import wait_until


@given(address=st.ip_addresses(), port=st.integers(0, 65_535))
@settings(deadline=None)
def test_every_address_is_heard(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    other = "192.0.2.1" if address.version == 4 else "2001:db8::1"
    line = f"PROXY TCP{address.version} {address} {other} {port} 443\r\n".encode()
    assert announced(line) == str(address)
    assert len(line) <= LINE_BYTES


@given(line=st.binary(max_size=LINE_BYTES))
@settings(deadline=None)
def test_anything_else_is_an_address_or_an_error(line: bytes) -> None:
    with suppress(ProtocolError):
        assert announced(line) == UNKNOWN or ipaddress.ip_address(announced(line))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\r\n",
        b"PROXY\r\n",
        b"PROXY TCP4\r\n",
        LINE[:-2],
        LINE.replace(b"TCP4", b"TCP6"),
        LINE.replace(b"TCP4", b"UDP4"),
        LINE.replace(b"203.0.113.7", b"farm"),
        LINE.replace(b" 443", b""),
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\n",
    ],
)
def test_what_is_no_such_line(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        announced(line)


def test_a_proxy_may_not_know() -> None:
    assert announced(b"PROXY UNKNOWN\r\n") == UNKNOWN
    assert announced(b"PROXY UNKNOWN ::1 ::1 1 2\r\n") == UNKNOWN


def test_a_door_that_believes_is_reached_from_its_own_machine_alone() -> None:
    with pytest.raises(ValidationError, match="who reaches the door past the proxy"):
        DoorConfig(host="0.0.0.0", proxy_port=443)


def test_farms_are_told_the_port_of_the_proxy() -> None:
    config = DoorConfig(port=8443, proxy_port=443, names=("farms.example.org",))
    assert address_of(config, "[door]") == "farms.example.org:443"
    assert address_of(DoorConfig(names=("farms.example.org",)), "[door]").endswith(":8443")


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Saying:
    proxy = Saying()
    monkeypatch.setattr(LabDoor, "before", (proxy.before,))
    return proxy


@pytest.fixture
def door(tmp_path: Path, saying: Saying) -> Iterator[LabDoor]:
    with Link().running() as link, LabDoor(tmp_path, link).running() as running:
        yield running


def test_strangers_are_counted_where_they_call_from(
    door: LabDoor, saying: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.door.STRANGERS_PER_ADDRESS", 1)
    with Conversation(door.address, stranger()) as one:
        with pytest.raises(LinkError), Conversation(door.address, stranger()) as two:
            two.ask(CHECK, b"")
        saying.line = LINE.replace(b"203.0.113.7", b"203.0.113.8")
        with pytest.raises(LinkError, match="401"), Conversation(door.address, stranger()) as two:
            two.ask(CHECK, b"")
        with pytest.raises(LinkError, match="401"):
            one.ask(CHECK, b"")


def test_who_comes_past_the_proxy_is_not_let_in(
    door: LabDoor, caplog: pytest.LogCaptureFixture
) -> None:
    assert door.config.door is not None
    inside = f"127.0.0.1:{door.config.door.port}"
    with caplog.at_level(logging.WARNING), pytest.raises(LinkError):
        ask(inside, door.member().tls(), CHECK)
    wait_until(lambda: "take proxy_port away" in caplog.text, 10, "what to do")
    ask(door.address, door.member().tls(), CHECK)


def test_who_does_not_say_the_line_is_cut_off(
    door: LabDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.proxy, "LINE_SECONDS", 0.2)
    assert door.config.door is not None
    with socket.create_connection(("127.0.0.1", door.config.door.port), timeout=20) as line:
        line.sendall(b"PROXY TC")
        assert line.recv(10) == b""


def test_a_port_that_is_taken_meanwhile_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.proxy.ProxyListener(
            "127.0.0.1", taken.getsockname()[1], tls, lambda _: asyncio.Protocol()
        )
