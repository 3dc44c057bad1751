"""The hub: devices ask it what a channel names, fetch the objects they lack, and report.

    python -P -m server.hub FOLDER

A process of its own, on a port of its own: mutual TLS with certificates of the network's authority
(server/identity.py), so every caller is a farm by name. It reads what the registry holds, renews
channels and keeps reports; what it hands over is signed, so it need not be believed.

Offers are served out of memory; one thread looks into the registry every second. An object is read
piece by piece as the device takes it, so a slow device costs one piece of memory.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from common import hub_pb2, hub_pb2_grpc
from common.compress import compressed_piece
from common.config import ServerConfig
from common.errors import ConfigError, first_fault
from common.manifest import InstallReport
from common.objects import PIECE_BYTES, Objects, is_digest
from common.services import HubConfig
from common.settings import load_settings
from server.bodies import bodies_of
from server.identity import ServerFiles
from server.issued import Revocations
from server.listener import OPTIONS, caller, files_for, listen
from server.offers import Offers
from server.service import run_service, until_told

log = logging.getLogger("server.hub")  # also where this module is the program

CHUNK_BYTES = PIECE_BYTES
STALL_SECONDS = 60.0
LOOK_SECONDS = 1.0
"""Between two looks at whether a farm that waits for news is revoked."""
MOST_WANTS = 20_000
SERVICE: str = hub_pb2.DESCRIPTOR.services_by_name["Hub"].full_name

Context: TypeAlias = grpc.aio.ServicerContext


class Streams:
    """Who is being sent objects, and how fast that may be."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config
        self._open: Counter[str] = Counter()
        self._free_at: dict[str, float] = {}

    @contextmanager
    def of(self, farm: str) -> Iterator[None]:
        """One more stream of a farm, while the context is open.

        Raises:
            BlockingIOError: as many as may be are open; says whose.
        """
        if self._open[farm] >= self._config.streams_per_farm:
            raise BlockingIOError(
                f"{farm} fetches {self._open[farm]} times at once already; wait until one ends"
            )
        if self._open.total() >= self._config.streams:
            raise BlockingIOError(
                f"the hub sends to {self._open.total()} devices already; ask again in a minute"
            )
        self._open[farm] += 1
        try:
            yield
        finally:
            self._open[farm] -= 1
            if not self._open[farm]:
                del self._open[farm]

    async def pace(self, farm: str, size: int) -> None:
        """Wait until a farm may be sent ``size`` bytes more."""
        rate = self._config.bytes_per_second
        if rate is None:
            return
        now = asyncio.get_running_loop().time()
        begin = max(now, self._free_at.get(farm, 0.0))
        self._free_at[farm] = begin + size / rate
        await asyncio.sleep(begin - now)


class HubService(hub_pb2_grpc.HubServicer):
    """The calls of common/hub.proto."""

    def __init__(
        self, config: HubConfig, offers: Offers, folders: Sequence[Objects], revoked: Revocations
    ) -> None:
        self._offers, self._folders, self._revoked = offers, folders, revoked
        self._streams = Streams(config)
        self._readers = ThreadPoolExecutor(4, "objects")

    async def Latest(  # noqa: N802, D102
        self, request: hub_pb2.ChannelRequest, context: Context
    ) -> hub_pb2.Offer:
        offer = self._offers.of(request.channel, await self._farm(context))
        if offer is None:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, self._offers.unknown(request.channel))
        return offer.message

    async def Watch(  # noqa: N802, D102
        self, request: hub_pb2.ChannelRequest, context: Context
    ) -> AsyncIterator[hub_pb2.Offer]:
        seen = request.counter
        while True:
            changed = self._offers.changed()
            offer = self._offers.of(request.channel, await self._farm(context))
            if offer is not None and offer.counter > seen:
                seen = offer.counter
                yield offer.message
            while not await _within(changed, LOOK_SECONDS):
                await self._farm(context)

    async def Fetch(  # noqa: N802, D102
        self, request: hub_pb2.FetchRequest, context: Context
    ) -> None:
        farm = await self._farm(context)
        if len(request.wants) > MOST_WANTS:
            await _refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{len(request.wants)} objects at once; at most {MOST_WANTS}",
            )
        try:
            with self._streams.of(farm):
                for want in request.wants:
                    await self._send(want, request.compress, context)
        except BlockingIOError as error:
            await _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def _send(self, want: hub_pb2.Want, compress: bool, context: Context) -> None:
        objects, size = await self._find(want, context)
        offset, loop = want.offset, asyncio.get_running_loop()
        while offset < size:
            piece, frame = await loop.run_in_executor(
                self._readers, _read, objects, want.digest, offset, compress
            )
            await self._streams.pace(await self._farm(context), len(frame or piece))
            chunk = hub_pb2.Chunk(
                digest=want.digest, offset=offset, data=frame or piece, zstandard=frame is not None
            )
            try:
                await asyncio.wait_for(context.write(chunk), STALL_SECONDS)
            except TimeoutError:
                await _refuse(
                    context,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"nothing was taken for {STALL_SECONDS:.0f} s; fetch on from where you are",
                )
            offset += len(piece)

    async def _find(self, want: hub_pb2.Want, context: Context) -> tuple[Objects, int]:
        """Where an object is, and its length."""
        if not is_digest(want.digest):
            await _refuse(
                context, grpc.StatusCode.INVALID_ARGUMENT, f"'{want.digest[:80]}' is no sha256"
            )
        objects = next((one for one in self._folders if one.has(want.digest)), None)
        if objects is None:
            await _refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"object {want.digest[:12]} is not here (any more); ask for the channel again",
            )
        size = objects.path(want.digest).stat().st_size
        if want.offset > size:
            await _refuse(
                context,
                grpc.StatusCode.OUT_OF_RANGE,
                f"object {want.digest[:12]} has {size} bytes; {want.offset} is beyond its end",
            )
        return objects, size

    async def Report(  # noqa: N802, D102
        self, request: hub_pb2.InstallReport, context: Context
    ) -> hub_pb2.Received:
        values = {field.name: value for field, value in request.ListFields()}
        try:
            report = InstallReport.model_validate(values)
        except ValidationError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, first_fault(error))
        await self._offers.record(await self._farm(context), report)
        return hub_pb2.Received()

    async def _farm(self, context: Context) -> str:
        """Name in the certificate that the caller has shown; TLS has checked all but one thing."""
        farm, serial = caller(context)
        if self._revoked.holds(serial):
            await _refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of farm {farm} is revoked; ask the operator",
            )
        return farm


def _read(objects: Objects, digest: str, offset: int, compress: bool) -> tuple[bytes, bytes | None]:
    piece = objects.read(digest, offset, CHUNK_BYTES)
    return piece, compressed_piece(piece) if compress else None


async def _refuse(context: Context, code: grpc.StatusCode, why: str) -> NoReturn:
    await context.abort(code, why)
    raise AssertionError("a call that was aborted goes on")


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether something happens in time."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


async def serve_hub(
    config: HubConfig,
    state_dir: Path,
    files: ServerFiles,
    until: asyncio.Event,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the event is set.

    Args:
        config: where to listen, and how much for whom.
        state_dir: of the server.
        files: its certificate and key, and the network's authority.
        until: when to stop.
        ready: called once devices are answered.

    Raises:
        StateError: the registry cannot be read.
        LaunchError: the port is taken.
    """
    server = grpc.aio.server(options=OPTIONS)
    async with Offers.watching(state_dir) as offers:
        folders = Objects(state_dir / "registry" / "objects"), bodies_of(state_dir)
        revoked = Revocations(state_dir / "identity" / "issued.jsonl")
        service = HubService(config, offers, folders, revoked)
        hub_pb2_grpc.add_HubServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        alive = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(alive, server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        listen(server, config.host, config.port, files, "hub")
        await server.start()
        for name in ("", SERVICE):
            await alive.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("devices get models at %s:%d", config.host, config.port)
        ready()
        try:
            await until.wait()
        finally:
            await alive.enter_graceful_shutdown()
            await server.stop(grace=2.0)


async def _main(folder: Path) -> None:
    settings = load_settings(ServerConfig, folder / "server.toml")
    if settings.hub is None:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [hub]; give it a port there")
    await serve_hub(settings.hub, folder, files_for(settings, folder), until_told())


if __name__ == "__main__":
    run_service(lambda folder: asyncio.run(_main(folder)), log)
