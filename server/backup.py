"""A copy of all that a server knows, made also while it works, and the way back.

    backup.json    last in the archive, so one that was cut off has none: of which network it is,
                   of when, and the sha256 of every other file in it
    all else       as it lies in the server's folder (deploy/README.md)

SQLite copies its files itself, each as of one instant. Files that they name are read after them and
so are there; of a round that is open, a reply may be missing, which its farm sends again. What
belongs to processes alone (logs, Flower's files, locks) is left out.

Devices may have seen a newer state than the copy has. On the way back every channel is therefore
signed again, with a number above all that was signed before: it counts the seconds.
"""

import hashlib
import logging
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from common.config import ServerConfig
from common.errors import ConfigError, DiskError, StateError
from common.files import make_folder, only_one, sync, write_atomically
from common.settings import load_settings
from server.identity import Authority
from server.registry import LOCK, Registry

log = logging.getLogger(__name__)

ABOUT, SETTINGS = "backup.json", "server.toml"
WAITING = ".server.toml"
"""The settings until all else is there: without them no command works on half a folder."""
LEFT_OUT = frozenset({"logs", "flower", "flower-app", "programs", "bodies", "notices.db"})
BULK = frozenset({"models", "anchors", "spool", "registry"})
PASSING = "spool"
ENDINGS = ("-wal", "-shm", "-journal", ".lock", ".part")
BUSY_SECONDS = 30.0
REGISTRY_SECONDS = 60.0
"""That a version which is being published is waited for."""
PIECE_BYTES = 1 << 20


class Contents(BaseModel):
    """What an archive holds; ``files`` are sha256 by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    network: str
    made: AwareDatetime
    bytes: int = Field(ge=0)
    files: dict[str, str]


# --- there ---------------------------------------------------------------------------------------


def back_up(folder: Path, file: Path) -> Contents:
    """Write a server's folder as one file, whole or not at all, that this user alone may read.

    Args:
        folder: of the server, which may be working.
        file: to write; one that is there is replaced.

    Raises:
        ConfigError: the folder is no server's, or the file would lie in it.
        StateError: something in the folder is damaged, or the registry is being changed.
        DiskError: the file cannot be written.
    """
    name = load_settings(ServerConfig, folder / SETTINGS).server.name
    if file.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"'{file}' lies in '{folder}'; write the backup somewhere else")
    try:
        make_folder(file.absolute().parent)
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=file.absolute().parent) as room:
            made = _write(folder, Path(room) / "archive", name)
            (Path(room) / "archive").replace(file)
        sync(file.absolute().parent)
    except (OSError, tarfile.TarError) as error:
        raise DiskError(f"cannot write '{file}': {error}; make room, or choose a place") from error
    return made


def _write(folder: Path, file: Path, network: str) -> Contents:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as raw:
        with tarfile.open(fileobj=raw, mode="w") as archive:
            packer = _Packer(folder, archive, file.with_name("copy.db"))
            made = Contents(
                network=network,
                made=datetime.now(UTC).replace(microsecond=0),
                files=packer.pack(),
                bytes=packer.bytes,
            )
            about = file.with_name(ABOUT)
            write_atomically(about, made.model_dump_json(indent=1).encode())
            archive.add(about, ABOUT)
        raw.flush()
        os.fsync(raw.fileno())
    return made


class _Packer:
    """Puts a folder into an archive; ``bytes`` counts."""

    def __init__(self, folder: Path, archive: tarfile.TarFile, copy: Path) -> None:
        self._folder, self._archive, self._copy = folder, archive, copy
        self._files: dict[str, str] = {}
        self.bytes = 0

    def pack(self) -> dict[str, str]:
        """All of it, databases before what they name; returns sha256 by name."""
        with _still(self._folder):
            for kind in ("settings", "database", "bulk"):
                for name in files_of(self._folder):
                    if _kind(name) == kind:
                        self._add(name)
        return self._files

    def _add(self, name: str) -> None:
        path = self._folder / name
        if _kind(name) == "database":
            _copy_database(path, self._copy)
            path = self._copy
        try:
            with path.open("rb") as file:
                info = self._archive.gettarinfo(arcname=name, fileobj=file)
                info.uid = info.gid = 0
                info.uname = info.gname = ""
                hashed = _Hashed(file)
                self._archive.addfile(info, hashed)
        except FileNotFoundError:
            if not name.startswith(PASSING):
                raise
            return
        self._files[name] = hashed.digest
        self.bytes += info.size


class _Hashed:
    """A file that is read once, and its sha256; a file that grows is read as far as it was."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    @property
    def digest(self) -> str:
        """Of what was read."""
        return self._hash.hexdigest()


def files_of(folder: Path) -> list[str]:
    """Names of what belongs into a backup, by order."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and _wanted(path.relative_to(folder))
    )


def _wanted(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.parts[0] not in LEFT_OUT and not path.name.endswith(ENDINGS)


def _kind(name: str) -> Literal["settings", "database", "bulk"]:
    if name.endswith(".db"):
        return "database"
    return "bulk" if PurePosixPath(name).parts[0] in BULK else "settings"


@contextmanager
def _still(folder: Path) -> Iterator[None]:
    """While nobody adds or removes what versions are made of."""
    with ExitStack() as stack:
        if (folder / "registry").is_dir():
            stack.enter_context(only_one(folder / "registry" / LOCK, REGISTRY_SECONDS))
        yield


def _copy_database(path: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    address = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error as error:
        raise StateError(f"'{path}' cannot be copied: {error}") from error


# --- and back ------------------------------------------------------------------------------------


def restore(folder: Path, file: Path) -> Contents:
    """Make a server's folder of a backup; nothing of it is left where that fails.

    Args:
        folder: empty, or not there yet.
        file: that :func:`back_up` wrote.

    Raises:
        ConfigError: the folder is not empty.
        StateError: the file is no whole backup, or what it holds is damaged.
        DiskError: the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"'{folder}' is not empty; move it away, or restore to another place")
    try:
        made = _unpack(file, folder)
        _check(folder)
        if (folder / "registry").is_dir():
            with Registry.open(folder) as registry:
                registry.sign_again("restored from a backup")
        (folder / WAITING).replace(folder / SETTINGS)
        sync(folder)
    except BaseException:
        _clear(folder)
        raise
    return made


def _unpack(file: Path, folder: Path) -> Contents:
    found: dict[str, str] = {}
    about = b""
    try:
        with tarfile.open(file, mode="r:") as archive:
            for member in archive:
                data = archive.extractfile(member)
                if data is None:
                    raise StateError(f"'{file}' is no backup: '{member.name}' is no file")
                if member.name == ABOUT:
                    about = data.read()
                    continue
                found[member.name] = _place(data, _path(folder, member.name), member.mode)
    except (OSError, tarfile.TarError) as error:
        kind = DiskError if isinstance(error, OSError) and error.errno else StateError
        raise kind(f"'{file}' cannot be restored to '{folder}': {error}") from error
    try:
        made = Contents.model_validate_json(about)
    except ValidationError:
        raise StateError(f"'{file}' is no backup, or was cut off; use another one") from None
    wrong = [name for name in made.files.keys() | found.keys()
             if made.files.get(name) != found.get(name)]  # fmt: skip
    if wrong or SETTINGS not in found:
        raise StateError(f"'{file}' is damaged: {sorted(wrong)[:3]}; use another backup")
    return made


def _path(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise StateError(f"a backup of ours names no file '{name}'")
    return folder / (WAITING if name == SETTINGS else name)


def _place(data: IO[bytes], path: Path, mode: int) -> str:
    """Write a file, and return the sha256 of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o777)
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "wb") as file:
        while piece := data.read(PIECE_BYTES):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _check(folder: Path) -> None:
    """Raises StateError for what is damaged: it was before it came into the backup."""
    for name in files_of(folder):
        if _kind(name) == "database":
            with closing(sqlite3.connect(folder / name)) as db:
                (said,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            if said != "ok":
                raise StateError(f"the copy of '{name}' is damaged ({said}); use another backup")
    if (folder / "identity").is_dir():
        Authority.open(folder / "identity")
    if (folder / "registry").is_dir():
        with Registry.open(folder) as registry:
            wrong = registry.check()
        if wrong:
            raise StateError(f"versions in the backup are damaged: {'; '.join(wrong[:3])}")


def _clear(folder: Path) -> None:
    """Remove what a restore that failed has made; the folder itself may be a mount."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else []:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
