"""What a farm's link carries when there is no work: a day of polling, and wakes on a metered link.

``make idle`` (about 22 minutes, most of them asleep). A real SuperLink and SuperNode on loopback,
counted by the farm's own relay: TCP payload in both directions. Each cell is one wake without work;
a short and a long wake tell polling apart from connecting and signing off. Days are extrapolated.
"""

import json
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from client import shifts, traffic
from common.config import FarmSection
from common.processes import Child, free_port, stop_all, wait_for_port
from tests.benchmarks.cells import Cells, unfinished
from tests.system.site import command, start, words
from tests.waiting import wait_until

WAKES = {3: (60, 120), 30: (90, 330)}
"""Seconds awake, a short wake and a long one, by seconds between polls."""
DAY = 86_400
NAMES = ("sent", "received")


def wake_once(poll_seconds: int, awake_seconds: int) -> dict[str, Any]:
    """Bytes of one wake without work."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        port, server, farm = free_port(), folder / "server", folder / "farm"
        for path, text in (
            (server / "server.toml", f"[server]\nport = {port}\n"),
            (
                farm / "farm.toml",
                f'[farm]\nname = "idle"\ndata = "none"\nsuperlink = "127.0.0.1:{port}"\n'
                f'link = "metered"\nawake_minutes = {awake_seconds / 60}\n'
                f"poll_seconds = {poll_seconds}\n",
            ),
        ):
            path.parent.mkdir()
            path.write_text(text)
        children = [start("up", command("fieldfed-server", "up", str(server)), folder)]
        stack.callback(lambda: stop_all(children, 15))
        wait_for_port("127.0.0.1", port, 60, children[0])
        children.append(start("farm", command("fieldfed-client", "run", str(farm)), folder))
        return _watch(children[1], farm / "state", awake_seconds)


def _watch(farm: Child, state: Path, awake_seconds: int) -> dict[str, Any]:
    """The wake after the first one, when everything is warm."""
    wait_until(lambda: _connected(farm), 60, "a first connection")
    wait_until(lambda: not _connected(farm), awake_seconds + 60, "sleep")
    before = _counted(state)
    shifts.notify(state)
    wait_until(lambda: _connected(farm), 60, "waking")
    wait_until(lambda: not _connected(farm), awake_seconds + 60, "sleep again")
    after = _counted(state)
    found = {name: after[name] - before[name] for name in NAMES}
    return {"awake_seconds": awake_seconds, **found}


def _connected(farm: Child) -> bool:
    return any("flower-supernode" in words(process) for process in farm.observe())


def _counted(state: Path) -> dict[str, int]:
    time.sleep(3)  # on disk soon after the last connection has ended
    counters = traffic.read(state)
    assert counters is not None
    return counters.model_dump()


def polling(wakes: list[dict[str, Any]]) -> dict[str, float]:
    """Of a short and a long wake: bytes per second of polling, and those of one connection."""
    short, long = wakes
    seconds = long["awake_seconds"] - short["awake_seconds"]
    rates = {name: (long[name] - short[name]) / seconds for name in NAMES}
    rate, whole = sum(rates.values()), sum(short[name] for name in NAMES)
    farm = FarmSection(name="idle", data=Path("none"))
    awake, asleep = farm.awake_minutes * 60, farm.wake_hours * 3600
    connect = whole - rate * short["awake_seconds"]
    wake = connect + rate * awake
    return {
        "polling_day": rate * DAY,
        **{f"polling_{name}_day": value * DAY for name, value in rates.items()},
        "connect_and_sign_off": connect,
        "wake_of_default_minutes": wake,
        "default_schedule_day": wake * DAY / (asleep + awake),
        "schedule_of_24_hours_day": wake * DAY / (DAY + awake),
    }


def main() -> None:
    """Measure, print, write."""
    cells, rows = Cells("idle", 30), []
    for poll_seconds, lengths in WAKES.items():
        wakes = []
        for awake_seconds in lengths:
            name = f"polls every {poll_seconds} s, awake {awake_seconds} s"
            found = cells.run(name, partial(wake_once, poll_seconds, awake_seconds))
            if found is None:
                unfinished("idle")
            wakes.append(found)
        rows.append({"poll_seconds": poll_seconds, **polling(wakes), "wakes": wakes})
    cells.finish({"rows": rows}, [0])
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
