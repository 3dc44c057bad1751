"""A thousand devices that tell how they are every ten seconds, and a store that commits meanwhile.

``make bench-telemetry`` (MINUTES=10 of load; DEVICES=1000). Mosquitto, the bridge and the devices
are processes of their own on this machine; a device is a connection of its own that waits for the
broker's word on each message, as ours do. The store commits rounds on the same disk, twice a
second, half a minute before the devices come and as long as they are there.

    messages            of telemetry that the broker has said it has
    lost, duplicated    of those: not in telemetry.db in the end, or there more than once
    again               came twice to the bridge and were left out
    lag_seconds_p99     from a device's putting together a message until the bridge commits it
    rss_growth_bytes    of the bridge, from its first minute with all devices to its highest after
    commit_seconds      of a round in the store, alone and with the devices
"""

import asyncio
import itertools
import json
import os
import random
import resource
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from common.outbox import text_of
from common.topics import DeviceState, Telemetry
from server.store import CandidateRow, Store
from server.telemetry import TelemetryStore
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.lab.replies import DIGEST
from tests.system.bridges import Bridge
from tests.system.mosquitto import MOSQUITTO, Mosquitto
from tests.waiting import wait_until

MINUTES = float(os.environ.get("MINUTES", "10"))
DEVICES = int(os.environ.get("DEVICES", "1000"))
SECONDS_BETWEEN = 10.0
PROCESSES = 2
ALONE_SECONDS, COMMITS_PER_SECOND = 30.0, 2.0
CONNECTS_PER_SECOND = 50.0
LAST_SECONDS = 60.0
"""After which what has not come counts as lost."""
LIMIT = 10_000
"""Open files: each device is one at the broker."""
_CONNECT, _PUBLISH, _DISCONNECT = 0x10, 0x32, 0xE0


# --- devices -----------------------------------------------------------------------------------


class Device:
    """A connection that publishes, and waits for the broker's word after each message."""

    def __init__(self, port: int, name: str) -> None:
        self._port, self._name, self._numbers = port, name, itertools.count(1)

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = _text("MQTT") + bytes([4, 2]) + struct.pack("!H", 120)
        self._send(_CONNECT, head + _text(self._name))
        answer = await self._reader.readexactly(4)
        assert answer == b"\x20\x02\x00\x00", answer

    async def publish(self, part: str, payload: bytes, retain: bool = False) -> None:
        number = struct.pack("!H", next(self._numbers) % 65_535 + 1)
        topic = _text(f"fieldfed/valley/{self._name}/{part}")
        self._send(_PUBLISH | retain, topic + number + payload)
        answer = await asyncio.wait_for(self._reader.readexactly(4), 60)
        assert answer == b"\x40\x02" + number, answer

    async def leave(self) -> None:
        self._send(_DISCONNECT, b"")
        await self._writer.drain()
        self._writer.close()

    def _send(self, first: int, body: bytes) -> None:
        length, head = len(body), bytes([first])
        while length >= 128:
            head, length = head + bytes([length & 127 | 128]), length >> 7
        self._writer.write(head + bytes([length]) + body)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("!H", len(data)) + data


async def _live(port: int, number: int, begin: float, end: float) -> int:
    """One device's life; how many of its messages the broker had. Times are unix seconds."""
    draw = random.Random(number)
    name = f"device{number}"
    device = Device(port, name)
    await asyncio.sleep(number / CONNECTS_PER_SECOND)
    await device.connect()
    await device.publish("availability", b"online", retain=True)
    state = DeviceState(farm=f"farm{number // 10}", release="1.0", version=3)
    await device.publish("state", text_of(state.body()).encode(), retain=True)
    sent, due = 0, begin + draw.uniform(0, SECONDS_BETWEEN)
    while due < end:
        await asyncio.sleep(max(0.0, due - time.time()))
        measured = Telemetry(
            uptime_seconds=due - begin,
            cpu_ratio=draw.random(),
            memory_used_bytes=draw.randrange(2**32),
            memory_bytes=2**32,
            disk_free_bytes=draw.randrange(2**36),
            temperature_celsius=draw.uniform(20, 80),
            throttled=False,
            under_voltage=False,
            link_sent_bytes=draw.randrange(2**30),
            link_received_bytes=draw.randrange(2**30),
        )
        body = {**measured.body(), "id": sent + 1, "time": time.time()}
        await device.publish("telemetry", text_of(body).encode())
        sent, due = sent + 1, due + SECONDS_BETWEEN
    await device.leave()
    return sent


async def _lives(port: int, numbers: Sequence[int], begin: float, end: float) -> list[int]:
    return list(await asyncio.gather(*(_live(port, one, begin, end) for one in numbers)))


def live(port: int, numbers: Sequence[int], begin: float, end: float) -> list[int]:
    """Devices of one process."""
    return asyncio.run(_lives(port, numbers, begin, end))


# --- a store that commits ----------------------------------------------------------------------


@dataclass
class Commits:
    """Seconds that rounds took to be committed."""

    folder: Path
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def going(self) -> Iterator[None]:
        """Commit again and again while the context is open."""
        over = threading.Event()
        thread = threading.Thread(target=self._commit, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _commit(self, over: threading.Event) -> None:
        with Store.open(self.folder / "fieldfed.db") as store:
            run = store.start_run("{}", 1, DIGEST, "{}")
            mask = store.run(run).mask
            row = CandidateRow(DIGEST, DIGEST, mask, "{}", 1000, 100, "models/x")
            for number in itertools.count(1):
                if over.wait(1 / COMMITS_PER_SECOND):
                    return
                store.open_round(
                    run, number, kind="align", base=DIGEST, mask=mask, quorum=1, deadline=0.0
                )
                begin = time.monotonic()
                ratios = {"macs_ratio": 1.0, "heads_kept_ratio": 1.0, "mean_accuracy": None}
                store.commit_round(run, number, candidate=row, **ratios)  # type: ignore[arg-type]
                self.seconds.append(time.monotonic() - begin)

    def shown(self) -> Cell:
        """In sums."""
        median, late = np.percentile(self.seconds, [50, 95])
        worst = max(self.seconds)
        return {"commits": len(self.seconds), "median": median, "p95": late, "max": worst}


# --- together ----------------------------------------------------------------------------------


def load(devices: int, seconds: float) -> Cell:
    """All devices for so long."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        broker = Mosquitto(folder / "broker", "max_inflight_messages 500\nlog_type error\n")
        stack.callback(broker.stop)
        broker.start()
        bridge = stack.enter_context(Bridge(folder / "server", broker.port))
        wait_until(lambda: "connected to" in bridge.child.last_words(50), 60, "the bridge")
        alone, meanwhile = Commits(folder / "server"), Commits(folder / "server")
        with alone.going():
            time.sleep(ALONE_SECONDS)
        begin = time.time() + devices / CONNECTS_PER_SECOND + 5
        sent, memory = _played(broker.port, bridge, devices, begin, seconds, meanwhile)
        found = _written(bridge, sent)
    return {
        "devices": devices,
        "load_seconds": seconds,
        **found,
        "rss_growth_bytes": max(memory) - memory[0],
        "rss_bytes": memory[-1],
        "commit_seconds": {"alone": alone.shown(), "meanwhile": meanwhile.shown()},
    }


def _played(
    port: int, bridge: Bridge, devices: int, begin: float, seconds: float, commits: Commits
) -> tuple[int, list[int]]:
    """Messages that were sent, and the bridge's memory second by second."""
    assert bridge.child.pid is not None
    process, memory = psutil.Process(bridge.child.pid), list[int]()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool, commits.going():
        work = partial(live, port, begin=begin, end=begin + seconds)
        parts = [pool.submit(work, range(one, devices, PROCESSES)) for one in range(PROCESSES)]
        while not all(part.done() for part in parts):
            time.sleep(1)
            if time.time() > begin + min(60.0, seconds / 4):
                memory.append(process.memory_info().rss)
        return sum(sum(part.result()) for part in parts), memory


def _written(bridge: Bridge, sent: int) -> Cell:
    """What the bridge has in the end."""
    with closing(bridge.told()) as told:
        until = time.monotonic() + LAST_SECONDS
        while _rows(told) < sent and time.monotonic() < until:
            time.sleep(0.5)
        rows = told._select("SELECT device, id, received - time AS lag FROM telemetry")
        counts = told.counts()
    lags = [row["lag"] for row in rows]
    different = len({(row["device"], row["id"]) for row in rows})
    return {
        "messages": sent,
        "lost": sent - different,
        "duplicated": len(rows) - different,
        "again": counts["duplicate"],
        "left_out": {
            name: counts[name] for name in ("malformed", "oversized", "foreign", "crowded")
        },
        "lag_seconds_p50": float(np.percentile(lags, 50)),
        "lag_seconds_p99": float(np.percentile(lags, 99)),
        "lag_seconds_max": max(lags),
    }


def _rows(told: TelemetryStore) -> int:
    return int(told._select("SELECT COUNT(*) AS count FROM telemetry")[0]["count"])


def main() -> None:
    """One cell: the load."""
    if MOSQUITTO is None:
        sys.exit("'mosquitto' is not installed; on Debian: apt-get install mosquitto")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(LIMIT, hard), hard))
    cells = Cells("telemetry")
    found = cells.run(
        f"{DEVICES} devices, {MINUTES:g} minutes", partial(load, DEVICES, 60 * MINUTES)
    )
    if found is None:
        unfinished("bench-telemetry")
    figures = {key: value for key, value in found.items() if key not in ("cell", "commit")}
    print(json.dumps(figures, indent=2))
    print(f"figures: {cells.finish(figures, [0], 'make bench-telemetry')}")


if __name__ == "__main__":
    main()
