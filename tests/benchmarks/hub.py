"""The hub under load, on loopback with TLS: one device, and 200 at once.

``make bench-hub`` (about two minutes on two idle cores). Hub and devices share the machine; the hub
is a process of its own, devices are threads of four others, each with a connection of its own.

    bytes_per_second       one device that throws away what it gets
    device_bytes_per_second  one that keeps it as devices do: synced piece by piece, then hashed
    slowest_over_median    of the times that 200 devices need which all begin at once
    rss_growth_bytes       of the hub, from idle to its highest while it serves them
"""

import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import grpc
import psutil

from client.hub import OPTIONS, HubClient
from client.identity import ClientFiles
from common import hub_pb2, hub_pb2_grpc
from common.objects import Objects
from common.processes import wait_for_port
from server.registry import Registry
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.lab.hub import LabHub
from tests.lab.versions import random_object, registry_in

ONE_BYTES, MANY_BYTES = 400_000_000, 8_000_000
CLIENTS, PROCESSES = 200, 4
SAMPLE_SECONDS = 0.05


@contextmanager
def serving(root: Path, size: int) -> Iterator[tuple[LabHub, str, psutil.Process]]:
    """A hub in a process of its own with one object of that size."""
    with registry_in(root / "server") as registry:
        name = _large(registry, size)
    hub = LabHub(root / "server", streams=2 * CLIENTS, streams_per_farm=2 * CLIENTS)
    child = os.fork()
    if child == 0:
        with hub.running():
            signal.pause()
        os._exit(0)
    try:
        wait_for_port("127.0.0.1", hub.config.port, 30)
        yield hub, name, psutil.Process(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _large(registry: Registry, size: int) -> str:
    return registry.objects.add(random_object(size))


def take(address: str, files: ClientFiles, name: str) -> tuple[int, float]:
    """Fetch an object on a connection of one's own, and throw it away; bytes and seconds."""
    credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)
    options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    with grpc.secure_channel(address, credentials, options) as channel:
        stub = hub_pb2_grpc.HubStub(channel)  # type: ignore[no-untyped-call]
        grpc.channel_ready_future(channel).result(timeout=60)
        begin = time.monotonic()
        wants = hub_pb2.FetchRequest(wants=[hub_pb2.Want(digest=name)])
        came = sum(len(chunk.data) for chunk in stub.Fetch(wants, timeout=600))
        return came, time.monotonic() - begin


def many(address: str, files: ClientFiles, name: str, count: int) -> list[float]:
    """Seconds of so many devices at once."""
    with ThreadPoolExecutor(count) as pool:
        return [
            seconds for _, seconds in pool.map(lambda _: take(address, files, name), range(count))
        ]


def one_device() -> Cell:
    """The rate of a single device, without and with its disk; the better of three."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), ONE_BYTES) as made:
        hub, name, _ = made
        rates = []
        for _ in range(3):
            came, seconds = take(hub.address, hub.files(), name)
            rates.append(came / seconds)
        with HubClient(hub.address, hub.files()) as client:
            begin = time.monotonic()
            client.fetch({name: ONE_BYTES}, Objects(Path(folder) / "device"))
            kept = ONE_BYTES / (time.monotonic() - begin)
        return {"bytes_per_second": max(rates), "rates": rates, "device_bytes_per_second": kept}


def many_devices() -> Cell:
    """200 at once."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), MANY_BYTES) as made:
        hub, name, process = made
        take(hub.address, hub.files(), name)  # what a first request needs is not of the load
        with watched(process) as peak, workers() as pool:
            idle = process.memory_info().rss
            work = partial(many, hub.address, hub.files(), name)
            begin = time.monotonic()
            parts = [pool.submit(work, CLIENTS // PROCESSES) for _ in range(PROCESSES)]
            seconds = [one for part in parts for one in part.result()]
            whole = time.monotonic() - begin
        return {
            "clients": len(seconds),
            "slowest_over_median": max(seconds) / statistics.median(seconds),
            "seconds_by_client": [round(one, 2) for one in sorted(seconds)],
            "together_bytes_per_second": CLIENTS * MANY_BYTES / whole,
            "rss_idle_bytes": idle,
            "rss_growth_bytes": peak[0] - idle,
        }


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """Processes that devices live in."""
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * PROCESSES))  # they have started
        yield pool


@contextmanager
def watched(process: psutil.Process) -> Iterator[Sequence[int]]:
    """The highest resident memory of a process while the context is open."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Both cells."""
    cells = Cells("hub")
    found = [cells.run("one device", one_device), cells.run("200 devices", many_devices)]
    if None in found:
        unfinished("bench-hub")
    rows = [one for one in found if one is not None]
    figures: Cell = {}
    for row in rows:
        figures |= {key: value for key, value in row.items() if key != "cell"}
    print(json.dumps({key: value for key, value in figures.items() if "seconds" not in key}))
    print(f"figures: {cells.finish(figures, [0], 'make bench-hub')}")


if __name__ == "__main__":
    main()
