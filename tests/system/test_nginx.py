"""A real nginx with deploy/nginx/fieldfed.conf: what passes, what does not, and for whom.

The routes are SuperLink's own list, so a Flower that has new ones is asked about those as well.
"""

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client.identity import FarmIdentity
from common.config import ServerConfig
from common.processes import Child, free_port, stop_all, wait_for_port
from common.programs import flower_environment
from server.identity import Authority
from server.launch import serve
from tests.waiting import wait_until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx" / "fieldfed.conf"
GUIDE = CONFIGURATION.parents[1] / "guides" / "cloud-vm.md"
STUNNEL = shutil.which("stunnel")
LOCAL, NAME = "127.0.0.1", "farms.example.org"
FLEET = "/v1/fleet/pull-messages"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(NGINX is None, reason="'nginx' is not installed (nginx-light)"),
]

ROUTES = """
import json
from flwr.superlink.main import create_app, iter_route_contexts
routes = [one.route for one in iter_route_contexts(create_app().routes)]
print(json.dumps([[one.path, sorted(one.methods)] for one in routes]))
"""
AROUND = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 512; }}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/fieldfed.conf;
}}
"""


@dataclass
class Upstream:
    """A server that remembers what reached it, and says yes to all."""

    server: ThreadingHTTPServer
    seen: list[tuple[str, str]] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def take(self) -> list[tuple[str, str]]:
        seen, self.seen[:] = list(self.seen), []
        return seen


@contextmanager
def upstream() -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                piece = self.rfile.read(min(left, 10_000))
                if not piece:
                    return
                left -= len(piece)
                found.begun.set()
            found.seen.append((self.command, self.path))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = handle_any  # noqa: N815

        def log_message(self, *_arguments: object) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer((LOCAL, 0), Handler)
    server.daemon_threads = True
    found = Upstream(server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Front:
    """A running nginx."""

    folder: Path
    port: int

    def context(self, member: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.folder / "identity" / "ca.crt")
        if member:
            farm = self.folder / "farm"
            context.load_cert_chain(farm / "certificate.pem", farm / "key.pem")
        return context

    def ask(self, method: str, path: str, body: bytes | None = b"", *, member: bool = True) -> int:
        """The status that a request gets."""
        line = http.client.HTTPSConnection(
            LOCAL, self.port, timeout=30, context=self.context(member)
        )
        with closing(line):
            line.putrequest(method, path, skip_accept_encoding=True)
            if body is not None:
                line.putheader("Content-Length", str(len(body)))
            line.endheaders()
            if body:
                line.send(body)
            return line.getresponse().status


@contextmanager
def front(folder: Path, superlink: int, *, open_to_all: bool = False) -> Iterator[Front]:
    """The configuration as it is, but for ports, files and, where wanted, who is a stranger."""
    authority = Authority.create(folder / "identity", "valley", [LOCAL, NAME])
    farm = FarmIdentity.create(folder / "farm", "apple")
    farm.accept(authority.sign(farm.request()), (folder / "identity" / "ca.crt").read_bytes())
    port, text = free_port(), CONFIGURATION.read_text()
    changes = {
        "listen 443 ssl;": f"listen {LOCAL}:{port} ssl;",
        "listen [::]:443 ssl;": "",
        f"server {LOCAL}:8000;": f"server {LOCAL}:{superlink};",
        "/etc/fieldfed/front.crt": f"{folder}/identity/server.crt",
        "/etc/fieldfed/front.key": f"{folder}/identity/server.key",
        "/etc/fieldfed/ca.crt": f"{folder}/identity/ca.crt",
        "/var/log/nginx/fieldfed.log": f"{folder}/access.log",
    }
    if open_to_all:
        changes["default 1;"] = "default 0;"
    for before, after in changes.items():
        assert text.count(before) == 1, f"{before!r} is not there once"
        text = text.replace(before, after)
    (folder / "fieldfed.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder, user=user))
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    nginx = Child("nginx", lambda: command, folder / "nginx.log")
    try:
        nginx.start()
        wait_for_port(LOCAL, port, 30, nginx)
        yield Front(folder, port)
    finally:
        stop_all([nginx])


@dataclass
class Place:
    """nginx between a farm and a server that remembers."""

    front: Front
    superlink: Upstream


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        superlink = stack.enter_context(upstream())
        folder = tmp_path_factory.mktemp("front")
        yield Place(stack.enter_context(front(folder, superlink.port)), superlink)


@pytest.fixture(autouse=True)
def _nothing_from_before(place: Place) -> None:
    place.superlink.take()


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Every method and path that the installed SuperLink knows."""
    env = flower_environment(tmp_path_factory.mktemp("flower"))
    command = [sys.executable, "-P", "-c", ROUTES]
    done = subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    listed = json.loads(done.stdout.splitlines()[-1])
    return [(method, path) for path, methods in listed for method in methods]


def test_every_route_of_the_fleet_passes_and_no_other(
    place: Place, routes: list[tuple[str, str]]
) -> None:
    fleet = [one for one in routes if one[1].startswith("/v1/fleet/")]
    others = [one for one in routes if one not in fleet]
    assert {method for method, _ in fleet} == {"POST"}
    assert len(fleet) >= 12
    for room in ("/v1/control/", "/v1/runtime/", "/health", "/docs", "/openapi.json"):
        assert any(path.startswith(room) for _, path in others), room
    assert {place.front.ask(*one) for one in fleet} == {200}
    assert sorted(place.superlink.take()) == sorted(fleet)
    assert {one: place.front.ask(*one) for one in others} == dict.fromkeys(others, 404)
    assert place.superlink.take() == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_only_post_passes(place: Place, method: str) -> None:
    assert place.front.ask(method, FLEET) == 404
    assert place.superlink.take() == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/..;/control/start-run",
        "/v1/control/../fleet/pull-messages",
        "/v1/control/start-run%3f/../../fleet/pull-messages",
        "/v1/control/start-run#/../../fleet/pull-messages",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet/pull-messages?x=/v1/control/start-run",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages%0d%0aX:%20y",
        "/v1/fleet/PULL-MESSAGES",
        "/V1/FLEET/pull-messages",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet\\..\\control/start-run",
        "http://other.example/v1/control/start-run",
        "/v1/join",
        "/v1/join/../v1/control/start-run",
        "/",
    ],
)
def test_tricks_do_not_pass(place: Place, path: str) -> None:
    assert place.front.ask("POST", path) in {400, 404}
    assert place.superlink.take() == []


def test_a_stranger_is_refused(place: Place) -> None:
    assert place.front.ask("POST", FLEET, member=False) == 403
    assert place.superlink.take() == []


def test_flowers_largest_chunk_passes_and_a_larger_body_does_not(place: Place) -> None:
    assert place.front.ask("POST", "/v1/fleet/push-object", bytes(6_000_000)) == 200
    place.superlink.take()
    line = http.client.HTTPSConnection(
        LOCAL, place.front.port, timeout=30, context=place.front.context()
    )
    with closing(line):
        line.putrequest("POST", "/v1/fleet/push-object")
        line.putheader("Content-Length", "9000000")
        line.endheaders()
        assert line.getresponse().status == 413
    assert place.superlink.take() == []


def test_a_body_is_handed_on_while_it_arrives(place: Place) -> None:
    place.superlink.begun.clear()
    line = http.client.HTTPSConnection(
        LOCAL, place.front.port, timeout=30, context=place.front.context()
    )
    with closing(line):
        line.putrequest("POST", "/v1/fleet/push-object")
        line.putheader("Content-Length", "40000")
        line.endheaders()
        line.send(bytes(20_000))
        assert place.superlink.begun.wait(20)
        line.send(bytes(20_000))
        assert line.getresponse().status == 200


def test_nothing_is_said_without_tls(place: Place) -> None:
    with closing(http.client.HTTPConnection(LOCAL, place.front.port, timeout=30)) as line:
        line.request("POST", FLEET)
        assert line.getresponse().status == 400
    assert place.superlink.take() == []


def test_old_tls_is_refused(place: Place) -> None:
    context = place.front.context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((LOCAL, place.front.port), timeout=30) as line,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(line, server_hostname=LOCAL)


@contextmanager
def tunnel(folder: Path, port: int) -> Iterator[str]:
    """The farm's end, as the guide has it; yields the address that the farm is told."""
    found = re.search(r"```ini\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    text, local = found[1], free_port()
    for before, after in {
        "accept = 127.0.0.1:8000": f"accept = {LOCAL}:{local}",
        f"connect = {NAME}:443": f"connect = {LOCAL}:{port}",
        "/var/lib/fieldfed/farms/apple/state/identity": str(folder / "farm"),
    }.items():
        assert before in text, before
        text = text.replace(before, after)
    (folder / "stunnel.conf").write_text(f"foreground = yes\npid =\n{text}")
    command = [str(STUNNEL), str(folder / "stunnel.conf")]
    child = Child("stunnel", lambda: command, folder / "stunnel.log")
    try:
        child.start()
        wait_for_port(LOCAL, local, 30, child)
        yield f"{LOCAL}:{local}"
    finally:
        stop_all([child])


def works(folder: Path, *options: str) -> None:
    """Have a SuperNode ask for work twice."""
    command = ["flower-supernode", *options, "--host", LOCAL, "--port", str(free_port())]
    env = flower_environment(folder / "farm-state")
    node, log = Child("supernode", lambda: command, folder / "node.log", env), folder / "access.log"
    try:
        node.start()
        wait_until(
            lambda: log.read_text().count("POST /v1/fleet/pull-messages 200") > 1,
            90,
            f"{node.last_words(20)} {log.read_text()}: two polls",
        )
        assert "POST /v1/fleet/register-node 200" in log.read_text()
    finally:
        stop_all([node])


def test_a_supernode_works_through_it_where_superlink_asks_for_keys(tmp_path: Path) -> None:
    port = free_port()
    config = ServerConfig.model_validate({"server": {"port": port}})
    with (
        serve(config, tmp_path / "server"),
        front(tmp_path, port, open_to_all=True) as door,
    ):
        authority = ["--root-certificates", str(tmp_path / "identity" / "ca.crt")]
        works(tmp_path, "--superlink", f"{LOCAL}:{door.port}", *authority)


@pytest.mark.skipif(STUNNEL is None, reason="'stunnel' is not installed (stunnel4)")
def test_a_supernode_works_through_the_tunnel_of_the_guide(tmp_path: Path) -> None:
    port = free_port()
    config = ServerConfig.model_validate({"server": {"port": port}})
    with (
        serve(config, tmp_path / "server"),
        front(tmp_path, port) as door,
        tunnel(tmp_path, door.port) as address,
    ):
        works(tmp_path, "--superlink", address, "--insecure")
