"""What keeps a farm from working: ``fieldfed-client doctor`` looks, and changes nothing.

Each check is on its own (common/diagnosis.py). What cannot be known because of a fault that was
said already is left out: without settings nobody knows the images, without a certificate nobody
asks the door.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from client import health
from client.doctor_network import network
from client.figures import PREFIX
from client.joining import ROOM_BYTES
from client.served import Named, Served
from common.checkup import (
    database,
    date,
    json_files,
    memory,
    port,
    private,
    programs,
    room,
    shows,
    writable,
)
from common.config import FarmConfig
from common.diagnosis import Finding, fault, looked, ok, warn
from common.errors import ConfigError
from common.images import MIN_IMAGES, census
from common.objects import Objects
from common.services import MetricsConfig
from common.settings import load_settings

FEW_IMAGES = 10
"""Of a class: two of them decide, and say little."""
SOON = timedelta(days=30)
HOT_CELSIUS = 80.0
"""A Raspberry Pi becomes slower from here on."""
WHOLE_BYTES, FREE_BYTES = 3_500_000_000, 1_200_000_000
"""Of memory: a board sold with 4 GB; what an alignment of a ViT-S takes beside Python's modules."""
_UNDER_VOLTAGE_BEFORE = health.UNDER_VOLTAGE << 16
_PROGRAMS = ("flower-supernode",)
_DATABASES = {
    "ledger.db": "restart fieldfed-client run: it is set aside, and a new one is begun",
    "outbox.db": "restart fieldfed-client run: it is set aside, and what waited there is lost",
}
_SUPPLY = "use the supply made for this board, and a short cable; drives get one of their own"


def examine(folder: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Look at a farm.

    Args:
        folder: of the farm.
        root: above ``sys``, ``proc`` and ``run``; another in tests.

    Yields:
        A finding of each thing, as soon as it was looked at.
    """
    path, state = folder / "farm.toml", folder / "state"
    try:
        config = load_settings(FarmConfig, path)
    except ConfigError as error:
        remedy = f"correct '{path}'" if path.is_file() else f"fieldfed-client init {folder} --data"
        yield fault("settings", str(error).partition("; create")[0], remedy)
    else:
        yield ok("settings", f"'{path}' is that of farm {config.farm.name}")
        yield from looked("images", partial(_images, config.farm.data))
        if config.watch is not None:
            yield from looked("camera", partial(_camera, config.watch.folder))
        yield from looked("version", partial(_version, folder))
        yield from network(config, folder)
        if config.metrics is not None:
            yield from looked("metrics", partial(_shown, config.metrics))
    yield from looked("programs", partial(programs, state, _PROGRAMS, "client"))
    yield from looked("state", partial(writable, state))
    yield from looked("files", lambda: json_files(_files(state)))
    yield from looked("secrets", partial(private, [state / "privacy.key"]))
    for name, remedy in _DATABASES.items():
        yield from looked("databases", partial(database, state / name, remedy))
    yield from looked("date", lambda: date([path, *state.glob("*.json")], root))
    yield from looked("disk", lambda: [room(state, ROOM_BYTES, "a farm")])
    yield from looked("memory", lambda: [_memory(root)])
    yield from looked("power", partial(power, root))


# --- what it works on ----------------------------------------------------------------------------


def _images(data: Path) -> Iterator[Finding]:
    counts = census(data)
    fewest = min(counts, key=lambda name: counts[name])
    said = f"'{data}' has {sum(counts.values())} to learn from, in {len(counts)} classes"
    if counts[fewest] < MIN_IMAGES:
        found = f"{said}, and class '{fewest}' has {counts[fewest]}: it needs {MIN_IMAGES}"
        yield fault("images", found, "add photographs, or remove the folder")
    elif counts[fewest] < FEW_IMAGES:
        found = f"{said}, and class '{fewest}' has only {counts[fewest]}"
        yield warn("images", found, f"add photographs: {FEW_IMAGES} or more of each class")
    else:
        yield ok("images", said)


def _camera(folder: Path) -> Iterator[Finding]:
    if folder.is_dir():
        yield ok("camera", f"'{folder}' is there")
        return
    remedy = "make it, or let [watch] folder name the one into which the camera drops photographs"
    yield fault("camera", f"there is no folder '{folder}'", remedy)


def _version(folder: Path) -> Iterator[Finding]:
    served, update = Served(folder / "state" / "serving"), f"fieldfed-client update {folder}"
    try:
        current = Named.model_validate_json(served.file.read_bytes()).current
    except FileNotFoundError:
        current = None
    except ValidationError:
        yield fault("version", f"'{served.file}' is damaged", update)
        return
    if current is None:
        yield ok("version", "none is in use yet")
        return
    about = served.about()
    if about is None:
        path = served.folder / "bundles" / f"{current}.safetensors"
        yield fault("version", f"'{path}' is missing or damaged", update)
        return
    objects = Objects(served.folder / "objects")
    sizes = {objects.path(digest): size for digest, size in about.manifest.weights.items()}
    lost = [path for path, size in sizes.items() if not _holds(path, size)]
    if lost:
        found = f"'{lost[0]}' is missing or cut off, as are {len(lost)} of {len(sizes)} tensors"
        yield fault("version", found, update)
        return
    number, ends = about.manifest.counter, about.manifest.expires
    said = f"version {number} is in use, good until {ends:%Y-%m-%d}"
    if ends < datetime.now(UTC) + SOON:
        yield warn("version", said, f"ask for a newer one to be published; then {update}")
        return
    yield ok("version", said)


def _holds(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _shown(where: MetricsConfig) -> Iterator[Finding]:
    ours = partial(shows, where.host, where.port, "/metrics", PREFIX)
    yield port("[metrics]", where.host, where.port, ours)


# --- its machine ---------------------------------------------------------------------------------


def _files(state: Path) -> dict[Path, str]:
    anew = "remove it: it is made anew"
    return {
        state / "trust.json": "remove it: trust begins again with the membership",
        state / "serving" / "offered.json": anew,
        state / "images.json": anew,
        state / "traffic.json": "remove it: bytes are counted from 0",
        state / "traffic-hub.json": "remove it: bytes are counted from 0",
        state / "privacy.json": "restore it from a backup: it says how much privacy is spent",
    }


def _memory(root: Path) -> Finding:
    who = f"training takes some {FREE_BYTES / 1e9:.1f} GB"
    return memory(WHOLE_BYTES, FREE_BYTES, who, root)


def power(root: Path) -> Iterator[Finding]:
    """Whether the board has enough power, and is cool enough, as far as it tells."""
    flags, degrees = health.throttled_flags(root) or 0, health.temperature(root)
    low = health.under_voltage(root)
    if low:
        yield fault("power", "the voltage is too low now", _SUPPLY)
    elif flags & health.THROTTLED:
        yield warn("power", "the board is throttled now", f"cool it; {_SUPPLY}")
    elif flags & _UNDER_VOLTAGE_BEFORE:
        yield warn("power", "the voltage was too low since the last boot", _SUPPLY)
    elif low is not None:
        yield ok("power", "the voltage is high enough")
    if degrees is not None and degrees >= HOT_CELSIUS:
        yield warn("temperature", f"{degrees:.0f} degrees Celsius", "give it air, or a fan")
    elif degrees is not None:
        yield ok("temperature", f"{degrees:.0f} degrees Celsius")
