"""What a farm's link carries when there is no work: a day of polling, and wakes on a metered link.

``make idle`` (about six minutes). A real SuperLink and SuperNode on loopback, counted by the farm's
own relay: TCP payload in both directions. Each cell is one wake without work, of ``AWAKE_SECONDS``:
what is not polling is what connecting and signing off cost. Days are extrapolated from that.
"""

import json
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from client import shifts, traffic
from common.config import FarmSection
from common.processes import Child, free_port, stop_all, wait_for_port
from tests.benchmarks.cells import Cells, unfinished
from tests.system.site import command, start, words
from tests.waiting import wait_until

AWAKE_SECONDS, REPEATS = 90, 3
SETTLE_SECONDS = 10
"""After connecting, until only polls and heartbeats are left."""
DAY = 86_400
NAMES = ("sent", "received")


def wake_once(folder: Path) -> dict[str, Any]:
    """Bytes of one wake without work, and bytes per second of its polling."""
    port, server, farm = free_port(), folder / "server", folder / "farm"
    for path, text in (
        (server / "server.toml", f"[server]\nport = {port}\n"),
        (
            farm / "farm.toml",
            f'[farm]\nname = "idle"\ndata = "none"\nsuperlink = "127.0.0.1:{port}"\n'
            f'link = "metered"\nawake_minutes = {AWAKE_SECONDS / 60}\n',
        ),
    ):
        path.parent.mkdir()
        path.write_text(text)
    with ExitStack() as stack:
        children = [start("up", command("fieldfed-server", "up", str(server)), folder)]
        stack.callback(lambda: stop_all(children, 15))
        wait_for_port("127.0.0.1", port, 60, children[0])
        children.append(start("farm", command("fieldfed-client", "run", str(farm)), folder))
        return _watch(children[1], farm / "state")


def _watch(farm: Child, state: Path) -> dict[str, Any]:
    """The wake after the first one, when everything is warm."""
    wait_until(lambda: _connected(farm), 60, "a first connection")
    wait_until(lambda: not _connected(farm), AWAKE_SECONDS + 60, "sleep")
    before = _counted(state)
    shifts.notify(state)
    wait_until(lambda: _connected(farm), 60, "waking")
    time.sleep(SETTLE_SECONDS)
    first, began = _counted(state), time.monotonic()
    time.sleep(AWAKE_SECONDS - 2 * SETTLE_SECONDS)
    second, ended = _counted(state), time.monotonic()
    wait_until(lambda: not _connected(farm), AWAKE_SECONDS, "sleep again")
    after = _counted(state)
    figures: dict[str, Any] = {"awake_seconds": AWAKE_SECONDS}
    for name in NAMES:
        per_second = (second[name] - first[name]) / (ended - began)
        wake = after[name] - before[name]
        figures |= {f"wake_{name}": wake, f"polling_{name}_per_second": per_second}
        figures[f"connect_{name}"] = wake - per_second * AWAKE_SECONDS
    return figures


def _connected(farm: Child) -> bool:
    return any("flower-supernode" in words(process) for process in farm.observe())


def _counted(state: Path) -> dict[str, int]:
    time.sleep(2)  # on disk after a second
    counters = traffic.read(state)
    assert counters is not None
    return counters.model_dump()


def summary(wakes: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the wakes, and days made of them; bytes."""
    kinds = [f"{kind}_{name}" for kind in ("wake", "connect") for name in NAMES]
    kinds += [f"polling_{name}_per_second" for name in NAMES]
    mean = {kind: fmean(wake[kind] for wake in wakes) for kind in kinds}
    rate = sum(mean[f"polling_{name}_per_second"] for name in NAMES)
    connect = sum(mean[f"connect_{name}"] for name in NAMES)
    farm = FarmSection(name="idle", data=Path("none"))
    wake = connect + rate * farm.awake_minutes * 60
    period = farm.wake_hours * 3600 + farm.awake_minutes * 60
    return {
        "awake_seconds": AWAKE_SECONDS,
        "polling_day": rate * DAY,
        "polling_sent_day": mean["polling_sent_per_second"] * DAY,
        "polling_received_day": mean["polling_received_per_second"] * DAY,
        "connect_and_sign_off": connect,
        "wake_measured": mean["wake_sent"] + mean["wake_received"],
        "wake_of_default_minutes": wake,
        "default_schedule_day": wake * DAY / period,
        "schedule_of_24_hours_day": wake * DAY / (DAY + farm.awake_minutes * 60),
        "wakes": wakes,
    }


def main() -> None:
    """Measure, print, write."""
    cells = Cells("idle", 30)
    wakes = []
    for number in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            found = cells.run(f"wake {number}", partial(wake_once, Path(folder)))
        if found is None:
            unfinished("idle")
            return
        wakes.append(found)
    figures = summary(wakes)
    cells.finish(figures, [0])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
