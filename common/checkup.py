"""What a doctor looks at on any machine, of a farm or of a server (common/diagnosis.py)."""

import contextlib
import errno
import http.client
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from common.diagnosis import Finding, fault, ok, warn
from common.ports import holder_words, refusal
from common.programs import child_environment, programs_of
from common.release import FLOWER, installed, release
from common.sqlite import fault_in, is_damage, is_held

CHECK_SECONDS = 20.0
"""That the check of one database may take."""
ANSWER_SECONDS = 10.0
EARLIER_SECONDS = 60.0
"""A file that was written later than now: the clock has gone back."""
NEEDED = ("torch", "timm")
"""Of a server and of a farm that trains, beside Flower."""
LEAST_SHARE = 0.1
"""Of the room that is needed: below it nothing can be kept any more."""


# --- the machine ---------------------------------------------------------------------------------


def room(folder: Path, needed: int, who: str) -> Finding:
    """Whether the disk of a folder has so many bytes left."""
    place = existing(folder)
    free = shutil.disk_usage(place).free
    said = f"'{place}' has {free / 1e6:,.0f} MB left; {who} needs {needed / 1e6:,.0f}"
    if free < LEAST_SHARE * needed:
        return fault("disk", said, "make room: what cannot be written stops the work")
    if free < needed:
        return warn("disk", said, "make room before it is full")
    return ok("disk", said)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def writable(folder: Path) -> Iterator[Finding]:
    """A fault where this user may not write in a folder that is there."""
    place = existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        yield fault(
            "state",
            f"this user may not write in '{place}'",
            f"run the command as the user that owns it, or: sudo chown -R $USER '{place}'",
        )


def memory(total: int, free: int, who: str, root: Path = Path("/")) -> Finding:
    """Whether the machine, or its container, has so many bytes in all, and so many free now."""
    found = psutil.virtual_memory()
    most = min(found.total, _limit(root) or found.total)
    said = f"{most / 1e9:.1f} GB, {found.available / 1e9:.1f} GB of it free; {who}"
    if most < total:
        return warn(
            "memory", said, f"use a machine with {total / 1e9:.1f} GB, or add compressed swap"
        )
    if found.available < free:
        return warn("memory", said, "stop other programs, or add compressed swap (zram)")
    return ok("memory", said)


def _limit(root: Path) -> int | None:
    """Of this container, if it has one."""
    try:
        return int((root / "sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # none, or "max"
        return None


def date(written: Iterable[Path], root: Path = Path("/")) -> Iterator[Finding]:
    """Whether the clock can be right, as far as one machine can tell by itself."""
    now, remedy = datetime.now(UTC), "set the clock: sudo timedatectl set-ntp true"
    dated = [(path.stat().st_mtime, path) for path in written if path.exists()]
    latest, path = max(dated, default=(0.0, Path()))
    if latest > now.timestamp() + EARLIER_SECONDS:
        when = datetime.fromtimestamp(latest, UTC)
        said = f"the clock says {_minute(now)}, and '{path}' was written at {_minute(when)}"
        yield fault("date", f"{said}: the clock has gone back", remedy)
        return
    service = root / "run/systemd/timesync"
    if service.is_dir() and not (service / "synchronized").exists():
        yield warn(
            "date", f"the clock says {_minute(now)}, and nothing keeps it in step yet", remedy
        )
        return
    yield ok("date", f"the clock says {_minute(now)}")


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


# --- ports ---------------------------------------------------------------------------------------


def port(setting: str, host: str, number: int, ours: Callable[[], bool]) -> Finding:
    """Whether a program of ours listens there, or could.

    Args:
        setting: the section of the settings that names the port, for example "[door]".
        host: to listen on.
        number: of the port.
        ours: whether what listens there is ours; asked where something does.
    """
    what, error = f"port {number}", refusal(host, number)
    if error is None:
        return ok(what, f"of {setting} is free: nothing runs there now")
    if error.errno == errno.EACCES:
        remedy = f"choose a {setting} port from 1024 on, or let systemd give CAP_NET_BIND_SERVICE"
        return fault(what, f"of {setting} is not for this user", remedy)
    if error.errno != errno.EADDRINUSE:
        remedy = f"set {setting} host to an address of this machine, or 0.0.0.0"
        return fault(what, f"of {setting}: '{host}' cannot be listened on ({error})", remedy)
    if ours():
        return ok(what, f"of {setting} is held by our own program, which answers")
    found = f"of {setting} is held{holder_words(number)}, which is none of ours"
    return fault(what, found, f"stop that program, or choose another {setting} port")


def shows(host: str, number: int, path: str, word: str) -> bool:
    """Whether there is a page on this machine that answers with this word."""
    link = http.client.HTTPConnection(near(host), number, timeout=ANSWER_SECONDS)
    try:
        with contextlib.closing(link):
            link.request("GET", path, headers={"Host": f"localhost:{number}"})
            response = link.getresponse()
            return response.status == 200 and word in response.read(100_000).decode(
                errors="replace"
            )
    except (OSError, http.client.HTTPException):
        return False


def near(host: str) -> str:
    """By which this machine reaches what listens there."""
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


# --- what is installed ---------------------------------------------------------------------------


def programs(state_dir: Path, names: Sequence[str], extra: str) -> Iterator[Finding]:
    """Whether the releases go together, and Flower's programs are found where we look for them.

    Args:
        state_dir: of the farm or the server.
        names: of the programs.
        extra: of our package, which brings them.
    """
    flower, remedy = installed("flwr"), f"pip install -c constraints.txt 'fieldfed[{extra}]'"
    if flower is None:
        yield fault("programs", f"fieldfed {release()}, and Flower is not installed", remedy)
        return
    path = child_environment(programs_of(state_dir))["PATH"]
    missing = [name for name in names if shutil.which(name, path=path) is None]
    missing += [name for name in NEEDED if installed(name) is None]
    if missing:
        yield fault("programs", f"not installed: {', '.join(missing)}", remedy)
        return
    said = f"fieldfed {release()}, Flower {flower}"
    if flower == FLOWER:
        yield ok("programs", said)
        return
    said = f"{said}; this release was made for Flower {FLOWER}"
    same_line = flower.split(".")[:2] == FLOWER.split(".")[:2]
    yield (warn if same_line else fault)("programs", said, remedy)


# --- databases -----------------------------------------------------------------------------------


def database(path: Path, remedy: str) -> Iterator[Finding]:
    """Whether a database is whole; nothing where there is none. ``remedy``: for a damaged one."""
    what = f"database {path.name}"
    if not path.exists():
        return
    try:
        damage = fault_in(path, CHECK_SECONDS)
    except (sqlite3.Error, OSError) as error:
        yield _unread(what, path, error, remedy)
        return
    if damage is not None:
        yield fault(what, f"'{path}' is damaged ({damage})", remedy)
        return
    yield ok(what, f"'{path}' is whole, {path.stat().st_size / 1e6:,.1f} MB")


def _unread(what: str, path: Path, error: Exception, remedy: str) -> Finding:
    if isinstance(error, sqlite3.Error) and is_damage(error):
        return fault(what, f"'{path}' is damaged ({error})", remedy)
    if isinstance(error, sqlite3.Error) and is_held(error):
        return ok(what, f"'{path}' is in use by its program, which checks it when it starts")
    if not os.access(path, os.R_OK):
        return fault(what, f"this user may not read '{path}'", "run this as the user that owns it")
    log, index = (path.with_name(f"{path.name}-{end}") for end in ("wal", "shm"))
    if log.exists() and not index.exists():
        return ok(
            what, f"'{path}' was in use when the power went; its program checks it at its start"
        )
    return fault(what, f"'{path}' cannot be read ({error})", remedy)


def json_files(remedies: Mapping[Path, str]) -> Iterator[Finding]:
    """Whether each of these files, as far as they are there, holds JSON; with what to do if not."""
    read, bad = 0, False
    for path, remedy in remedies.items():
        try:
            json.loads(path.read_bytes())
            read += 1
            continue
        except FileNotFoundError:
            continue
        except OSError as error:
            why = f"'{path}' cannot be read: {error.strerror or error}"
            yield fault("files", why, "run this as the user that owns it")
        except ValueError:
            yield fault("files", f"'{path}' is damaged: it is no JSON", remedy)
        bad = True
    if read and not bad:
        yield ok("files", f"{read} of the state can be read")


def private(paths: Iterable[Path]) -> Iterator[Finding]:
    """A warning for each of these that other users may read; they hold secrets."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                found = f"'{path}' holds a secret, and other users may read it (mode {mode:o})"
                yield warn("secrets", found, f"chmod 600 '{path}'")
