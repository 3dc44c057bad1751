"""A farm's way to its network: the front door, over TLS, or SuperLink on this very machine.

Both ends of the door show a certificate. What can go wrong with one is said in words that name what
to do: a clock, a name, an authority, a certificate that is over.
"""

import http.client
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from client.identity import FarmIdentity
from common.config import FarmSection
from common.door import CHECK, Checked, Checking
from common.errors import ConfigError, LinkError, StateError
from common.membership import Membership
from common.processes import is_loopback

LOCAL = "127.0.0.1:8000"
ASK_SECONDS = 30.0
MAX_ANSWER_BYTES = 4_000_000
CLOCK_SECONDS = 5.0
"""Flower refuses a SuperNode whose clock is 6 s ahead of the server's."""
LATE_SECONDS = 240.0
"""And one that is 305 s behind."""

# of OpenSSL, as Python passes them on
_NOT_YET, _EXPIRED, _NAMES = 9, 10, {62, 64}
_UNKNOWN = {2, 18, 19, 20, 21}


@dataclass(frozen=True)
class Way:
    """``address`` is host:port; ``tls`` makes what a connection is encrypted with, if it is."""

    address: str
    tls: Callable[[], ssl.SSLContext] | None = None


class _Tls:
    """A context that is made anew when the certificate has changed, or is about to be over."""

    def __init__(self, identity: FarmIdentity) -> None:
        self._identity = identity
        self._made: tuple[int, ssl.SSLContext] | None = None

    def __call__(self) -> ssl.SSLContext:
        """Raises StateError for a certificate that cannot be used."""
        try:
            changed = (self._identity.folder / "certificate.pem").stat().st_mtime_ns
        except FileNotFoundError:
            changed = 0  # says what to do, below
        if self._made is None or self._made[0] != changed or self._identity.days_left() < 1:
            self._made = changed, self._identity.tls()
        return self._made[1]


def address_of(farm: FarmSection, state_dir: Path) -> str:
    """Where a farm sends what it says to its server, as ``host:port``."""
    return _reached(farm, state_dir)[0] or LOCAL


def _reached(farm: FarmSection, state_dir: Path) -> tuple[str | None, Membership | None]:
    """The address that is set or joined, and the membership, if there is one."""
    path = state_dir / "membership.json"
    member = Membership.load(path) if path.is_file() else None
    return farm.superlink or (member.door if member else None), member


def way_of(farm: FarmSection, state_dir: Path) -> Way:
    """How a farm reaches its server.

    ``[farm] superlink`` counts where it is set: an address on this machine is spoken to without
    encryption, any other is a door. Where it is not, the farm goes through the door of the network
    that it is a member of, and to SuperLink on this machine if it is no member.

    Raises:
        ConfigError: the server is on another machine, and the farm has not joined its network.
        StateError: the farm's key is damaged.
    """
    address, member = _reached(farm, state_dir)
    if address is None or (farm.superlink and is_loopback(address.rpartition(":")[0])):
        return Way(address or LOCAL)
    if member is None:
        raise ConfigError(
            f"the server at {address} is on another machine, and farm {farm.name} is no member of "
            "its network; join it first, with: fieldfed-client join"
        )
    return Way(address, _Tls(FarmIdentity.create(state_dir / "identity", farm.name)))


def ask(address: str, tls: ssl.SSLContext, path: str, body: bytes = b"") -> bytes:
    """POST something to the door and return what it answers.

    Raises:
        LinkError: it cannot be reached, or says no, or this machine's clock is wrong.
    """
    with Conversation(address, tls) as conversation:
        return conversation.ask(path, body)


class Conversation:
    """A connection to a door; ``certificate`` is what it shows, in DER form."""

    def __init__(self, address: str, tls: ssl.SSLContext) -> None:
        host, _, port = address.rpartition(":")
        self._address = address
        self._http = http.client.HTTPSConnection(host, int(port), timeout=ASK_SECONDS, context=tls)
        self.certificate = b""

    def __enter__(self) -> "Conversation":
        try:
            self._http.connect()
            self.certificate = self._http.sock.getpeercert(binary_form=True) or b""
        except OSError as error:
            self._http.close()
            raise LinkError(explain(error, self._address)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, path: str, body: bytes) -> bytes:
        """One question; raises LinkError, also for a clock that Flower would refuse."""
        said = self.hear(path, body)
        said.require_clock()
        return said.body

    def hear(self, path: str, body: bytes) -> "Said":
        """One question, whatever this machine's clock says."""
        began = datetime.now(UTC)
        try:
            self._http.request("POST", path, body, {"Content-Type": "application/json"})
            response = self._http.getresponse()
            answer = response.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise LinkError(explain(error, self._address)) from error
        if response.status != 200:
            said = answer[:300].decode(errors="replace")
            raise LinkError(f"the door at {self._address} says no ({response.status}): {said}")
        date = response.headers.get("Date")
        if date is None:
            return Said(answer, 0.0, 0.0)
        server = parsedate_to_datetime(date)
        behind = (server - datetime.now(UTC)).total_seconds()
        return Said(answer, (began - server).total_seconds(), behind)


@dataclass(frozen=True)
class Said:
    """An answer, and by how many seconds this machine's clock is ahead or behind, give or take 1.

    Negative numbers say nothing: the answer took time, and the door tells whole seconds.
    """

    body: bytes
    ahead: float
    behind: float

    def require_clock(self) -> None:
        """Raises LinkError where Flower would refuse what this machine signs."""
        if self.ahead > CLOCK_SECONDS or self.behind > LATE_SECONDS:
            ahead, behind = f"{self.ahead:.0f} s ahead of", f"{self.behind:.0f} s behind"
            raise LinkError(
                f"this machine's clock is {ahead if self.ahead > 0 else behind} the server's; set "
                "it (NTP), or no request of this farm will be taken"
            )


def check(way: Way) -> Checked:
    """Ask the door whether all is well with this farm.

    Raises:
        LinkError: it is not; says what.
        StateError: the certificate cannot be used.
    """
    checked, said = look(way, Checking())
    said.require_clock()
    return checked


def look(way: Way, asked: Checking) -> tuple[Checked, Said]:
    """The same, whatever this machine's clock says; errors as :func:`check`."""
    assert way.tls is not None
    body = asked.model_dump_json().encode() if asked.versions else b""
    with Conversation(way.address, way.tls()) as conversation:
        said = conversation.hear(CHECK, body)
    try:
        return Checked.model_validate_json(said.body), said
    except ValueError as error:
        raise LinkError(f"{way.address} is no door of ours; check the address") from error


def explain(error: Exception, address: str) -> str:
    """What is wrong with a connection, and what to do."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _NAMES:
            return (
                f"the server at {address} shows a certificate for other names "
                f"({error.verify_message}); reach it by one of [door] names in its server.toml"
            )
        if error.verify_code in (_NOT_YET, _EXPIRED):
            which = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
            return (
                f"the certificate of the server at {address} {which}, and this machine's clock "
                f"says {now}; set the clock, or have the server's certificate renewed"
            )
        if error.verify_code in _UNKNOWN:
            return (
                f"the server at {address} is not of the network that this farm joined: another "
                "server, or somebody in between; check the address. If the network was set up "
                "anew, leave it and join again"
            )
        return f"the certificate of the server at {address}: {error.verify_message}"
    if isinstance(error, StateError):
        return str(error)
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return f"{address}: {_alert(str(error.reason or error), now)}"
    if isinstance(error, ConnectionResetError | ssl.SSLEOFError):
        return _no_word(address, now)
    return f"the server at {address} cannot be reached: {str(error) or type(error).__name__}"


def _no_word(address: str, now: str) -> str:
    return (
        f"the server at {address} ended the connection without a word, as it does when it does not "
        f"take this farm's certificate (of another network, revoked, or over: the clock here says "
        f"{now}), or when too many connections of this farm are open"
    )


def _alert(reason: str, now: str) -> str:
    reason = reason.upper()
    if "CERTIFICATE_EXPIRED" in reason:
        return (
            "the server says that this farm's certificate has expired (the clock here says "
            f"{now}); if both clocks are right, join again"
        )
    if "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason:
        return "the server does not take this farm's certificate: it is of another network"
    if "WRONG_VERSION" in reason or "HTTP_REQUEST" in reason or "RECORD_LAYER" in reason:
        return "what answers there does not speak TLS; check the port"
    return f"TLS: {reason.lower().replace('_', ' ')}"
