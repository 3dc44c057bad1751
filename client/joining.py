"""A farm comes to a network with a code, keeps its certificate young, and goes.

The device makes its key here, asks the door for a certificate and proves that it knows the code;
the door proves the same (common/code.py), and only then is it believed. What it gives is tried at
once: the door with the new certificate, the hub, the clock, the disk.
"""

import functools
import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from client import reach
from client.door import Conversation, Way, ask, check
from client.identity import FarmIdentity
from common.checkup import room
from common.code import JoinAnswer, Secret
from common.config import FarmSection
from common.diagnosis import Level
from common.door import JOIN, LEAVE, PORT, RENEW
from common.errors import ConfigError, FieldfedError, ProtocolError
from common.files import write_atomically
from common.membership import Membership

log = logging.getLogger(__name__)

ROOM_BYTES = 500_000_000
"""That a ViT-S, its versions and the queue for the broker need in a farm's state folder."""
RENEW_DAYS = 60
LOOK_SECONDS = 6 * 3600.0
FIRST_LOOK_SECONDS = 30.0


def address_in(url: str) -> str:
    """``host:port`` of https://HOST[:PORT].

    Raises:
        ConfigError: it is written differently.
    """
    scheme, _, rest = url.strip().rstrip("/").partition("://")
    host, colon, port = rest.partition(":")
    if scheme != "https" or not host or "/" in rest or (colon and not port.isdigit()):
        raise ConfigError(f"'{url}' is not https://HOST:PORT; ask the operator for the address")
    return f"{host}:{port or PORT}"


def join_by_code(
    identity: FarmIdentity, keep: Callable[[Membership], None], url: str, code: str
) -> Membership:
    """Become a member.

    Args:
        identity: of the farm on this device.
        keep: takes the membership in, if it is right.
        url: of the door.
        code: that the operator gave.

    Raises:
        ConfigError: the address or the code is mistyped.
        LinkError: the door cannot be reached or says no.
        ProtocolError: who answers does not know the code.
    """
    address, secret = address_in(url), Secret.of(code, identity.farm)
    request = identity.request().decode()
    with Conversation(address, _blind()) as door:
        asked = secret.ask(door.certificate, request).model_dump_json().encode()
        said = door.ask(JOIN, asked)
    try:
        answer = JoinAnswer.model_validate_json(said)
        believed = secret.believes(answer, door.certificate, request)
        membership = Membership.model_validate_json(answer.membership) if believed else None
    except ValidationError as error:
        raise ProtocolError(f"{address} is no door of ours; check the address") from error
    if membership is None:
        raise ProtocolError(
            f"who answers at {address} does not know the code: somebody may be in between. Nothing "
            "was believed; check the address, and ask for a new code"
        )
    membership = membership.model_copy(update={"door": address})
    keep(membership)
    return membership


def _blind() -> ssl.SSLContext:
    """TLS with whoever is there: who it is, the code will show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def faults(way: Way, membership: Membership, state_dir: Path) -> list[str]:
    """What would keep a member from working: door, SuperLink, clock, hub, disk; nothing is best."""
    found = list(reach.door(way))
    if membership.hub is not None:
        found += reach.line("hub", membership.hub)
    found.append(room(state_dir, ROOM_BYTES, "a farm"))
    return [one.words for one in found if one.level is not Level.OK]


def take_in(identity: FarmIdentity, state_dir: Path, membership: Membership) -> None:
    """Take a membership in: its certificate, and what else it says.

    Raises:
        ProtocolError: the certificate is not for this farm's key, or of another authority.
    """
    identity.accept(membership.certificate.encode(), membership.authority.encode())
    write_atomically(state_dir / "membership.json", membership.model_dump_json().encode())


# --- afterwards ----------------------------------------------------------------------------------


def renew(identity: FarmIdentity, way: Way, keep: Callable[[Membership], None]) -> bool:
    """Ask for a new certificate if the one there ends within 60 days; whether it did.

    Raises:
        FieldfedError: it could not; the old one is kept.
    """
    if way.tls is None or identity.days_left() >= RENEW_DAYS:
        return False
    said = ask(way.address, way.tls(), RENEW, identity.request())
    try:
        membership = Membership.model_validate_json(said)
    except ValidationError as error:
        raise ProtocolError(f"{way.address} is no door of ours; check the address") from error
    keep(membership.model_copy(update={"door": way.address}))
    log.info("the certificate of farm %s is renewed", identity.farm)
    return True


def keep_young(
    identity: FarmIdentity,
    way: Way,
    keep: Callable[[Membership], None],
    stop: threading.Event,
) -> None:
    """Look after the certificate until ``stop``: say what is wrong with it, renew it in time."""
    pause, told = FIRST_LOOK_SECONDS, ""
    while not stop.wait(pause):
        pause = LOOK_SECONDS
        try:
            if not renew(identity, way, keep):
                check(way)
            told = ""
        except FieldfedError as error:
            if str(error) != told:
                log.error("%s", error)
            told = str(error)


def look_after(farm: FarmSection, state_dir: Path, way: Way, stop: threading.Event) -> None:
    """Keep a member's certificate young, in a thread of its own."""
    identity = FarmIdentity.create(state_dir / "identity", farm.name)
    arguments = (identity, way, functools.partial(take_in, identity, state_dir), stop)
    threading.Thread(target=keep_young, args=arguments, name="certificate", daemon=True).start()


def leave(identity: FarmIdentity, way: Way, state_dir: Path) -> str | None:
    """Give the certificates back and forget the network; the farm's own data stays.

    Returns:
        None, or why the network could not be told.
    """
    fault = None
    try:
        if way.tls is not None:
            ask(way.address, way.tls(), LEAVE)
    except FieldfedError as error:
        fault = str(error)
    identity.forget()
    for name in ("membership.json", "trust.json"):
        (state_dir / name).unlink(missing_ok=True)
    return fault
