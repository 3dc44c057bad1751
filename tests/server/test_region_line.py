"""The way from a centre to a region over mutual TLS: who is let in, and what a cut line costs."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from common.config import NetworkConfig, RoundConfig, ServerConfig
from common.errors import ConfigError, LinkError
from common.messages import HelloReply
from common.processes import free_port
from common.services import RegionConfig, RegionEntry
from server import region, region_line
from server.cli import app
from server.enrol import enrol
from server.identity import Authority
from server.members import authority_of, certified, hosts_of
from server.region import serve_region
from server.region_desk import Desk
from server.region_line import Heard, RegionLine, heard, known_regions, request_of
from server.region_record import HELLO, sealed
from server.registry import Registry
from tests.lab.hub import START_SECONDS
from tests.server.test_region_record import KEY, order
from tests.waiting import wait_until

CENTRE = "coop"


class Site:
    """A region that listens, and a centre that was admitted, in two folders."""

    def __init__(self, root: Path) -> None:
        self.folder, self.centre = root / "north", root / "centre"
        port = free_port("127.0.0.1")
        self.region = ServerConfig(
            server=NetworkConfig(name="north"), region=RegionConfig(centre=CENTRE, port=port)
        )
        self.entry = RegionEntry(
            name="north", address=f"127.0.0.1:{port}", member=Path("north.member")
        )
        self.config = ServerConfig(server=NetworkConfig(name=CENTRE), regions=(self.entry,))
        member = certified(self.region, self.folder, request_of(self.config, self.centre))
        (self.centre / "north.member").write_text(member.model_dump_json())

    def line(self, **settings: Any) -> RegionLine:
        config = self.config.model_copy(update=settings)
        (known,) = known_regions(config, self.centre)
        assert isinstance(known.line, RegionLine)
        return known.line

    def desk(self) -> Desk:
        return Desk.at(self.folder)

    def answer(self, data: bytes) -> None:
        with self.desk() as desk:
            desk.answer(order(), data, refusal=False)

    def introduce(self) -> None:
        with Registry.open(self.folder) as registry, self.desk() as desk:
            hello = HelloReply(farm="north", examples=300, classes=9)
            desk.introduce(sealed(hello, "north", CENTRE, HELLO, registry.keys))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    with listening(made):
        yield made


@contextmanager
def listening(site: Site) -> Iterator[None]:
    """The region's port, in a thread, while the context is open."""
    config, folder = site.region, site.folder
    assert config.region is not None
    authority = authority_of(config, folder)
    authority.renew_server(hosts_of(config))
    loop, ready, until = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    served = serve_region(config.region, folder, authority.server_credentials(), until, ready.set)
    thread = threading.Thread(target=lambda: loop.run_until_complete(served), daemon=True)
    thread.start()
    assert ready.wait(START_SECONDS)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(until.set)
        thread.join(START_SECONDS)
        loop.close()


@pytest.fixture(autouse=True)
def _empty_desk(site: Site) -> None:
    with site.desk() as desk:
        desk._change("DELETE FROM answers")
        desk._change("DELETE FROM orders")


def test_an_order_is_left_and_its_answer_taken(site: Site) -> None:
    line = site.line()
    assert line.take(KEY, 1) is None
    line.give(order().to_bytes())
    with site.desk() as desk:
        current = desk.current()
    assert current is not None
    assert current.key == KEY
    answer = bytes(range(256)) * 4096  # several pieces
    site.answer(answer)
    assert line.take(KEY, 1) == answer
    assert line.take(KEY, 1) == answer
    line.close()


def test_a_cut_answer_is_taken_on_from_where_it_was(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = bytes(range(256)) * 8192
    site.answer(answer)
    line, offsets = site.line(), []
    real = line._stub.Take

    class Cut(grpc.RpcError):  # type: ignore[misc]
        pass

    def take(asked: Any, timeout: float) -> Iterator[Any]:
        offsets.append(asked.offset)
        for number, piece in enumerate(real(asked, timeout=timeout)):
            yield piece
            if number == 1 and len(offsets) < 3:
                raise Cut

    monkeypatch.setattr(line._stub, "Take", take)
    for _ in range(2):
        with pytest.raises(LinkError):
            line.take(KEY, 1)
    assert line.take(KEY, 1) == answer
    assert offsets == [0, 2 * region.PIECE_BYTES, 4 * region.PIECE_BYTES]
    line.close()


def test_what_is_no_order_is_refused_at_the_door(site: Site) -> None:
    line = site.line()
    with pytest.raises(LinkError, match="not a message"):
        line.give(b"garbage")
    line.close()


def test_an_order_that_is_too_large_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "MAX_ORDER_BYTES", 1_000_000)
    line = site.line()
    with pytest.raises(LinkError, match="over 1 MB"):
        line.give(bytes(2_000_000))
    line.close()


def test_an_answer_that_is_too_large_is_refused(site: Site) -> None:
    site.answer(bytes(5000))
    line = site.line(rounds=RoundConfig(max_reply_bytes=4000))
    with pytest.raises(LinkError, match=r"5000 bytes as an answer; 4000 may come"):
        line.take(KEY, 1)
    line.close()


def test_a_farm_of_the_region_is_not_let_in(site: Site, tmp_path: Path) -> None:
    """It has a certificate of the same authority, and another name."""
    named = site.config.model_copy(update={"server": NetworkConfig(name="apple")})
    member = certified(site.region, site.folder, request_of(named, tmp_path))
    (tmp_path / "north.member").write_text(member.model_dump_json())
    (known,) = known_regions(named, tmp_path)
    said = "'apple' is not the centre of this region"
    with pytest.raises(LinkError, match=said):
        known.line.take(KEY, 1)
    with pytest.raises(LinkError, match=said):
        known.line.give(order().to_bytes())
    known.line.close()
    with site.desk() as desk:
        assert desk.current() is None


def test_a_stranger_with_another_authority_is_not_let_in(site: Site, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "identity", "north", [])
    path = request_of(site.config, site.centre)
    key = (site.centre / "centre" / "key.pem").read_bytes()
    ca = Authority.open(site.folder / "identity").server_credentials().ca
    line = RegionLine(site.entry.address, ca, key, other.sign(path.read_bytes()), 1000)
    with pytest.raises(LinkError):
        line.take(KEY, 1)
    line.close()


def test_a_region_with_another_authority_is_not_believed(site: Site, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "identity", "north", [])
    key = (site.centre / "centre" / "key.pem").read_bytes()
    certificate = json.loads((site.centre / "north.member").read_text())["certificate"].encode()
    ca = other.server_credentials().ca
    line = RegionLine(site.entry.address, ca, key, certificate, 1000)
    with pytest.raises(LinkError):
        line.take(KEY, 1)
    line.close()


def test_a_revoked_centre_is_put_out(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with listening(site):
        line = site.line()
        assert line.take(KEY, 1) is None
        Authority.open(site.folder / "identity").revoke(CENTRE)

        def refused() -> bool:
            try:
                line.take(KEY, 1)
            except LinkError as error:
                return "is revoked" in str(error)
            return False

        wait_until(refused, 30, "the revocation")
        line.close()


def test_a_port_where_nobody_is_says_so(site: Site) -> None:
    free = site.entry.model_copy(update={"address": f"127.0.0.1:{free_port('127.0.0.1')}"})
    line = site.line(regions=(free,))
    with pytest.raises(LinkError, match=free.address):
        line.take(KEY, 1)
    line.close()
    with pytest.raises(LinkError):
        line.take(KEY, 1)


def test_no_farm_is_enrolled_under_the_name_of_the_centre(site: Site) -> None:
    with pytest.raises(ConfigError, match="this region's centre"):
        enrol(site.region, site.folder, CENTRE, 1.0)


# --- memberships ---------------------------------------------------------------------------------


def _no_regions(site: Site) -> None:
    known_regions(site.config.model_copy(update={"regions": ()}), site.centre)


def _other_region(site: Site) -> None:
    site.line(regions=(site.entry.model_copy(update={"name": "south"}),))


def _other_key(site: Site) -> None:
    path = site.centre / "centre" / "key.pem"
    kept = path.rename(path.with_name("kept.pem"))
    try:
        request_of(site.config, site.centre)
        site.line()
    finally:
        kept.replace(path)


def _no_member(site: Site) -> None:
    site.line(regions=(site.entry.model_copy(update={"member": Path("none.member")}),))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (_no_regions, r"no \[\[regions\]\]"),
        (_other_region, "region 'south': .* of 'coop' in network 'north'"),
        (_other_key, "region 'north': .* another key"),
        (_no_member, "no membership at"),
    ],
)
def test_a_membership_that_does_not_fit_is_named(
    site: Site, wrong: Callable[[Site], None], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        wrong(site)


# --- commands ------------------------------------------------------------------------------------


def test_check_tells_who_answers(site: Site) -> None:
    assert heard(site.config, site.centre) == [
        Heard("north", None, "it answers, and waits for its farms")
    ]
    site.introduce()
    (answer,) = heard(site.config, site.centre)
    assert answer.hello is not None
    assert answer.hello.examples == 300


def test_the_commands_of_a_centre(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_line, "CALL_SECONDS", 5.0)
    (site.centre / "server.toml").write_text(
        f'[server]\nname = "{CENTRE}"\n\n[[regions]]\nname = "north"\n'
        f'address = "{site.entry.address}"\nmember = "north.member"\n'
    )
    done = CliRunner().invoke(app, ["region", "request", str(site.centre)])
    assert done.exit_code == 0
    assert "coop.csr" in done.output
    site.introduce()
    done = CliRunner().invoke(app, ["region", "check", str(site.centre), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.output) == [
        {"region": "north", "images": 300, "backbones": 0, "fault": None}
    ]
    with site.desk() as desk:
        desk._change("DELETE FROM answers")
    done = CliRunner().invoke(app, ["region", "check", str(site.centre)])
    assert isinstance(done.exception, LinkError)
    assert "waits for its farms" in done.output
