"""A centre's connections to its regions, and what it shows them.

    CENTRE/centre/key.pem    the centre's private key; every region certifies it
    CENTRE/centre/coop.csr   the request that region operators are given (coop: the centre's name)

Of each region the centre has a membership, the file that ``fieldfed-server certify`` writes there:
the certificate that lets the centre in, the authority that the region's own has to come from, and
the keys that its records have to be sealed with.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from common import certificates, hub_pb2, hub_pb2_grpc
from common.certificates import PrivateKey
from common.config import ServerConfig
from common.errors import ConfigError, FieldfedError, LinkError
from common.files import only_one, write_atomically
from common.membership import Membership
from common.messages import HelloReply
from common.processes import terminate_like_interrupt
from common.services import RegionEntry
from common.signing import first_keys
from server.centre import Orders, require_centre, run_centre
from server.region_link import Region, RegionLink
from server.region_record import HELLO, opened
from server.settings import RunSettings

log = logging.getLogger(__name__)

CALL_SECONDS, WHOLE_SECONDS = 30.0, 900.0
PIECE_BYTES = 1 << 18
FOLDER = "centre"
OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)


class RegionLine:
    """The line to one region's port.

    Args:
        address: "host:port".
        authority: PEM, of the region's network.
        key: PEM, of the centre.
        certificate: PEM, that the region has given to the centre.
        most: bytes of the largest answer that is taken.
    """

    def __init__(
        self, address: str, authority: bytes, key: bytes, certificate: bytes, most: int
    ) -> None:
        self._address, self._most = address, most
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        self._channel = grpc.secure_channel(address, credentials, OPTIONS)
        self._stub = hub_pb2_grpc.RegionStub(self._channel)  # type: ignore[no-untyped-call]
        self._parts: dict[str, bytearray] = {}

    def give(self, order: bytes) -> None:
        """Leave an order; raises LinkError."""
        with self._explained():
            self._stub.Give(_pieces(order), timeout=WHOLE_SECONDS)

    def take(self, key: str, attempt: int) -> bytes | None:
        """The answer, from where an earlier try was cut off; raises LinkError."""
        part = bytearray() if key == HELLO else self._parts.setdefault(key, bytearray())
        asked = hub_pb2.Question(key=key, attempt=attempt, offset=len(part))
        size = None
        with self._explained():
            for piece in self._stub.Take(asked, timeout=WHOLE_SECONDS if part else CALL_SECONDS):
                size = piece.size
                part += piece.data
                if size > self._most or len(part) > size:
                    self._parts.pop(key, None)
                    raise LinkError(
                        f"{self._address} sends {max(size, len(part))} bytes as an answer; "
                        f"{min(size, self._most)} may come (rounds.max_reply_bytes)"
                    )
        if size is None or len(part) < size:
            return None
        self._parts.pop(key, None)
        return bytes(part)

    def close(self) -> None:
        """Hang up; a call that goes on fails."""
        self._channel.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
            said = error.details() if isinstance(error, grpc.Call) else str(error)
            raise LinkError(f"{self._address}: {str(said)[:300]}") from error


def _pieces(data: bytes) -> Iterator[hub_pb2.Piece]:
    for start in range(0, len(data), PIECE_BYTES):
        yield hub_pb2.Piece(data=data[start : start + PIECE_BYTES], size=len(data))


# --- the centre's own ----------------------------------------------------------------------------


def request_of(config: ServerConfig, folder: Path) -> Path:
    """Write the centre's request for a certificate, for every region; returns where.

    Raises:
        StateError: the centre's key is damaged, or other users may read it.
        DiskError: the disk is full or the folder cannot be written.
    """
    key, name = _key(folder), config.server.name
    builder = x509.CertificateSigningRequestBuilder().subject_name(certificates.name_of(name))
    path = folder / FOLDER / f"{name}.csr"
    write_atomically(path, certificates.pem(builder.sign(key, hashes.SHA256())))
    return path


def _key(folder: Path) -> PrivateKey:
    path = folder / FOLDER / "key.pem"
    if not path.exists():
        with only_one(folder / FOLDER / "key.lock"):
            if not path.exists():
                certificates.write_key(path, certificates.new_key())
    return certificates.read_key(
        path, f"move '{path}' away, request anew, and have every region certify it"
    )


def known_regions(config: ServerConfig, folder: Path) -> list[Region]:
    """The regions of a centre's settings, each with its line.

    Raises:
        ConfigError: there are none, a membership is not there or not of that region, or its
            certificate is not for the centre's key or has expired; names the region.
        StateError: the centre's key is damaged.
    """
    require_centre(config)
    if not config.regions:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [[regions]]; list them there")
    key = _key(folder)
    return [_known(entry, config, folder, key) for entry in config.regions]


def _known(entry: RegionEntry, config: ServerConfig, folder: Path, key: PrivateKey) -> Region:
    member, now = Membership.load(folder / entry.member), datetime.now(UTC)
    wrong = f"region '{entry.name}': '{folder / entry.member}' is a membership of "
    if (member.network, member.farm) != (entry.name, config.server.name):
        raise ConfigError(
            f"{wrong}'{member.farm}' in network '{member.network}'; this centre is "
            f"'{config.server.name}': have that region certify its request"
        )
    certificate = certificates.parse_certificate(member.certificate.encode(), "the certificate")
    if not certificates.is_for(certificate, key):
        raise ConfigError(f"{wrong}another key; have the region certify this centre's request")
    if now > certificate.not_valid_after_utc:
        ended = certificates.shown(certificate.not_valid_after_utc)
        raise ConfigError(f"{wrong}a time that ended on {ended}; have it certified again")
    try:
        keys = first_keys(member.keys, now)
    except FieldfedError as error:
        raise ConfigError(f"region '{entry.name}': {error}") from error
    line = RegionLine(
        entry.address,
        member.authority.encode(),
        certificates.key_pem(key),
        member.certificate.encode(),
        config.rounds.max_reply_bytes,
    )
    return Region(entry.name, keys, line)


def lead(settings: RunSettings, folder: Path) -> int:
    """Run, or continue, a centre's plan in this process; returns the run's number.

    SIGTERM ends it as Ctrl-C does: what was committed is kept.

    Raises:
        FieldfedError: the settings cannot be used, or the run failed.
    """
    config = settings.config
    regions = known_regions(config, folder)
    with ExitStack() as stack, terminate_like_interrupt():

        def reach(orders: Orders) -> RegionLink:
            link = RegionLink(regions, config.server.name, orders.describe)
            return stack.enter_context(link)

        return run_centre(reach, folder, settings)


@dataclass(frozen=True)
class Heard:
    """What a region says when it is asked who it is; ``hello`` None: ``why``."""

    name: str
    hello: HelloReply | None
    why: str = ""


def heard(config: ServerConfig, folder: Path) -> Sequence[Heard]:
    """Ask every region who it is. Raises as :func:`known_regions` does."""
    return [_heard(region, config.server.name) for region in known_regions(config, folder)]


def _heard(region: Region, centre: str) -> Heard:
    try:
        data = region.line.take(HELLO, 1)
        if data is None:
            return Heard(region.name, None, "it answers, and waits for its farms")
        now = datetime.now(UTC)
        reply = opened(
            data, region=region.name, centre=centre, key=HELLO, keys=region.keys, now=now
        )
    except FieldfedError as error:
        return Heard(region.name, None, str(error))
    finally:
        region.line.close()
    return Heard(region.name, reply if isinstance(reply, HelloReply) else None, reply.kind)
