"""A real broker that comes and goes, and devices that are processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.processes import Child, free_port, stop_all, wait_for_port

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

SETTINGS = """
user root
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {folder}/
max_queued_messages 0
"""

DAYS, RESULTS = 14, 10_000

OURS = f"""
import json, sys, time
from pathlib import Path
from common.broker import Broker
from common.mqtt import Connection
from common.outbox import Outbox
port, _, end = map(int, sys.argv[2:])
begin, number = time.time() - {DAYS} * 86_400, 0
clock = lambda: begin + number * {DAYS} * 86_400 / {RESULTS}
with Outbox.open(Path(sys.argv[1]), clock=clock) as outbox:
    known = [one for one in outbox.waiting(1_000_000) if one.kind == "result"]
    start = json.loads(known[-1].payload)["number"] + 1 if known else 0
    with Connection(Broker(host="127.0.0.1", port=port), "valley", "oak", outbox) as connection:
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(start, end):
            body = dict(taken=number, label="leaf", share=0.5, sure=True, version=1, number=number)
            connection.put("telemetry", dict(uptime_seconds=number, cpu_ratio=0.1))
            connection.put("result", body)
            print(number, flush=True)
        sys.stdin.readline()
"""
"""A device by whose clock a fortnight goes by while it puts all results, and as much telemetry."""


class Mosquitto:
    """A broker that comes and goes, and remembers over a stop what it has to deliver."""

    def __init__(self, folder: Path, more: str = "", settings: str = SETTINGS) -> None:
        self.port = free_port()
        folder.mkdir(exist_ok=True)
        path, self.log = folder / "mosquitto.conf", folder / "mosquitto.log"
        path.write_text(settings.format(port=self.port, folder=folder) + more)
        command = [str(MOSQUITTO), "-c", str(path)]
        self._child = Child("mosquitto", lambda: command, self.log)

    def start(self) -> None:
        self._child.start()
        wait_for_port("127.0.0.1", self.port, 20, self._child)

    def stop(self) -> None:
        stop_all([self._child], 10)


@dataclass
class Device:
    """A process that puts results once it is told to, and goes on until it is told again."""

    process: "subprocess.Popen[str]"

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def put(self, end: int) -> None:
        """Let it put until it has said that the one before ``end`` is put."""
        self.tell()
        while (line := self.heard()) != str(end - 1):
            assert line, "the device ended"

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def end(self) -> None:
        self.tell()
        self.process.wait(20)


@contextmanager
def device(script: str, folder: Path, port: int, start: int, end: int) -> Iterator[Device]:
    arguments = [str(folder / "outbox.db"), *map(str, (port, start, end))]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            found = Device(process)
            assert found.heard() == "ready"
            yield found
        finally:
            if process.poll() is None:
                process.kill()
