"""The bridge as a process of its own, and what it has written down."""

import os
import signal
import sys
from pathlib import Path
from typing import Self

from common.processes import Child, stop_all
from server.telemetry import NAME, TelemetryStore
from tests.waiting import wait_until


class Bridge:
    """A server's folder in which a bridge runs while the context is open."""

    def __init__(self, folder: Path, port: int, more: str = "", host: str = "127.0.0.1") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        text = f'[server]\nname = "valley"\n[broker]\nhost = "{host}"\nport = {port}\n{more}'
        (folder / "server.toml").write_text(text)
        command = [sys.executable, "-P", "-m", "server.bridge", str(folder)]
        self.child = Child("bridge", lambda: command, folder / "bridge.log", dict(os.environ))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        stop_all([self.child], 10)

    def start(self) -> None:
        self.child.start()

    def kill(self) -> None:
        """As a power cut does, as far as this process is concerned."""
        assert self.child.pid is not None
        os.kill(self.child.pid, signal.SIGKILL)
        wait_until(lambda: self.child.returncode is not None, 20, "the end of the bridge")

    @property
    def names(self) -> set[str]:
        """Of the devices that it has heard of."""
        if not (self.folder / NAME).is_file():
            return set()
        with self.told() as told:
            return {row.name for row in told.devices()}

    def told(self) -> TelemetryStore:
        """What it has written down, to be closed after use."""
        return TelemetryStore.open(self.folder / NAME, read_only=True)

    def numbers(self) -> list[int]:
        """Of results, in the order in which they came."""
        with self.told() as told:
            rows = told._select("SELECT taken FROM results ORDER BY received, device, id")
        return [int(row["taken"]) for row in rows]
