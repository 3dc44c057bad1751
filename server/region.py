"""The port of a region at which its centre leaves orders and takes sealed answers.

    python -P -m server.region FOLDER

A process of its own, like the hub: mutual TLS with certificates of the region's own authority, and
only the one named ``centre`` in ``[region]`` is heard. It touches the desk (server/region_desk.py)
and nothing else: no farm, no image, no store can be reached from here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import grpc

from common import hub_pb2, hub_pb2_grpc
from common.config import ServerConfig
from common.errors import ConfigError, FieldfedError, ProtocolError
from common.services import RegionConfig
from common.settings import load_settings
from server.identity import ServerFiles
from server.issued import Revocations
from server.listener import OPTIONS, caller, files_for, listen
from server.region_desk import Desk
from server.region_record import MAX_ORDER_BYTES
from server.service import run_service, until_told

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
        name, serial = caller(context)
        if name != self._centre or self._revoked.holds(serial):
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
    listen(server, config.host, config.port, files, "region")
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
    await serve_region(settings.region, folder, files_for(settings, folder), until_told())


if __name__ == "__main__":
    run_service(lambda folder: asyncio.run(_main(folder)), log)
