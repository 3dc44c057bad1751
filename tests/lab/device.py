"""A device that looks at its channel once, in a process that may be killed at any moment."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.hub import HubClient
from client.identity import ClientFiles
from client.labels import Labels
from client.serving import Serving
from client.trust import Trust
from client.updater import Updater
from common.images import open_folder
from server.registry import STABLE
from tests.lab.powercut import lose, record


@dataclass(frozen=True)
class Site:
    """Where a device's files are, and how it reaches its hub."""

    root: Path
    images: Path
    address: str
    files: ClientFiles
    keys: str

    @property
    def state(self) -> Path:
        """What the device keeps."""
        return self.root / "state"

    @property
    def beside(self) -> Path:
        """Notes about it, on a disk that loses nothing."""
        return self.root / "beside"

    def serving(self) -> Serving:
        """As a new process finds it."""
        return Serving(self.state / "serving")

    def update(self) -> str:
        """Look once; returns what was said."""
        updater = Updater(
            device="pi-1",
            channel=STABLE,
            folder=lambda: open_folder(self.images),
            serving=self.serving(),
            trust=Trust(self.state / "trust.json", self.keys, datetime.now(UTC)),
            labels=Labels(self.state / "labels.jsonl", self.images),
        )
        with HubClient(self.address, self.files, seed=0) as hub:
            done = updater.update(hub)
        return f"{done.outcome}: {done.words}"


@dataclass(frozen=True)
class Life:
    """One process: whether it was killed, how long it lived, and the bytes that came to it.

    ``operations`` on files are counted for one that came to its end; ``lost`` counts what a power
    cut took back.
    """

    killed: bool
    seconds: float
    operations: int
    received: int
    lost: int = 0


def live(
    site: Site,
    *,
    kill_at: int | None = None,
    kill_after: float | None = None,
    power_cut: random.Random | None = None,
) -> Life:
    """Look once in a process of its own.

    Args:
        site: of the device.
        kill_at: the operation on a file at which it is killed.
        kill_after: seconds after which it is killed.
        power_cut: with the kill the disk loses what was not synced.

    Raises:
        RuntimeError: the process failed, rather than ended or was killed.
    """
    _empty(site.beside)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_device(site, kill_at)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begin
    killed = os.WIFSIGNALED(status)
    if not killed and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError((site.beside / "error.txt").read_text())
    notes = site.beside / "journal.jsonl"
    count = site.beside / "operations.txt"
    operations = int(count.read_text()) if count.is_file() else 0
    received = site.beside / "received.bin"
    came = received.stat().st_size if received.is_file() else 0
    lost = 0
    if killed and power_cut is not None and notes.is_file():
        lost = lose(site.state, site.beside, power_cut)
    return Life(killed, seconds, operations, came, lost)


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.mkdir(parents=True, exist_ok=True)


def _be_the_device(site: Site, kill_at: int | None) -> None:
    """Never returns."""
    status = 1
    try:
        site.state.mkdir(exist_ok=True)
        counted = record(site.state, site.beside, kill_at)
        _count_received(site.beside / "received.bin")
        site.update()
        (site.beside / "operations.txt").write_text(str(counted()))
        status = 0
    except BaseException:
        (site.beside / "error.txt").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(status)


def _count_received(path: Path) -> None:
    """A file as long as what the hub has sent: seen also after a kill."""
    from client import hub

    real: Callable[..., bytes] = hub._bytes
    descriptor, total = os.open(path, os.O_WRONLY | os.O_CREAT), 0

    def counting(*arguments: object) -> bytes:
        nonlocal total
        data = real(*arguments)
        total += len(data)
        os.ftruncate(descriptor, total)
        return data

    hub._bytes = counting  # type: ignore[assignment]
