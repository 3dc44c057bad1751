"""Whether a farm reaches what it works with: door, SuperLink, hub; each within seconds.

``join`` asks this once, ``doctor`` whenever somebody wants to know. Nothing is written down, so the
ledger does not count what is asked here: some hundred bytes, none of them of an image.
"""

import contextlib
import http.client
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc

from client.door import Way, look
from client.hub import HubClient
from client.identity import ClientFiles
from client.trust import Trust
from common.diagnosis import Finding, fault, of_error, ok, warn
from common.door import Checking
from common.errors import FieldfedError, LinkError, RefusalError
from common.protocols import PROTOCOL

REACH_SECONDS = 10.0
CHANNEL_SOON, VERSION_SOON = timedelta(days=7), timedelta(days=30)
"""A hub that runs signs its channels again when 15 days are left."""
ASK_OPERATOR = "ask the server's operator to run: fieldfed-server doctor"
_AT_DOOR = (
    "see that the server is up (fieldfed-server doctor) and that the address is right; a farm that "
    "was revoked joins again"
)
_AT_HUB = {
    grpc.StatusCode.PERMISSION_DENIED: "ask the operator for a new code, and join again",
    grpc.StatusCode.UNAVAILABLE: "if what listens there is the hub, its network is another one: "
    "leave it and join again",
}


def door(way: Way) -> Iterator[Finding]:
    """The door, and what it says: of SuperLink behind it, of the clock, of its release."""
    try:
        checked, said = look(way, Checking(versions=True))
    except FieldfedError as error:
        yield of_error("door", error, _AT_DOOR)
        return
    yield ok("door", f"{way.address} knows farm {checked.farm}")
    if checked.superlink:
        yield ok("SuperLink", f"it answers behind {way.address}")
    else:
        found = "the door is open, but SuperLink behind it does not answer"
        yield fault("SuperLink", found, ASK_OPERATOR)
    try:
        said.require_clock()
        yield ok("clock", "it goes with the server's")
    except LinkError as error:
        yield of_error("clock", error)
    if checked.protocol is not None:
        yield _protocol(checked.protocol, checked.release or "unknown")


def _protocol(theirs: int, release: str) -> Finding:
    said = f"the server (fieldfed {release}) speaks protocol {theirs}, this farm {PROTOCOL}"
    if theirs == PROTOCOL:
        return ok("protocol", said)
    behind = "on this farm" if theirs > PROTOCOL else "on the server"
    return fault("protocol", said, f"install the newer fieldfed {behind}")


def superlink(address: str) -> Iterator[Finding]:
    """SuperLink on this very machine."""
    host, _, port = address.rpartition(":")
    link = http.client.HTTPConnection(host, int(port), timeout=REACH_SECONDS)
    try:
        with contextlib.closing(link):
            link.request("GET", "/health")
            status = link.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        yield fault(
            "SuperLink",
            f"{address} cannot be reached: {error}",
            "start it with: fieldfed-server up; is the server elsewhere: fieldfed-client join",
        )
        return
    if status >= 500:
        yield fault("SuperLink", f"{address} answers with status {status}", ASK_OPERATOR)
        return
    yield ok("SuperLink", f"{address} answers, on this machine")


def line(what: str, address: str) -> Iterator[Finding]:
    """A fault where nothing listens; else nothing."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        found = f"the {what} at {address} cannot be reached: {error}"
        yield fault(what, found, f"see that this address is open; {ASK_OPERATOR}")


def hub(address: str, files: ClientFiles, channel: str, trust: Trust) -> Iterator[Finding]:
    """The hub: whether it takes our certificate, and we what the channel names."""
    closed = list(line("hub", address))
    if closed:
        yield from closed
        return
    try:
        with HubClient(address, files) as client:
            offer = client.latest(channel, REACH_SECONDS)
    except LinkError as error:
        yield _refused(address, channel, error)
        return
    now = datetime.now(UTC)
    try:
        _, named, _, version = trust.examine(
            offer.keys, offer.channel, offer.manifest, channel, now
        )
    except RefusalError as error:
        yield of_error("hub", error, ASK_OPERATOR)
        return
    said = f"{address} takes our certificate; channel '{channel}' names version {version.counter}"
    if named.expires < now + CHANNEL_SOON or version.expires < now + VERSION_SOON:
        ends = min(named.expires, version.expires)
        yield warn("hub", f"{said}, only until {ends:%Y-%m-%d %H:%M} UTC", ASK_OPERATOR)
        return
    yield ok("hub", said)


def _refused(address: str, channel: str, error: LinkError) -> Finding:
    said = error.__cause__
    code = said.code() if isinstance(said, grpc.RpcError) else None
    if code is not grpc.StatusCode.NOT_FOUND:
        return fault("hub", str(error), _AT_HUB.get(code, ASK_OPERATOR))
    details = str(getattr(said, "details", str)())
    if details.endswith("none yet"):
        return ok("hub", f"{address} takes our certificate; it has no version yet")
    return warn("hub", f"{address}: {details}", f"correct [farm] channel ('{channel}')")
