"""A device's side of the hub (common/hub.proto): ask, fetch with resume, report.

Lines of farms are cut at any moment. What has arrived stays on disk, and a fetch goes on from
there, after a pause that grows and is drawn at random, so that a server that comes back is not met
by all farms at once. A fetch gives up when it was tried several times without one byte of gain.
"""

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

import grpc
import numpy as np

from client.bell import Bell
from client.identity import ClientFiles
from client.ledger import Kind, Ledger
from common import hub_pb2, hub_pb2_grpc
from common.compress import expand
from common.errors import AbsentError, LinkError, ProtocolError, RefusalError, RefuseReason
from common.manifest import InstallReport
from common.objects import Objects

log = logging.getLogger(__name__)

Sent = TypeVar("Sent", hub_pb2.ChannelRequest, hub_pb2.FetchRequest, hub_pb2.InstallReport)

CALL_SECONDS, FETCH_SECONDS = 60.0, 900.0
TRIES = 8
TELL_SECONDS = 10.0
LONGEST_PAUSE = 120.0
MAX_CHUNK = 1 << 20
OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)
PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,  # what a reset in the middle of a message looks like
        grpc.StatusCode.CANCELLED,
    }
)


@dataclass(frozen=True)
class Offer:
    """Signed documents: keys, a channel, the manifest it names. Nothing is believed yet."""

    keys: str
    channel: str
    manifest: str


@dataclass(frozen=True)
class Fetched:
    """What a fetch cost: bytes of objects that came, also twice, and how often the line was cut."""

    bytes: int
    cuts: int


class _Progress:
    """Counts what comes, and says so every few seconds."""

    def __init__(self, needed: int) -> None:
        self.came, self._needed, self._told = 0, needed, time.monotonic()

    def add(self, count: int) -> None:
        """So many bytes more."""
        self.came += count
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            log.info("%.1f of %.1f MB have come", self.came / 1e6, self._needed / 1e6)


class HubClient:
    """A connection to the hub of a network.

    Args:
        address: "host:port".
        files: the farm's certificate and key, and the network's authority.
        seed: of pauses.
        sleep: waits; another in tests.
        ledger: of what leaves the farm; closed with the connection.
    """

    def __init__(
        self,
        address: str,
        files: ClientFiles,
        seed: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
        ledger: Ledger | None = None,
    ) -> None:
        credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)
        self._address, self._sleep, self._ledger = address, sleep, ledger
        self._channel = grpc.secure_channel(address, credentials, OPTIONS)
        self._stub = hub_pb2_grpc.HubStub(self._channel)  # type: ignore[no-untyped-call]
        self._random = random.Random(seed)  # noqa: S311

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        if self._ledger is not None:
            self._ledger.close()

    def latest(self, channel: str, seconds: float = CALL_SECONDS) -> Offer:
        """What a channel names now, within so many seconds.

        Raises:
            AbsentError: there is no such channel.
            LinkError: the hub cannot be reached.
        """
        request = self._leaving(Kind.REQUEST, hub_pb2.ChannelRequest(channel=channel))
        try:
            return _offer(self._stub.Latest(request, timeout=seconds))
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def watch(self, channel: str, counter: int = 0, bell: Bell | None = None) -> Iterator[Offer]:
        """Every newer state of a channel than number ``counter``, as it comes.

        A channel that is not there yet is waited for.

        Args:
            channel: its name.
            counter: of the state that is known.
            bell: ends it when it rings.

        Raises:
            LinkError: the line was lost.
        """
        asked = hub_pb2.ChannelRequest(channel=channel, counter=counter)
        call = self._stub.Watch(self._leaving(Kind.REQUEST, asked))
        with contextlib.nullcontext() if bell is None else bell.ending(call.cancel):
            try:
                yield from map(_offer, call)
            except grpc.RpcError as error:
                if bell is None or not bell.rung:
                    raise self._failed(error) from error

    def report(self, report: InstallReport) -> None:
        """Say what became of a version; raises LinkError."""
        values = {key: value for key, value in report.model_dump().items() if value is not None}
        message = self._leaving(Kind.INSTALL_REPORT, hub_pb2.InstallReport(**values))
        try:
            self._stub.Report(message, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def fetch(
        self,
        wanted: Mapping[str, int],
        objects: Objects,
        *,
        compress: bool = False,
    ) -> Fetched:
        """Bring every one of these objects (length by digest) that is not here yet.

        Args:
            wanted: as a manifest has it.
            objects: where they are kept, as far as they have come.
            compress: for links on which bytes are dear.

        Raises:
            RefusalError: TOO_LARGE: the disk has no room; DAMAGED: the hub hands over other bytes
                than were announced, again and again.
            LinkError: the hub cannot be reached, or has an object no longer.
            DiskError: the disk is full; what came is kept.
        """
        objects.resume(wanted)
        lacking = objects.lacking(wanted)
        needed = sum(wanted[one] for one in lacking) - sum(lacking.values())
        objects.require_room(needed)
        progress, cuts, vain = _Progress(needed), 0, 0
        while lacking:
            before = progress.came
            fault: grpc.RpcError | RefusalError
            try:
                for chunk in self._stream(lacking, compress):
                    data = _bytes(chunk, wanted)
                    objects.receive(chunk.digest, chunk.offset, data, wanted[chunk.digest])
                    progress.add(len(data))
                fault = RefusalError("the hub ended before all had come", RefuseReason.DAMAGED)
            except grpc.RpcError as error:
                if error.code() not in PASSING:
                    raise self._failed(error) from error
                fault = error
            except RefusalError as error:
                fault = error
            lacking = objects.lacking(wanted)
            if not lacking:
                break
            cuts += 1
            gained = progress.came > before and not isinstance(fault, RefusalError)
            vain = 0 if gained else vain + 1
            if vain == TRIES:
                raise fault if isinstance(fault, RefusalError) else self._failed(fault)
            self._pause(vain)
        return Fetched(progress.came, cuts)

    def _stream(self, lacking: Mapping[str, int], compress: bool) -> Iterator[hub_pb2.Chunk]:
        wants = [hub_pb2.Want(digest=one, offset=held) for one, held in lacking.items()]
        asked = hub_pb2.FetchRequest(wants=wants, compress=compress)
        request = self._leaving(Kind.REQUEST, asked)
        # a stream that the server forgets ends by this limit, and another goes on
        call = self._stub.Fetch(request, timeout=FETCH_SECONDS)
        try:
            yield from call
        finally:
            call.cancel()

    def _leaving(self, kind: Kind, message: Sent) -> Sent:
        """Write down what is about to be sent; returns it."""
        if self._ledger is not None:
            self._ledger.add(kind, message.ByteSize(), f"hub {self._address}")
        return message

    def _pause(self, vain: int) -> None:
        most = min(LONGEST_PAUSE, 0.5 * 2**vain)
        seconds = self._random.uniform(most / 2, most)
        log.info("the line to %s was cut; going on in %.1f s", self._address, seconds)
        self._sleep(seconds)

    def _failed(self, error: grpc.RpcError) -> LinkError:
        kind = AbsentError if error.code() is grpc.StatusCode.NOT_FOUND else LinkError
        return kind(
            f"hub at {self._address}: {error.code().name.lower().replace('_', ' ')}: "
            f"{(error.details() or '')[:300]}"
        )


def _offer(message: hub_pb2.Offer) -> Offer:
    return Offer(message.keys, message.channel, message.manifest)


def _bytes(chunk: hub_pb2.Chunk, wanted: Mapping[str, int]) -> bytes:
    """What a chunk holds.

    Raises:
        RefusalError: DAMAGED: it was not asked for, or is no frame of at most 1 MiB.
    """
    if chunk.digest not in wanted:
        raise RefusalError(f"the hub sent '{chunk.digest[:12]}', unasked", RefuseReason.DAMAGED)
    if not chunk.zstandard:
        return chunk.data
    try:
        return expand(np.frombuffer(chunk.data, np.uint8), MAX_CHUNK).tobytes()
    except ProtocolError as error:
        raise RefusalError(f"object {chunk.digest[:12]}: {error}", RefuseReason.DAMAGED) from error
