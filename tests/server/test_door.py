"""The front door: what passes, what does not, and who is let in."""

import contextlib
import importlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from fastapi.routing import APIRoute
from flwr.proto.fleet_pb2 import ActivateNodeResponse

import server.door
import server.identity
import server.passage
from client.door import Conversation, Way, ask, check, look
from common import certificates
from common.door import CHECK, FLEET, JOIN, LEAVE, RENEW, Checking
from common.errors import LaunchError, LinkError, StateError
from common.protocols import PROTOCOL
from common.release import release
from server.nodes import Nodes, activated, certified_farm
from tests.lab.door import LabDoor, Link, stranger
from tests.waiting import wait_until

KEY = "Zm9vYmFyYmF6"
PULL = FLEET + "pull-messages"


@pytest.fixture
def link() -> Iterator[Link]:
    with Link().running() as running:
        yield running


@pytest.fixture
def door(tmp_path: Path, link: Link) -> Iterator[LabDoor]:
    with LabDoor(tmp_path, link).running() as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabDoor]:
    """One for all that is refused anyway; farm apple is registered."""
    with Link().running() as link, LabDoor(tmp_path_factory.mktemp("door"), link).running() as door:
        register(door)
        yield door


def fleet(
    door: LabDoor, farm: str = "apple", key: str = KEY, path: str = PULL, body: bytes = b""
) -> bytes:
    """What a farm's SuperNode says, registered or not."""
    return say(
        door,
        f"POST {path} HTTP/1.1\r\nHost: x\r\nFlwr-Public-Key: {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body,
        farm,
    )


def register(door: LabDoor, farm: str = "apple", key: str = KEY) -> None:
    assert status(fleet(door, farm, key, FLEET + "register-node")) == 200


def say(door: LabDoor, data: bytes, farm: str | None = "apple") -> bytes:
    """Send bytes and return all that comes back until the door ends, or has answered."""
    context = stranger() if farm is None else door.member(farm).tls()
    with opened(door, context) as tls:
        with contextlib.suppress(OSError):  # it may have heard enough before the end
            tls.sendall(data)
        return answer_on(tls)


@contextlib.contextmanager
def opened(door: LabDoor, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """A connection, to write on what one likes."""
    with (
        socket.create_connection(("127.0.0.1", door.port), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        yield tls


def answer_on(tls: ssl.SSLSocket) -> bytes:
    """One answer: its head, and as much body as it says."""
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while b"\r\n\r\n" not in data:
            more = tls.recv(65_536)
            if not more:
                return data
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if b"content-length:" in line]
        while lengths and len(body) < int(lengths[0].split(b":")[1]):
            more = tls.recv(65_536)
            if not more:
                break
            body += more
        return head + b"\r\n\r\n" + body
    return data


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


# --- what passes ---------------------------------------------------------------------------------


def test_a_member_reaches_the_fleet_api_and_nothing_of_the_connection_goes_on(
    door: LabDoor, link: Link
) -> None:
    register(door)
    answer = say(
        door,
        f"POST {PULL} HTTP/1.1\r\nHost: inside\r\nFlwr-Public-Key: {KEY}\r\n"
        "Flwr-Timestamp: now\r\nContent-Type: application/protobuf\r\nCookie: a=b\r\n"
        "X-Forwarded-For: 10.0.0.1\r\nConnection: keep-alive, flwr-drop\r\nKeep-Alive: 9\r\n"
        "Content-Length: 3\r\n\r\nabc".encode(),
    )
    assert status(answer) == 200
    assert body_of(answer) == b"abc"
    assert b"x-secret" not in answer.lower()
    heard = link.heard[-1]
    assert (heard.method, heard.path, heard.body) == ("POST", PULL, b"abc")
    names = {name.lower() for name in heard.headers}
    assert names <= {
        *("host", "accept", "accept-encoding", "connection", "user-agent"),
        *("content-type", "content-length", "flwr-public-key", "flwr-timestamp"),
    }
    assert heard.headers["Host"] == f"127.0.0.1:{link.port}"


def test_bodies_of_flowers_size_stream_both_ways(door: LabDoor, link: Link) -> None:
    register(door)
    body = bytes(range(256)) * 20_480  # 5 MiB
    assert body_of(fleet(door, body=body)) == body
    assert link.heard[-1].body == body
    too_long = body + bytes(server.passage.BODY_BYTES - len(body) + 1)
    assert status(fleet(door, body=too_long)) in (413, 0)  # 0: torn while we still sent
    assert link.heard[-1].body == body


def test_many_requests_on_one_connection(door: LabDoor, link: Link) -> None:
    register(door)
    head = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nFlwr-Public-Key: {KEY}\r\nContent-Length: 2\r\n\r\n"
    with opened(door, door.member().tls()) as tls:
        for number in range(20):
            tls.sendall(head.encode() + b"%02d" % number)
            assert body_of(answer_on(tls)) == b"%02d" % number


def test_no_superlink_is_said(tmp_path: Path) -> None:
    with LabDoor(tmp_path, Link()).running() as door:
        register_status = status(fleet(door, path=FLEET + "register-node"))
        assert register_status == 503
        assert not check(door.way()).superlink


# --- what does not -------------------------------------------------------------------------------


def routes() -> list[tuple[str, str]]:
    """Every route of SuperLink, from its installed source: method and path."""
    found = [("GET", "/docs"), ("GET", "/openapi.json")]
    for module, name in (
        ("flwr.superlink.routers.control.router", "router"),
        ("flwr.superlink.routers.fleet.router", "router"),
        ("flwr.supercore.routers.health.router", "router"),
        ("flwr.supercore.routers.runtime", "router"),
        ("flwr.supercore.routers.runtime", "responses_router"),
    ):
        router = getattr(importlib.import_module(module), name)
        for route in router.routes:
            assert isinstance(route, APIRoute)
            found += [(method, route.path) for method in route.methods or ()]
    return sorted(found)


def test_of_superlinks_routes_the_fleet_api_alone_is_let_through(door: LabDoor, link: Link) -> None:
    register(door)
    all_routes, passed = routes(), set()
    assert sum(path.startswith("/v1/control/") for _, path in all_routes) > 30
    assert sum("/runtime/" in path for _, path in all_routes) > 5
    context = door.member().tls()
    for method, path in all_routes:
        before = len(link.heard)
        with opened(door, context) as tls:
            tls.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nFlwr-Public-Key: {KEY}\r\n"
                "Content-Length: 0\r\n\r\n".encode()
            )
            said = status(answer_on(tls))
        assert (said == 200) == (len(link.heard) > before), (method, path, said)
        if said == 200:
            passed.add((method, path))
    assert passed == {(m, p) for m, p in all_routes if p.startswith(FLEET)}
    assert len(passed) == 12
    assert {method for method, _ in passed} == {"POST"}


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/start-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/%2e%2e%2fcontrol/start-run",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet/./pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/pull%2dmessages",
        "/v1/fleet/pull-messages;x=/v1/control",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/PULL-MESSAGES",
        "/V1/FLEET/pull-messages",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet\\..\\control\\start-run",
        "http://127.0.0.1/v1/control/start-run",
        "http://127.0.0.1/v1/fleet/pull-messages",
        "https://127.0.0.1:8000/v1/fleet/pull-messages",
        "/v1/fleet/",
        "/v1/fleet",
        "/",
        "*",
        "/v1/join/../control/start-run",
        "/v1/join?x",
        "/v1/joins",
        "/health",
    ],
)
def test_a_path_that_is_not_written_plainly_goes_no_further(shared: LabDoor, target: str) -> None:
    before = len(shared.link.heard)
    answer = fleet(shared, path=target)
    assert status(answer) in (400, 404), answer
    assert len(shared.link.heard) == before


HEAD = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nFlwr-Public-Key: {KEY}\r\n"
HIDDEN = "POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (
            "both lengths",
            f"{HEAD}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}",
        ),
        (
            "two lengths",
            f"{HEAD}Content-Length: 0\r\nContent-Length: {len(HIDDEN)}\r\n\r\n{HIDDEN}",
        ),
        ("a list of lengths", f"{HEAD}Content-Length: 0, {len(HIDDEN)}\r\n\r\n{HIDDEN}"),
        ("chunks", f"{HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}"),
        ("odd chunks", f"{HEAD}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{HIDDEN}"),
        ("a space before the colon", f"{HEAD}Content-Length : 0\r\n\r\n{HIDDEN}"),
        ("a signed length", f"{HEAD}Content-Length: +0\r\n\r\n{HIDDEN}"),
        ("a hexadecimal length", f"{HEAD}Content-Length: 0x0\r\n\r\n{HIDDEN}"),
        ("no length", f"{HEAD}\r\n{HIDDEN}"),
        ("a folded header", f"{HEAD}X: a\r\n Content-Length: 5\r\n\r\n{HIDDEN}"),
        ("a bare line feed", f"{HEAD}X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}"),
        ("a null", f"{HEAD}X: a\x00b\r\nContent-Length: 0\r\n\r\n{HIDDEN}"),
        (
            "an upgrade",
            f"{HEAD}Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n{HIDDEN}",
        ),
        (
            "a websocket",
            f"{HEAD}Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n",
        ),
        ("an expectation", f"{HEAD}Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"),
        ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("HTTP/0.9", f"POST {PULL}\r\n\r\n"),
        ("a tunnel", "CONNECT 127.0.0.1:8000 HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("another method", HEAD.replace("POST", "GET") + "Content-Length: 0\r\n\r\n"),
        ("two keys", f"{HEAD}Flwr-Public-Key: b3RoZXI=\r\nContent-Length: 0\r\n\r\n"),
        ("a long head", f"{HEAD}X: {'a' * 20_000}\r\nContent-Length: 0\r\n\r\n"),
        ("no HTTP", "\x16\x03\x01\x02\x00hello\r\n\r\n"),
    ],
)
def test_no_request_hides_in_another(shared: LabDoor, name: str, data: str) -> None:
    before = len(shared.link.heard)
    answer = say(shared, data.encode("latin-1"))
    assert status(answer) in (400, 401, 404, 405, 411, 431, 0), answer
    time.sleep(0.05)  # what was hidden would follow
    new = shared.link.heard[before:]
    assert not new, (name, new)


def test_two_requests_in_a_row_are_two_requests(door: LabDoor, link: Link) -> None:
    """Pipelining is plain HTTP; the second is judged for itself."""
    register(door)
    before = len(link.heard)
    answer = say(door, f"{HEAD}Content-Length: 0\r\n\r\n{HIDDEN}".encode())
    assert status(answer) == 200
    wait_until(lambda: len(link.heard) > before, 10, "the first")
    time.sleep(0.1)
    assert [heard.path for heard in link.heard[before:]] == [PULL]


# --- who is let in -------------------------------------------------------------------------------


def test_a_stranger_gets_nothing_but_the_way_to_join(door: LabDoor, link: Link) -> None:
    for path in (PULL, FLEET + "register-node", RENEW, LEAVE, CHECK):
        assert (
            status(
                say(
                    door,
                    f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode(),
                    None,
                )
            )
            == 401
        )
    head = f"POST {JOIN} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}"
    assert status(say(door, head.encode(), None)) == 400
    assert not link.heard


def test_which_release_is_there_is_told_to_whom_knows_the_question(door: LabDoor) -> None:
    """An older farm takes no answer with more in it than it knows."""
    way = door.way()
    assert way.tls is not None
    plain = json.loads(ask(door.address, way.tls(), CHECK))
    assert plain.keys() == {"farm", "expires", "superlink"}
    checked, said = look(way, Checking(versions=True))
    assert checked.protocol == PROTOCOL
    assert checked.release == release()
    assert abs(said.ahead) < 5
    with pytest.raises(LinkError, match=r"\(400\).*update fieldfed"):
        ask(door.address, way.tls(), CHECK, b'{"what": "else"}')


def test_a_certificate_of_another_network_or_one_that_is_over_ends_at_tls(
    door: LabDoor, link: Link, tmp_path: Path
) -> None:
    other = LabDoor(tmp_path / "other", link).member()
    context = other.tls()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(LinkError, match="does not take this farm's certificate"):
        ask(door.address, context, CHECK)
    identity = door.identity("old")
    now = datetime.now(UTC)
    past = now - timedelta(hours=2)
    certificate = certificates.issue(
        "old",
        identity._key.public_key(),
        door.authority._issuer,
        certificates.Validity(now - timedelta(hours=20), now - timedelta(hours=1)),
        ExtendedKeyUsageOID.CLIENT_AUTH,
    )
    ca = door.authority.server_credentials().ca
    identity.accept(certificates.pem(certificate), ca, past)
    with pytest.raises(LinkError, match="does not take this farm's certificate"):
        ask(door.address, identity.tls(past), CHECK)
    with pytest.raises(StateError, match="expired"):
        identity.tls()
    assert not link.heard


def test_the_servers_own_certificate_is_no_farms(door: LabDoor) -> None:
    folder = door.folder / "identity"
    context = stranger()
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with pytest.raises(LinkError):
        ask(door.address, context, CHECK)


def test_old_tls_is_refused(door: LabDoor) -> None:
    context = stranger()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(LinkError):
        ask(door.address, context, CHECK)


def test_a_revoked_farm_is_out_at_once_and_the_others_stay(
    door: LabDoor, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    register(door, "apple")
    register(door, "rice", "cmljZQ==")
    apple = door.member("apple")
    with Conversation(door.address, apple.tls()) as idle:
        idle.ask(CHECK, b"")
        assert door.authority.revoke("apple") >= 1
        with pytest.raises(LinkError, match=r"revoked|cannot be reached"):
            idle.ask(CHECK, b"")
    with pytest.raises(LinkError, match="is revoked; ask the operator"):
        check(Way(door.address, apple.tls))
    with pytest.raises(LinkError, match="is revoked"):
        ask(door.address, apple.tls(), RENEW, apple.request())
    before = len(link.heard)
    head = f"{HEAD}Content-Length: 0\r\n\r\n".encode()
    with opened(door, apple.tls()) as tls:
        tls.sendall(head)
        assert status(answer_on(tls)) in (403, 0)
    assert len(link.heard) == before
    assert status(fleet(door, "rice", "cmljZQ==")) == 200
    assert _said_to_be_out(caplog) == ["apple"]


def test_a_revoked_farm_that_asks_before_its_connection_is_cut_is_in_the_log_as_well(
    door: LabDoor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(door)
    apple = door.member("apple")
    monkeypatch.setattr(server.door.Guests, "put_out", lambda _: None)
    with Conversation(door.address, apple.tls()) as idle:
        idle.ask(CHECK, b"")
        door.authority.revoke("apple")
        for _ in range(2):
            with pytest.raises(LinkError, match="is revoked; ask the operator"):
                ask(door.address, apple.tls(), CHECK)
    assert _said_to_be_out(caplog) == ["apple"]


def _said_to_be_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line.split()[1] for line in lines if "is revoked: it is refused" in line]


def test_a_connection_in_the_middle_of_a_request_is_cut_too(door: LabDoor, link: Link) -> None:
    register(door)
    apple = door.member()
    with opened(door, apple.tls()) as tls:
        tls.sendall(f"{HEAD}Content-Length: 1000000\r\n\r\n".encode() + bytes(1000))
        time.sleep(0.3)
        door.authority.revoke("apple")
        assert status(answer_on(tls)) in (0, 403)  # 403: it had not begun yet


def test_who_joined_after_the_backup_that_was_restored_is_listed_and_can_be_revoked(
    door: LabDoor, caplog: pytest.LogCaptureFixture
) -> None:
    path = door.folder / "identity" / "issued.jsonl"
    rice = door.member("rice")
    before = path.read_bytes()
    apple = door.member("apple")
    known = door.authority.issued()[-1]
    path.write_bytes(before)
    for _ in range(2):
        check(Way(door.address, apple.tls))
    check(Way(door.address, rice.tls))
    listed = door.authority.issued()
    assert [one.farm for one in listed] == ["rice", "apple"]
    assert (listed[-1].serial, listed[-1].key) == (known.serial, known.key)
    assert listed[-1].expires == known.expires
    assert door.authority.revoke("apple") == 1
    with pytest.raises(LinkError, match=r"revoked|cannot be reached|ended the connection"):
        check(Way(door.address, apple.tls))


def test_without_the_list_of_certificates_nobody_is_let_in(door: LabDoor) -> None:
    way = door.way()
    check(way)
    path = door.folder / "identity" / "issued.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept + b"damaged\n")
    with pytest.raises(LinkError):
        check(way)
    path.write_bytes(kept)
    check(way)


# --- a farm speaks as itself ---------------------------------------------------------------------


def test_a_farm_cannot_use_the_supernode_of_another(door: LabDoor, link: Link) -> None:
    register(door, "apple")
    before = len(link.heard)
    for path in (PULL, FLEET + "register-node", FLEET + "push-messages"):
        assert status(fleet(door, "rice", KEY, path)) == (403 if path != "" else 0)
    assert status(fleet(door, "rice", "unknown+")) == 401
    assert len(link.heard) == before
    assert status(fleet(door, "apple")) == 200


@pytest.mark.parametrize("node", [1, 127, 128, 2**32, 2**63 + 5, 2**64 - 1])
def test_the_node_that_superlink_gives_is_written_down_with_its_farm(
    tmp_path: Path, link: Link, node: int
) -> None:
    answer = ActivateNodeResponse(node_id=node).SerializeToString()
    assert activated(answer) == node
    link.answers[FLEET + "activate-node"] = answer
    with LabDoor(tmp_path, link).running() as door:
        register(door, "rice")
        assert status(fleet(door, "rice", path=FLEET + "activate-node")) == 200
        signed = node - 2**64 if node >= 2**63 else node
        wait_until(lambda: certified_farm(tmp_path, signed) == "rice", 10, "the note")
    assert certified_farm(tmp_path, 77) is None
    with LabDoor(tmp_path, link).running() as door:  # and after a restart
        assert status(fleet(door, "rice")) == 200
        assert status(fleet(door, "apple")) == 403


def test_a_farm_that_starts_again_and_again_takes_no_room(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    assert nodes.claim("other", "rice")
    for number in range(100):
        assert nodes.claim(f"key {number}", "apple")
    known = [number for number in range(100) if nodes.owner(f"key {number}") == "apple"]
    assert known == list(range(92, 100))
    assert nodes.owner("other") == "rice"


def test_damaged_notes_mean_that_supernodes_register_again(tmp_path: Path) -> None:
    (tmp_path / "nodes.json").write_text("{")
    assert Nodes(tmp_path).owner("key") is None
    assert certified_farm(tmp_path, 1) is None


@pytest.mark.parametrize("body", [b"", b"\x08", b"\x10\x01", b"\x08" + b"\xff" * 12, b"html"])
def test_an_answer_that_is_none_names_no_node(body: bytes) -> None:
    assert activated(body) is None


# --- limits --------------------------------------------------------------------------------------


def test_who_says_nothing_is_cut_off(door: LabDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.door, "HEAD_SECONDS", 0.3)
    for first in (b"", b"POST /v1/fl"):
        assert say(door, first) == b""


def test_who_sends_too_slowly_is_cut_off(
    door: LabDoor, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(door)
    monkeypatch.setattr(server.passage, "STALL_SECONDS", 0.3)
    answer = say(door, f"{HEAD}Content-Length: 10\r\n\r\nabc".encode())
    assert status(answer) == 408


def test_a_farm_has_so_many_connections_and_strangers_have_fewer(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.door, "STRANGERS_PER_ADDRESS", 2)
    with LabDoor(tmp_path, link, connections_per_farm=2).running() as door:
        apple, rice = door.member("apple").tls(), door.member("rice").tls()
        with Conversation(door.address, apple) as one, Conversation(door.address, apple):
            with pytest.raises(LinkError):
                ask(door.address, apple, CHECK)
            ask(door.address, rice, CHECK)
            one.ask(CHECK, b"")
        wait_until(lambda: works(door, apple), 10, "room again")
        with (
            Conversation(door.address, stranger()),
            Conversation(door.address, stranger()),
            pytest.raises(LinkError, match="too many connections"),
        ):
            ask(door.address, stranger(), CHECK)


def works(door: LabDoor, tls: ssl.SSLContext) -> bool:
    try:
        ask(door.address, tls, CHECK)
    except LinkError:
        return False
    return True


def test_a_farm_that_asks_too_much_waits_and_holds_nobody_up(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.passage, "BURST_REQUESTS", 5.0)
    with LabDoor(tmp_path, link, requests_per_second=10).running() as door:
        register(door, "apple")
        register(door, "rice", "cmljZQ==")
        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(fleet, door) for _ in range(14)]
            assert status(fleet(door, "rice", "cmljZQ==")) == 200
            assert all(status(future.result()) == 200 for future in futures)
        assert time.monotonic() - started > 0.8


def test_the_doors_certificate_is_renewed_without_a_restart(
    tmp_path: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.door, "RENEW_SECONDS", 0.0)
    with LabDoor(tmp_path, link).running() as door:
        with Conversation(door.address, door.member().tls()) as before:
            shown = before.certificate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.identity, "SERVER_LIFE", timedelta(days=10))
            door.authority.renew_server(["elsewhere.example"])

        def renewed() -> bool:
            with Conversation(door.address, door.member().tls()) as now:
                return now.certificate != shown

        wait_until(renewed, 20, "another certificate")


def test_a_taken_port_is_said(door: LabDoor) -> None:
    other = LabDoor(door.folder, door.link, port=door.port)
    with pytest.raises(LaunchError, match=r"in use.*\[door\] port"), other.running():
        pass
