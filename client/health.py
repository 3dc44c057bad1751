"""How a device is: processor, memory, disk, temperature, power, line.

All is read from files that the kernel shows to everybody, at any time; no program is started, and
nothing here needs a right of its own.

    temperature     thermal zones and hwmon chips that are named after a CPU; the hottest counts
    Raspberry Pi    get_throttled, a hexadecimal number of the firmware. Bit 0: under-voltage now,
                    1: frequency capped now, 2: throttled now, 3: soft temperature limit now; the
                    same from bit 16 on: since the last boot. Bits 0 and 2 are told. The file has
                    gone from kernels for the Pi 5, whose throttling is not known
                    in0_lcrit_alarm of the hwmon chip rpi_volt: under-voltage in the last 2 s
    Jetson          load of the GPU in thousandths; where it is depends on the release of JetPack
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

import psutil

from client import traffic
from common.topics import Telemetry

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["pi", "jetson", "other"]
Value = TypeVar("Value")

UNDER_VOLTAGE, THROTTLED = 1 << 0, 1 << 2
COLDEST, HOTTEST = -40.0, 130.0
"""Degrees Celsius: a sensor that is off, or has none behind it, says something else."""
MODEL_LENGTH: Final = 100
_CPU = re.compile(r"cpu|core|x86_pkg|k10temp|zenpower|^soc|^tj|bcm2835", re.IGNORECASE)
_BOARD = re.compile(r"^acpitz$")
"""Beside the processor: asked where the processor itself says nothing."""
_FIRMWARE = "sys/devices/platform/soc*/soc*:firmware/get_throttled"
_GPU: Final = (
    # never "**": there are tens of thousands of files below sys/devices
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
    "sys/class/devfreq/*gpu*/device/load",
    "sys/class/devfreq/*.g[apv]1*b/device/load",  # ga10b, gp10b, gv11b: JetPack 4 and 5
)


class Health:
    """Measures one device.

    Args:
        state_dir: of the farm; the disk that it is on counts, and its counters of bytes.
        root: above ``sys`` and ``proc``; another in tests.
    """

    def __init__(self, state_dir: Path, root: Path = Path("/")) -> None:
        self._state_dir, self._root = state_dir, root
        self._cpu = _tried(_cpu_seconds)
        self._share: float | None = None

    def measure(self) -> Telemetry:
        """How it is now; the processor's share is that since the last time. Raises nothing.

        What the outbox holds is not known here: it is for the caller to add.
        """
        memory, link = _tried(psutil.virtual_memory), traffic.fields(self._state_dir)
        flags = throttled_flags(self._root)
        return Telemetry(
            uptime_seconds=time.clock_gettime(time.CLOCK_BOOTTIME),
            cpu_ratio=self._cpu_ratio(),
            memory_used_bytes=None if memory is None else max(memory.total - memory.available, 0),
            memory_bytes=None if memory is None else memory.total,
            disk_free_bytes=_tried(lambda: _disk_free(self._state_dir)),
            temperature_celsius=temperature(self._root),
            throttled=None if flags is None else bool(flags & THROTTLED),
            under_voltage=under_voltage(self._root),
            gpu_ratio=gpu_ratio(self._root),
            link_sent_bytes=link.get("link_sent"),
            link_received_bytes=link.get("link_received"),
        )

    def _cpu_ratio(self) -> float | None:
        """The share since the last call; the one before where no time has passed since."""
        before, self._cpu = self._cpu, _tried(_cpu_seconds)
        if before is None or self._cpu is None:
            return None
        busy, total = (now - then for now, then in zip(self._cpu, before, strict=True))
        if total > 0:
            self._share = min(max(busy / total, 0.0), 1.0)
        return self._share


def _cpu_seconds() -> tuple[float, float]:
    """Seconds of all processors since the boot: busy, and all."""
    spent = psutil.cpu_times()
    guests = getattr(spent, "guest", 0.0) + getattr(spent, "guest_nice", 0.0)  # in user and nice
    total = sum(spent) - guests
    return total - spent.idle - getattr(spent, "iowait", 0.0), total


def _disk_free(folder: Path) -> int:
    """Bytes that a user may still write, also where the folder is yet to be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return psutil.disk_usage(str(folder)).free


def _tried(measure: Callable[[], Value]) -> Value | None:
    """What it yields; None where this machine does not tell."""
    try:
        return measure()
    except (OSError, ValueError, RuntimeError, psutil.Error) as error:
        log.debug("not measured: %s", error)
        return None


# --- what a machine is ---------------------------------------------------------------------------


def kind(root: Path = Path("/")) -> Kind:
    """Which family of machines this is; those that say nothing of themselves are "other"."""
    said = f"{_device_tree(root, 'model')} {_device_tree(root, 'compatible')}".lower()
    if "raspberry" in said or _first(root, _FIRMWARE) is not None:
        return "pi"
    return "jetson" if "nvidia" in said or "jetson" in said else "other"


def model(root: Path = Path("/")) -> str:
    """What the maker calls this machine, in at most ``MODEL_LENGTH`` letters; "" if unknown."""
    said = _device_tree(root, "model") or _text(root / "sys/class/dmi/id/product_name") or ""
    printable = "".join(letter if letter.isprintable() else " " for letter in said)
    return " ".join(printable.split())[:MODEL_LENGTH].strip()


def _device_tree(root: Path, name: str) -> str:
    """A property of the board, whose texts end with zeros; containers lack the first place."""
    for folder in ("proc/device-tree", "sys/firmware/devicetree/base"):
        if (said := _text(root / folder / name)) is not None:
            return said.replace("\0", " ").strip()
    return ""


# --- sensors -------------------------------------------------------------------------------------


def temperature(root: Path = Path("/")) -> float | None:
    """The hottest plausible place of the processor, in degrees Celsius."""
    found = [(name, value) for name, value in _sensors(root) if COLDEST < value < HOTTEST]
    for wanted in (_CPU, _BOARD):
        if near := [value for name, value in found if wanted.search(name)]:
            return max(near)
    return None


def _sensors(root: Path) -> Iterator[tuple[str, float]]:
    """Every sensor of temperature by the name of its zone or chip."""
    for path in _matching(root, "sys/class/thermal/thermal_zone*/temp"):
        yield from _sensor(path.with_name("type"), path)
    for path in _matching(root, "sys/class/hwmon/hwmon*/temp*_input"):
        yield from _sensor(path.with_name("name"), path)


def _sensor(name_file: Path, path: Path) -> Iterator[tuple[str, float]]:
    name, value = _text(name_file), _number(path)
    if name is not None and value is not None:
        yield name, value / 1000


def throttled_flags(root: Path = Path("/")) -> int | None:
    """What a Raspberry Pi's firmware says of its power, as bits."""
    path = _first(root, _FIRMWARE)
    return None if path is None else _number(path, base=16)


def under_voltage(root: Path = Path("/")) -> bool | None:
    """Whether a Raspberry Pi has too little power, as far as either of two files tells."""
    said = [] if (flags := throttled_flags(root)) is None else [bool(flags & UNDER_VOLTAGE)]
    for path in _matching(root, "sys/class/hwmon/hwmon*/in0_lcrit_alarm"):
        alarm = _number(path)
        if _text(path.with_name("name")) == "rpi_volt" and alarm is not None:
            said.append(bool(alarm))
    return any(said) if said else None


def gpu_ratio(root: Path = Path("/")) -> float | None:
    """Load of a Jetson's GPU."""
    for pattern in _GPU:
        for path in _matching(root, pattern):
            if (load := _number(path)) is not None:
                return min(max(load / 1000, 0.0), 1.0)
    return None


# --- files ---------------------------------------------------------------------------------------


def _matching(root: Path, pattern: str) -> list[Path]:
    return _tried(lambda: sorted(root.glob(pattern))) or []


def _first(root: Path, pattern: str) -> Path | None:
    return next(iter(_matching(root, pattern)), None)


def _text(path: Path) -> str | None:
    """What a file says; a sensor that is off makes reading fail."""
    with contextlib.suppress(OSError):
        return path.read_bytes()[:4096].decode(errors="replace").strip()
    return None


def _number(path: Path, base: int = 10) -> int | None:
    text = _text(path)
    return None if text is None else _tried(lambda: int(text, base))
