"""What keeps a network from working: ``fieldfed-server doctor`` looks, and changes nothing.

Each check is on its own (common/diagnosis.py). What cannot be known because of a fault that was
said already is left out. Databases are opened so that not even SQLite leaves a file beside them.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from common.broker import Broker
from common.checkup import database, date, json_files, memory, private, programs, room, writable
from common.config import BackboneConfig, ServerConfig
from common.diagnosis import Finding, Level, fault, looked, ok, warn
from common.errors import ConfigError, FieldfedError, StateError
from common.greeting import broker_findings
from common.images import count
from common.settings import load_settings
from common.sqlite import held, looking
from common.topics import SERVER
from server.actions import Actions
from server.bridge import NOTICES, SESSION_SECONDS
from server.database import Database
from server.doctor_identity import identity, revoked
from server.doctor_ports import ports
from server.migrations import require_known
from server.registry import CHANNEL_DAYS
from server.store import Store
from server.telemetry import NAME as TELEMETRY
from server.telemetry import TelemetryStore
from server.versions import Versions

ROOM_BYTES = 2_000_000_000
"""Candidates of some twenty rounds of a ViT-S."""
WHOLE_BYTES, FREE_BYTES = 3_500_000_000, 500_000_000
"""Of memory: a machine sold with 4 GB."""
SPOOL_BYTES = 500_000_000
VERSION_SOON = timedelta(days=30)
BASE_FILE = "base.safetensors"
_STORE, _REGISTRY = "fieldfed.db", "registry/registry.db"
_KINDS: dict[str, type[Database]] = {
    _STORE: Store,
    _REGISTRY: Versions,
    TELEMETRY: TelemetryStore,
    "actions.db": Actions,
}
_RESTORE = "stop the server, copy the folder as it is, and restore this file from a backup"
_REMEDIES = {
    TELEMETRY: "restart fieldfed-server up: the bridge sets it aside and begins anew",
    NOTICES: "restart fieldfed-server up: the bridge sets it aside and begins anew",
    "flower/superlink.db": "stop the server and move this file away: runs go on from the store",
}
_SECRETS = ("page.token", "flower/superexec.secret", "broker/broker.key", "broker/server.key")
_PROGRAMS = ("flower-superlink", "flower-superexec", "flwr")


def examine(folder: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Look at a server.

    Args:
        folder: of the server.
        root: above ``sys`` and ``run``; another in tests.

    Yields:
        A finding of each thing, as soon as it was looked at.
    """
    path = folder / "server.toml"
    try:
        config = load_settings(ServerConfig, path)
    except ConfigError as error:
        remedy = f"correct '{path}'" if path.is_file() else f"fieldfed-server init {folder}"
        yield fault("settings", str(error).partition("; create")[0], remedy)
    else:
        yield ok("settings", f"'{path}' is that of network {config.server.name}")
        yield from looked("backbone", partial(_backbone, config.backbone, folder))
        yield from looked("ports", partial(ports, config, folder))
        yield from looked("identity", partial(identity, config, folder))
        if config.broker is not None:
            yield from looked("broker", partial(_broker, config.broker, config.server.name, folder))
    yield from looked("programs", partial(programs, folder, _PROGRAMS, "server"))
    yield from looked("state", partial(writable, folder))
    yield from looked("files", lambda: json_files(_files(folder)))
    yield from looked("secrets", lambda: private(map(folder.joinpath, _SECRETS)))
    for name in (*_KINDS, NOTICES, "flower/superlink.db"):
        yield from looked("databases", partial(_database, folder, name))
    yield from looked("channels", partial(_channels, folder))
    yield from looked("devices", partial(_devices, folder))
    yield from looked("spool", partial(_spool, folder))
    yield from looked("date", lambda: date([path, *map(folder.joinpath, _KINDS)], root))
    yield from looked("disk", lambda: [room(folder, ROOM_BYTES, "a run")])
    yield from looked("memory", lambda: [_memory(root)])


def _files(folder: Path) -> dict[Path, str]:
    return {
        folder / "nodes.json": "remove it and restart 'up': SuperNodes then register again",
        folder / "identity" / "codes.json": "remove it, and enrol anew who has not joined yet",
    }


def _memory(root: Path) -> Finding:
    return memory(WHOLE_BYTES, FREE_BYTES, "a run with 500 farms takes 1.4 GB", root)


def _backbone(config: BackboneConfig, folder: Path) -> Iterator[Finding]:
    made = (folder / BASE_FILE).is_file()
    if config.weights is not None and config.weights.partition(":")[0] != "hub":
        path = Path(config.weights)
        if not path.is_file():
            found, remedy = f"there is no '{path}'", "correct [backbone] weights, or put it there"
            if made:
                yield warn("weights", f"{found}; only a new pretrain reads it", remedy)
            else:
                yield fault("weights", found, remedy)
        else:
            yield ok("weights", f"'{path}', {path.stat().st_size / 1e6:,.0f} MB")
    if config.source is not None:
        try:
            classes, images = count(config.source)
            yield ok("source", f"'{config.source}' has {images} images in {classes} classes")
        except FieldfedError as error:
            found = str(error).partition("; ")[0]
            yield fault("source", found, "correct [backbone] source: anchors and cuts need it")
    if made:
        yield ok("backbone", f"'{folder / BASE_FILE}' is there")
    else:
        yield warn("backbone", "none is there yet", f"fieldfed-server pretrain {folder}")


def _broker(where: Broker, network: str, folder: Path) -> Iterator[Finding]:
    holder = "the bridge" if held(folder / NOTICES) else None
    yield from broker_findings(where, network, SERVER, SESSION_SECONDS, holder)


# --- databases -----------------------------------------------------------------------------------


def _database(folder: Path, name: str) -> Iterator[Finding]:
    """Whether it is whole, and of a release that this program knows."""
    path, kind = folder / name, _KINDS.get(name)
    found = list(database(path, _REMEDIES.get(name, _RESTORE)))
    whole = [one.level for one in found] == [Level.OK]
    if whole and kind is not None:
        try:
            with looking(path) as db:
                require_known(db, len(kind.migrations))
        except (sqlite3.Error, StateError) as error:
            remedy = "install the newer fieldfed that wrote it"
            found = [fault(f"database {path.name}", str(error).partition("; ")[0], remedy)]
    yield from found


def _channels(folder: Path) -> Iterator[Finding]:
    path, now = folder / _REGISTRY, datetime.now(UTC).timestamp()
    if not path.exists():
        return
    try:
        with looking(path) as db:
            rows = Versions(path, db).channels()
    except (sqlite3.Error, StateError):
        return  # said of the database
    remedy = "start fieldfed-server up with a [hub], which signs it again"
    for row in rows:
        what, end = f"channel {row.name}", datetime.fromtimestamp(row.expires, UTC)
        said = f"it names version {row.version}, and is signed until {end:%Y-%m-%d}"
        if row.expires < now:
            yield fault(what, f"{said}: devices take nothing from it", remedy)
        elif row.expires < now + 86_400 * CHANNEL_DAYS / 3:  # renewed when half of it is over
            yield warn(what, said, remedy)
        else:
            yield ok(what, said)


def _devices(folder: Path) -> Iterator[Finding]:
    """Those of revoked farms that a broker still lets in."""
    path = folder / TELEMETRY
    with contextlib.suppress(sqlite3.Error, StateError, OSError):  # said of the files
        gone = revoked(folder)
        if not gone or not path.exists():
            return
        with looking(path) as db:
            here = [one for one in TelemetryStore(path, db).devices() if one.presence == "online"]
        names = [one.name for one in here if (one.farm or one.name) in gone]
        if names:
            found = f"of revoked farms, still connected to the broker: {', '.join(names[:5])}"
            crl = folder / "identity" / "revoked.crl"
            yield warn("devices", found, f"give the broker '{crl}' and reload it")


def _spool(folder: Path) -> Iterator[Finding]:
    """Replies of rounds that nobody works on."""
    files = [path for path in (folder / "spool").rglob("*") if path.is_file()]
    size, path = sum(one.stat().st_size for one in files), folder / _STORE
    running = False
    with contextlib.suppress(sqlite3.Error, StateError):
        if path.exists():
            with looking(path) as db:
                last = Store(path, db).latest_run()
            running = last is not None and last.state == "running"
    said = f"{size / 1e6:,.0f} MB of replies wait for the end of their round"
    if size > SPOOL_BYTES and not running:
        yield warn("spool", f"{said}, and no run goes on", "start a run: it sweeps what is left")
    elif size:
        yield ok("spool", said)
