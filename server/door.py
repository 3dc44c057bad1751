"""The front door: the one port by which farms on other machines reach the network.

    python -P -m server.door FOLDER

A process of its own. SuperLink has one port for everything, and whoever reaches that may start
runs, so it listens on this machine alone; the door passes on what a farm may say
(server/passage.py) and nothing else. TLS 1.2 or newer with the network's own certificate; a farm
shows the certificate that the network's authority has given it. A device without one may ask to
join, and no more.

HTTP/1.1 is read by h11, through uvicorn: one strict parser, and what is passed on is written anew.
A TCP proxy may stand before it (server/proxy.py); TLS still ends here.
Whoever is silent, slow or many is cut off. Revoked farms are cut off within a second.
"""

import asyncio
import contextlib
import logging
import ssl
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol

from common import certificates
from common.config import ServerConfig
from common.door import DoorConfig
from common.errors import ConfigError, FieldfedError, LaunchError, ProtocolError
from common.processes import require_free_port
from common.settings import load_settings
from common.topics import RESERVED
from server.enrol import Enrolment
from server.identity import Authority
from server.issued import Issued, Revocations, record
from server.members import authority_of, hosts_of
from server.nodes import Nodes
from server.passage import HEAD_BYTES, Caller, Passage
from server.proxy import ProxyListener
from server.service import run_service, until_told

log = logging.getLogger("server.door")  # also where this module is the program

IDLE_SECONDS, HEAD_SECONDS = 75, 15.0
STRANGERS, STRANGERS_PER_ADDRESS = 64, 8
LOOK_SECONDS = 0.5
RENEW_SECONDS = 3600.0
READY_SECONDS = 0.05


class Guests:
    """Who is connected, and how many may be."""

    def __init__(
        self, config: DoorConfig, passage: Passage, revoked: Revocations, path: Path
    ) -> None:
        self.passage = passage
        self._config, self._revoked, self._path = config, revoked, path
        self._here: dict[DoorProtocol, Caller] = {}
        self._count: Counter[str] = Counter()

    def enter(self, guest: "DoorProtocol", caller: Caller) -> bool:
        """Let somebody in; False: too many are here."""
        if len(self._here) >= self._config.connections or self._crowded(caller):
            return False
        self._here[guest] = caller
        self._count.update(_counted(caller))
        if caller.farm is not None and self._revoked.lacks(caller.serial):
            self._list(caller)
        return True

    def leave(self, guest: "DoorProtocol") -> None:
        """A connection has ended."""
        caller = self._here.pop(guest, None)
        if caller is not None:
            self._count.subtract(_counted(caller))
            self._count += Counter()  # those at zero are forgotten

    def put_out(self) -> None:
        """End the connections of farms that are revoked."""
        for guest, caller in list(self._here.items()):
            if self.passage.leaves(caller):
                continue  # it is revoked by its own wish, and waits for the answer
            if caller.farm is not None and self.passage.revoked(caller):
                guest.transport.abort()

    def _list(self, caller: Caller) -> None:
        """Write down a farm that joined after the backup that this server came back from.

        Its certificate is ours; were it not in the list, nobody could revoke it.
        """
        if caller.farm is None or caller.expires is None or caller.farm in RESERVED:
            return
        given = Issued(
            farm=caller.farm,
            serial=f"{caller.serial:x}",
            key=caller.key,
            issued=datetime.now(UTC).replace(microsecond=0),
            expires=caller.expires,
        )
        try:
            record(self._path, given)
        except FieldfedError as error:
            log.error("farm %s is a member and not in the list: %s", caller.farm, error)
            return
        log.warning("farm %s joined after the backup of this server; it is listed", caller.farm)

    def _crowded(self, caller: Caller) -> bool:
        if caller.farm is not None:
            return self._count[f"farm {caller.farm}"] >= self._config.connections_per_farm
        crowd = self._count["strangers"] >= STRANGERS
        return crowd or self._count[f"at {caller.address}"] >= STRANGERS_PER_ADDRESS


def _counted(caller: Caller) -> list[str]:
    if caller.farm is not None:
        return [f"farm {caller.farm}"]
    return ["strangers", f"at {caller.address}"]


class DoorProtocol(H11Protocol):
    """A connection: who it is, and how long it may take to say what it wants."""

    announced: str | None = None
    """Whose connection it is, where a proxy has said so."""
    _patience: asyncio.TimerHandle | None = None

    @property
    def guests(self) -> Guests:
        """Shared by all connections."""
        return cast(Guests, self.config.app)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """TLS is agreed upon, so the certificate is known."""
        super().connection_made(transport)
        caller = caller_of(transport, self.announced)
        if not self.guests.enter(self, caller):
            log.warning("too many connections of %s", caller.farm or caller.address)
            transport.abort()
            return
        self.app = cast(Any, partial(self.guests.passage, caller))
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._calm()
        self.guests.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request; its head has to be there in time."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._be_patient()
        else:
            self._calm()

    def _be_patient(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def caller_of(transport: asyncio.BaseTransport, announced: str | None = None) -> Caller:
    """Who has connected; TLS has checked the certificate, if one was shown."""
    address = announced or (transport.get_extra_info("peername") or ("?",))[0]
    tls = transport.get_extra_info("ssl_object")
    data = None if tls is None else tls.getpeercert(binary_form=True)
    if data is None:
        return Caller(address)
    certificate = x509.load_der_x509_certificate(data)
    try:
        farm = certificates.common_name(certificate.subject)
    except ProtocolError:
        return Caller(address)
    key = certificate.public_key()
    if not certificates.is_name(farm) or not certificates.is_p256(key):
        return Caller(address)
    return Caller(
        address,
        farm,
        certificate.serial_number,
        certificates.fingerprint(key),
        certificate.not_valid_after_utc,
    )


class Door:
    """The door of a server's folder.

    Args:
        settings: of the server.
        state_dir: of the server.

    Raises:
        ConfigError: there is no [door] in the settings, or a name of it is none.
        StateError: the authority is damaged.
    """

    def __init__(self, settings: ServerConfig, state_dir: Path) -> None:
        if settings.door is None:
            raise ConfigError("server.toml has no [door]; give it a name there")
        self.config, self._settings = settings.door, settings
        self._identity = state_dir / "identity"
        self._authority: Authority = authority_of(settings, state_dir)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._set_tls_up()
        listed = self._identity / "issued.jsonl"
        self._revoked = Revocations(listed)
        self._passage = Passage(
            self.config,
            f"http://{settings.server.host}:{settings.server.port}",
            Enrolment(settings, state_dir),
            Nodes(state_dir),
            self._revoked,
            lambda: self._shown,
        )
        self._guests = Guests(self.config, self._passage, self._revoked, listed)

    async def serve(self, until: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
        """Let farms in until the event is set; ``ready`` is called once they are.

        Raises:
            LaunchError: the port is taken.
        """
        require_free_port(self.config.host, self.config.port, "[door] port")
        server = _Server(self._server_config())
        proxied = self.config.proxy_port is not None
        serving = asyncio.create_task(server.serve([] if proxied else None))  # []: on no socket
        working = [asyncio.create_task(self._look_after())]
        try:
            while not server.started:
                if serving.done():
                    raise LaunchError(f"the door cannot listen on port {self.config.port}")
                await asyncio.sleep(READY_SECONDS)
            if proxied:
                working.append(asyncio.create_task(self._listener(server).serve()))
            log.info("farms come in at %s:%d", self.config.host, self.config.port)
            ready()
            await until.wait()
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            server.should_exit = True
            with contextlib.suppress(SystemExit):
                await serving
            await self._passage.close()

    def _listener(self, server: uvicorn.Server) -> ProxyListener:
        def protocol(address: str) -> DoorProtocol:
            made = DoorProtocol(server.config, server.server_state, server.lifespan.state)
            made.announced = address
            return made

        where = self.config.host, self.config.port
        try:
            return ProxyListener(*where, self._tls, protocol)
        except OSError as error:
            raise LaunchError(
                f"the door cannot listen at {where[0]}:{where[1]}: {error}"
            ) from error

    def _server_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            cast(Any, self._guests),
            host=self.config.host,
            port=self.config.port,
            http=DoorProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=HEAD_BYTES,
            ssl_context_factory=lambda _config, _default: self._tls,
        )

    def _set_tls_up(self) -> None:
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        self._tls.num_tickets = 0  # every connection shows its certificate anew
        self._tls.set_alpn_protocols(["http/1.1"])
        self._tls.verify_mode = ssl.CERT_OPTIONAL
        self._load()

    def _load(self) -> None:
        """The certificate that is shown from now on, renewed if it is time."""
        self._authority.renew_server(hosts_of(self._settings))
        files = self._authority.server_credentials()
        names = (self._identity / "server.crt", self._identity / "server.key")
        self._tls.load_cert_chain(*names)
        self._tls.load_verify_locations(cadata=files.ca.decode())
        self._shown = ssl.PEM_cert_to_DER_cert(files.certificate.decode())

    async def _look_after(self) -> None:
        """Cut off who is revoked, and keep the own certificate young."""
        renewed = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._guests.put_out()
            if asyncio.get_running_loop().time() > renewed + RENEW_SECONDS:
                renewed = asyncio.get_running_loop().time()
                try:
                    self._load()
                except FieldfedError as error:
                    log.error("the door's certificate cannot be renewed: %s", error)


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def _main(folder: Path) -> None:
    door = Door(load_settings(ServerConfig, folder / "server.toml"), folder)
    await door.serve(until_told())


if __name__ == "__main__":
    run_service(lambda folder: asyncio.run(_main(folder)), log)
