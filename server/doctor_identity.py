"""Who is who in a network: authority, certificates, signing keys, members; for the doctor."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509

from common import certificates
from common.config import ServerConfig
from common.diagnosis import Finding, Level, fault, looked, of_error, ok, warn
from common.errors import FieldfedError
from server.hosts import names_in, names_of
from server.identity import BROKER, RENEW_BEFORE, Authority
from server.issued import Issued, revoked_in, seen_in
from server.keys import SigningKeys
from server.members import EVERYWHERE

SOON = timedelta(days=30)
AUTHORITY_SOON = timedelta(days=365)
"""Before it ends, every farm has to have joined again."""
_RESTORE = "restore the folder from a backup"
_ANEW = "set the network up anew: every farm has to join again"
_RECERTIFY = "fieldfed-server certify-broker, and give the broker its new files"
_TRACES = ("identity", "signing", "registry", "fieldfed.db")
SHOWN = 5
"""Farms that one line names."""


def identity(config: ServerConfig, folder: Path) -> Iterator[Finding]:
    """Authority, certificates, signing keys and members of a server's folder."""
    place = folder / "identity"
    if not any((folder / name).exists() for name in _TRACES):
        yield ok("authority", "not made yet, nor are the signing keys: the first 'up' makes them")
        return
    if not place.exists():
        found = f"there is no '{place}'"
        remedy = "restore it from a backup; else the next 'up' makes it, and every farm joins again"
        yield fault("authority", found, remedy)
    else:
        yield from looked("authority", partial(_authority, config, place))
        yield from looked("members", partial(_members, folder))
    yield from looked("signing keys", partial(_signing, folder / "signing"))


def _authority(config: ServerConfig, place: Path) -> Iterator[Finding]:
    try:
        authority = Authority.open(place)
    except FieldfedError as error:
        yield of_error("authority", error, _RESTORE)
        return
    own = _ends("authority", place / "ca.crt", AUTHORITY_SOON, _ANEW)
    yield own
    if own.level is Level.FAULT:  # with it ends all that it has signed
        return
    try:
        yield _server(config, authority.server_credentials().certificate)
    except FieldfedError as error:
        remedy = "fieldfed-server up renews it where [door] or [hub] is set"
        yield of_error("server certificate", error, remedy)
    for name in ("broker.crt", "server.crt"):
        if (path := place.parent / BROKER / name).exists():
            yield _ends("broker certificate", path, SOON, _RECERTIFY)


def _ends(what: str, path: Path, soon: timedelta, remedy: str) -> Finding:
    certificate = certificates.read_certificate(path, remedy)
    end, now = certificate.not_valid_after_utc, datetime.now(UTC)
    said = f"'{path}' is of {certificates.common_name(certificate.subject)}, until {end:%Y-%m-%d}"
    if end < now:
        return fault(what, f"{said}: it has expired", remedy)
    return warn(what, said, remedy) if end < now + soon else ok(what, said)


def _server(config: ServerConfig, shown: bytes) -> Finding:
    what, certificate = "server certificate", certificates.parse_certificate(shown, "it")
    end = certificate.not_valid_after_utc
    said, restart = f"until {end:%Y-%m-%d}", "restart fieldfed-server up, which renews it"
    missing = _wanted(config) - set(names_in(certificate))
    if missing:
        names = ", ".join(sorted(_name(one) for one in missing))
        return warn(what, f"it does not have the names that are set: {names}", restart)
    if end < datetime.now(UTC) + RENEW_BEFORE / 2:
        return warn(what, said, restart)
    return ok(what, said)


def _wanted(config: ServerConfig) -> set[x509.GeneralName]:
    """By what farms reach door and hub; where that is not said, it is a fault of the settings."""
    listeners = [one for one in (config.door, config.hub) if one is not None]
    hosts = [host for one in listeners for host in one.names or (one.host,)]
    return set(names_of([host for host in hosts if host not in EVERYWHERE])) if hosts else set()


def _name(name: x509.GeneralName) -> str:
    return str(name.value)


def _signing(place: Path) -> Iterator[Finding]:
    keys = SigningKeys.open(place).keys
    now, ends = datetime.now(UTC), [one.until for one in keys.keys]
    if None in ends:
        yield ok("signing keys", f"{len(ends)} of network {keys.network}, readable by us alone")
        return
    last = max(end for end in ends if end is not None)
    remedy = "fieldfed-server registry exchange-keys"
    said = f"the last of them counts until {last:%Y-%m-%d}"
    yield fault("signing keys", said, remedy) if last < now else warn("signing keys", said, remedy)


# --- members -------------------------------------------------------------------------------------


def _members(folder: Path) -> Iterator[Finding]:
    now, path = datetime.now(UTC), folder / "identity" / "issued.jsonl"
    newest = {one.farm: one for one in seen_in(path)}
    soon = _farms(newest, now - SOON, now + SOON)
    if soon:
        named = ", ".join(f"{one.farm} ({one.expires:%Y-%m-%d})" for one in soon[:SHOWN])
        found = f"of {len(newest)}, {len(soon)} have certificates that end or ended within 30 days"
        remedy = "let these farms run, which renews them at the door; else enrol or revoke them"
        yield warn("members", f"{found}: {named}", remedy)
    else:
        yield ok("members", f"{len(newest)} with a certificate, none of which ends within 30 days")


def _farms(newest: Mapping[str, Issued], begin: datetime, end: datetime) -> Sequence[Issued]:
    return sorted(
        (one for one in newest.values() if begin < one.expires < end), key=lambda one: one.expires
    )


def revoked(folder: Path) -> frozenset[str]:
    """Farms of which no certificate counts any more; StateError and OSError as ``seen_in``."""
    path = folder / "identity" / "issued.jsonl"
    return frozenset(one.farm for one in revoked_in(path)) - {one.farm for one in seen_in(path)}
