"""Whom a farm belongs to and whom it reaches, for the doctor (client/doctor.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from client import reach
from client.agent import NETWORK
from client.door import way_of
from client.identity import ClientFiles, FarmIdentity
from client.joining import RENEW_DAYS
from client.teller import SESSION_SECONDS
from client.trust import Trust
from common.broker import Broker
from common.checkup import private
from common.config import FarmConfig
from common.diagnosis import Finding, fault, looked, of_error, ok, warn
from common.errors import FieldfedError
from common.greeting import broker_findings
from common.membership import Membership
from common.sqlite import held

LATE_DAYS = RENEW_DAYS // 2
"""A certificate that renews itself is renewed by then."""


def network(config: FarmConfig, folder: Path) -> Iterator[Finding]:
    """Membership, key, certificate, door, hub, broker; what hangs on a fault is left out."""
    farm = _Farm(config, folder, folder / "state")
    path, member = farm.state / "membership.json", None
    try:
        member = Membership.load(path) if path.exists() else None
    except FieldfedError as error:
        yield of_error("membership", error)
    else:
        yield from farm.belongs(member)
    if config.broker is not None:
        name = NETWORK if member is None else member.network
        yield from looked("broker", partial(farm.broker, config.broker, name))


@dataclass(frozen=True)
class _Farm:
    config: FarmConfig
    folder: Path
    state: Path

    def belongs(self, member: Membership | None) -> Iterator[Finding]:
        """To whom, whether it can show that, and whether it is let in."""
        name = self.config.farm.name
        if member is None:
            yield ok("membership", f"farm {name} is of no network: its server is on this machine")
            yield from looked("door", self._door)
            return
        said = f"farm {member.farm} of network {member.network}"
        if member.farm != name:
            remedy = f'set [farm] name = "{member.farm}", or join again'
            yield fault("membership", f"{said}, but in the settings it is {name}", remedy)
            return
        yield ok("membership", said)
        try:
            identity = FarmIdentity.open(self.state / "identity", name)
            yield ok("key", "it can be read, by this user alone")
        except FieldfedError as error:
            yield of_error("key", error)
            return
        try:
            files = identity.credentials()
            yield self._certificate(identity.days_left())
        except FieldfedError as error:
            yield of_error("certificate", error, f"join again: {self._join}")
            return
        yield from looked("door", self._door)
        if member.hub is not None:
            yield from looked("hub", partial(self._hub, member, member.hub, files))

    @property
    def _join(self) -> str:
        return f"fieldfed-client join {self.folder} https://DOOR CODE"

    def _certificate(self, left: int) -> Finding:
        said = f"it is good for {left} days"
        if left < LATE_DAYS:
            remedy = f"let fieldfed-client run, which renews it at the door, or {self._join}"
            return warn("certificate", f"{said}; it should have been renewed", remedy)
        return ok("certificate", said)

    def _door(self) -> Iterator[Finding]:
        way = way_of(self.config.farm, self.state)
        yield from reach.superlink(way.address) if way.tls is None else reach.door(way)

    def _hub(self, member: Membership, address: str, files: ClientFiles) -> Iterator[Finding]:
        trust = Trust(self.state / "trust.json", member.keys, datetime.now(UTC))
        yield from reach.hub(address, files, self.config.farm.channel, trust)

    def broker(self, where: Broker, network: str) -> Iterator[Finding]:
        """The broker, and what the farm shows there."""
        secret = where.password is not None
        yield from private([self.folder / "farm.toml"] if secret else [])
        yield from private([where.key] if where.key is not None else [])
        name = self.config.farm.device or self.config.farm.name
        holder = "this farm's program" if held(self.state / "outbox.db") else None
        yield from broker_findings(where, network, name, SESSION_SECONDS, holder)
