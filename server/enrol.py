"""Farms come and go: they join with a code, renew their certificates, leave, or are revoked.

What the door (server/passage.py) hands over has passed TLS. Here is decided who becomes a member.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from common import certificates
from common.code import JoinAnswer, JoinRequest, Secret, Verifier, new_code
from common.config import ServerConfig
from common.errors import ConfigError, LinkError, ProtocolError
from common.membership import Membership
from server.codes import Codes
from server.identity import Authority, asked_by
from server.issued import revoked_in
from server.members import address_of, authority_of, member_of

log = logging.getLogger(__name__)

ADDRESS_FAILURES, ALL_FAILURES = 5, 200
WINDOW_SECONDS = 600.0
NO = "the code is wrong, expired or used, or it was made for a farm of another name"


class Failures:
    """Wrong codes of late, by address and in all; too many, and nobody's code is looked at.

    Args:
        clock: seconds that only ever grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, str]] = deque()

    def too_many(self, address: str) -> bool:
        """Whether an address has to wait."""
        while self._seen and self._seen[0][0] <= self._clock() - WINDOW_SECONDS:
            self._seen.popleft()
        own = sum(other == address for _, other in self._seen)
        return own >= ADDRESS_FAILURES or len(self._seen) >= ALL_FAILURES

    def add(self, address: str) -> None:
        """A wrong code came from an address."""
        self._seen.append((self._clock(), address))


class Enrolment:
    """Takes farms in; used by one thread at a time.

    Args:
        config: of the server.
        state_dir: of the server.
    """

    def __init__(self, config: ServerConfig, state_dir: Path) -> None:
        self._config, self._state_dir = config, state_dir
        self._identity = state_dir / "identity"
        self._codes, self._failures = Codes(self._identity), Failures()
        # a farm without a code is checked as long as one with a code
        self._nobody = Verifier(Secret.of(new_code(), "-").verifier.public, secrets.token_bytes(32))

    def join(self, body: bytes, shown: bytes, address: str) -> JoinAnswer:
        """A device's request with a code.

        Args:
            body: what it sent.
            shown: the certificate that the door has shown to it, in DER form.
            address: it comes from.

        Raises:
            ProtocolError: this is no request.
            LinkError: no; there is no saying which of the reasons it is.
            FieldfedError: the server's own trouble.
        """
        if self._failures.too_many(address):
            raise LinkError("too many wrong codes; wait ten minutes and look at the code again")
        try:
            asked = JoinRequest.model_validate_json(body)
        except ValidationError as error:
            raise ProtocolError("this is no request to join; update fieldfed") from error
        farm, key = asked_by(asked.request.encode())
        code, now = self._codes.of(farm), datetime.now(UTC)
        verifier = self._nobody if code is None else code.verifier
        known = verifier.accepts(asked.proof, shown, asked.request)
        if not known or not self._codes.use(farm, certificates.fingerprint(key), now):
            self._failures.add(address)
            if not known:
                self._codes.failed(farm)
            log.warning("%s tried to join as farm %s: %s", address, farm, NO)
            raise LinkError(NO)
        self._require_never_revoked(certificates.fingerprint(key))
        membership = member_of(self._config, self._state_dir, asked.request.encode())
        log.info("farm %s has joined from %s", farm, address)
        text = membership.model_dump_json()
        return JoinAnswer(membership=text, proof=verifier.answer(shown, asked.request, text))

    def renew(self, farm: str, key: str, body: bytes) -> Membership:
        """A new certificate for the key of a farm that has shown its old one.

        Raises:
            ProtocolError: the request is for another farm or another key.
            FieldfedError: the server's own trouble.
        """
        name, asked = asked_by(body)
        if name != farm or certificates.fingerprint(asked) != key:
            raise ProtocolError("a farm renews its own certificate, for the key that it has")
        membership = member_of(self._config, self._state_dir, body)
        log.info("the certificate of farm %s is renewed", farm)
        return membership

    def leave(self, farm: str) -> None:
        """A farm gives its certificates back; raises FieldfedError."""
        revoke(self._config, self._state_dir, farm)
        log.info("farm %s has left", farm)

    def _require_never_revoked(self, key: str) -> None:
        """Raises LinkError for a key whose certificate was taken back: the device may be stolen."""
        path = self._identity / "issued.jsonl"
        gone = {one.serial for one in revoked_in(path)}
        for one in authority_of(self._config, self._state_dir).issued():
            if one.key == key and one.serial in gone:
                raise LinkError(
                    "the key of this device was revoked; move its state/identity folder away, so "
                    "that it makes a new one, and join with a new code"
                )


def enrol(config: ServerConfig, state_dir: Path, farm: str, hours: float) -> str:
    """A code with which a farm may join.

    Raises:
        ConfigError: there is no door, or it or the hub has no name, or the farm's name is none, or
            that of the centre, whose certificate may give orders.
        FieldfedError: the authority cannot be used.
    """
    if config.region is not None and farm == config.region.centre:
        raise ConfigError(f"'{farm}' is the name of this region's centre; choose another")
    if config.door is None:
        raise ConfigError("server.toml has no [door], where farms come in; add one, or use certify")
    for listener, section in ((config.door, "[door]"), (config.hub, "[hub]")):
        if listener is not None:
            address_of(listener, section)
    authority = authority_of(config, state_dir)
    return Codes(authority.folder).new(farm, hours, datetime.now(UTC))


def revoke(config: ServerConfig, state_dir: Path, farm: str) -> int:
    """Take a farm's certificates and its code back; returns how many counted until now.

    Raises:
        ConfigError: the farm was never given one.
        FieldfedError: the authority cannot be used.
    """
    authority = authority_of(config, state_dir)
    codes = Codes(authority.folder)
    had_code = codes.of(farm) is not None
    codes.remove(farm)
    try:
        return authority.revoke(farm)
    except ConfigError:
        if had_code:
            return 0
        raise


def members(state_dir: Path, now: datetime) -> list[dict[str, str]]:
    """Each farm that was given a certificate or a code, and how it stands.

    Raises:
        FieldfedError: a list is damaged.
    """
    identity = state_dir / "identity"
    gone = {one.serial for one in revoked_in(identity / "issued.jsonl")}
    rows = dict[str, dict[str, str]]()
    for one in Authority.open(identity).issued():
        over = "expired" if now >= one.expires else "member"
        state = "revoked" if one.serial in gone else over
        rows[one.farm] = {"farm": one.farm, "state": state, "until": f"{one.expires:%Y-%m-%d}"}
    for farm, code in Codes(identity).all().items():
        state = code.state(now)
        if state != "used" or farm not in rows:
            row = rows.setdefault(farm, {"farm": farm, "state": "invited", "until": "-"})
            row["code"] = f"{state}, until {code.expires:%Y-%m-%d %H:%M} UTC"
    return [rows[farm] for farm in sorted(rows)]
