"""The port of a region at which its centre leaves orders and takes sealed answers.

    python -P -m server.region FOLDER

A process of its own, like the hub: mutual TLS with certificates of the region's own authority, and
only the one named ``centre`` in ``[region]`` is heard. It touches the desk (server/region_desk.py)
and nothing else: no farm, no image, no store can be reached from here.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import grpc

from common import hub_pb2, hub_pb2_grpc
from common.certificates import common_name, parse_certificate
from common.config import ServerConfig
from common.errors import ConfigError, FieldfedError, LaunchError, ProtocolError
from common.services import RegionConfig
from common.settings import load_settings
from server.hub import OPTIONS
from server.identity import ServerFiles
from server.issued import Revocations
from server.members import authority_of, hosts_of
from server.region_desk import Desk
from server.region_record import MAX_ORDER_BYTES
from server.registry import Registry
from server.service import run_service

log = logging.getLogger("server.region")  # also where this module is the program

PIECE_BYTES = 1 << 18
STALL_SECONDS = 60.0
Context: TypeAlias = grpc.aio.ServicerContext


class RegionService(hub_pb2_grpc.RegionServicer):
    """The calls of common/hub.proto."""

    def __init__(self, config: RegionConfig, state_dir: Path, revoked: Revocations) -> None:
        self._centre, self._state_dir, self._revoked = config.centre, state_dir, revoked
        self._clerk = ThreadPoolExecutor(1, "desk")

    async def Give(  # noqa: N802, D102
        self, request_iterator: AsyncIterator[hub_pb2.Piece], context: Context
    ) -> hub_pb2.Given:
        await self._require_centre(context)
        data = bytearray()
        async for piece in request_iterator:
            data += piece.data
            if len(data) > MAX_ORDER_BYTES:
                why = f"an order of over {MAX_ORDER_BYTES / 1e6:.0f} MB"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        try:
            await self._at_desk(lambda desk: desk.give(bytes(data)))
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:500])
        except FieldfedError as error:
            log.error("%s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the region's disk cannot be used")
        return hub_pb2.Given()

    async def Take(  # noqa: N802, D102
        self, request: hub_pb2.Question, context: Context
    ) -> None:
        await self._require_centre(context)
        try:
            data = await self._at_desk(lambda desk: desk.take(request.key, request.attempt))
        except FieldfedError as error:
            log.error("%s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the region's disk cannot be used")
        if data is None:
            return
        for start in range(request.offset, len(data), PIECE_BYTES):
            piece = hub_pb2.Piece(data=data[start : start + PIECE_BYTES], size=len(data))
            await asyncio.wait_for(context.write(piece), STALL_SECONDS)

    async def _at_desk(self, work: Callable[[Desk], bytes | None]) -> bytes | None:
        """SQLite belongs to a thread."""

        def done() -> bytes | None:
            with Desk.at(self._state_dir) as desk:
                return work(desk)

        return await asyncio.get_running_loop().run_in_executor(self._clerk, done)

    async def _require_centre(self, context: Context) -> None:
        """TLS has checked that the caller belongs to this network; it has to be the centre."""
        pem = context.auth_context()["x509_pem_cert"][0]
        shown = parse_certificate(pem, "the certificate")
        name = common_name(shown.subject)
        if name != self._centre or self._revoked.holds(shown.serial_number):
            why = "is revoked" if name == self._centre else "is not the centre of this region"
            log.warning("%s called and %s", name, why)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"'{name}' {why}")


async def serve_region(
    config: RegionConfig,
    state_dir: Path,
    files: ServerFiles,
    until: asyncio.Event,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the event is set.

    Args:
        config: where to listen, and who the centre is.
        state_dir: of the server.
        files: its certificate and key, and the network's authority.
        until: when to stop.
        ready: called once the centre is answered.

    Raises:
        LaunchError: the port is taken.
    """
    server = grpc.aio.server(options=OPTIONS)
    service = RegionService(config, state_dir, Revocations(state_dir / "identity" / "issued.jsonl"))
    hub_pb2_grpc.add_RegionServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    credentials = grpc.ssl_server_credentials(
        [(files.key, files.certificate)], root_certificates=files.ca, require_client_auth=True
    )
    try:
        server.add_secure_port(f"{config.host}:{config.port}", credentials)
    except RuntimeError as error:
        raise LaunchError(
            f"the region cannot listen on {config.host}:{config.port}: stop what does, or choose "
            "another port in [region]"
        ) from error
    await server.start()
    log.info("the centre '%s' leaves orders at %s:%d", config.centre, config.host, config.port)
    ready()
    try:
        await until.wait()
    finally:
        await server.stop(grace=2.0)


async def _main(folder: Path) -> None:
    settings = load_settings(ServerConfig, folder / "server.toml")
    if settings.region is None:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [region]; give it a port there")
    Registry.create(folder, settings.server.name).close()
    authority = authority_of(settings, folder)
    authority.renew_server(hosts_of(settings))
    until = asyncio.Event()
    for stop in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(stop, until.set)
    await serve_region(settings.region, folder, authority.server_credentials(), until)


if __name__ == "__main__":
    run_service(lambda folder: asyncio.run(_main(folder)), log)
