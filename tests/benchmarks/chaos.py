"""Hundreds of random ``kill -9``: in the lab, and on the processes of a real network.

``make chaos`` (about 70 minutes on 2 cores; MINUTES=N stops earlier, the next call goes on).
A lab cell is 20 kills of one process that is server and farms at once. A real cell is one run on
real SuperLink, SuperExec, server process and two SuperNodes, in which one of the server's programs,
or all of them, are killed at random moments; nobody helps but ``fieldfed-server up``, which is
started again only when it was killed itself.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.processes import Child, free_port, stop_all, wait_for_port
from server.store import Store
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.lab.chaos import opened, redone
from tests.lab.network import SIDE, TINY, draw_folder

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
LAB_CELLS, LAB_KILLS, REAL_KILLS, KILLS_PER_RUN = 10, 20, 20, 4
RUN_SECONDS = 900.0
TARGETS = {
    "server process": "import server.app",
    "superexec": "flower-superexec",
    "superlink": "flower-superlink",
    "everything": "",
}
SETTINGS = """
seed = 1
[server]
port = {port}
[backbone]
name = "vit_tiny_patch16_224"
image_size = {side}
options = {options}
source = {source}
epochs = 1
anchor_images = 32
[plan]
rounds = 4
prune_heads = 0.4
max_drop_ratio = 1.0
[rounds]
min_farms = 2
grace_seconds = 0
deadline_seconds = 240
attempts = 8
[train]
batch_size = 16
"""


def lab(seed: int) -> Cell:
    """Twenty kills in the lab."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.lab.chaos", folder, str(LAB_KILLS), str(seed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"lab cell {seed}: {done.stdout[-500:]}\n{done.stderr[-3000:]}")
        figures: Cell = json.loads(done.stdout.splitlines()[-1])
        return figures


@dataclass
class Site:
    """A real network in a folder, and its processes."""

    root: Path
    up: Child
    farms: list[Child]

    @property
    def server(self) -> Path:
        return self.root / "server"


def program(name: str, root: Path, *arguments: str) -> Child:
    """One of our commands as a child, with its log."""
    command = [str(BIN / arguments[0]), *arguments[1:]]
    child = Child(
        name, lambda: command, root / f"{name}.log", os.environ | {"OMP_NUM_THREADS": "1"}
    )
    child.start()
    return child


def call(*arguments: str) -> None:
    """One of our commands, to its end."""
    subprocess.run([str(BIN / arguments[0]), *arguments[1:]], check=True, capture_output=True)


def open_site(root: Path) -> Site:
    """Pre-train, start the server and two farms."""
    source = draw_folder(root / "photos" / "source", 3, 16, 7)
    options = "{ " + ", ".join(f"{key} = {value}" for key, value in TINY.items()) + " }"
    port, server = free_port(), root / "server"
    values = {"port": port, "side": SIDE, "options": options, "source": json.dumps(str(source))}
    server.mkdir(parents=True)
    (server / "server.toml").write_text(SETTINGS.format(**values))
    call("fieldfed-server", "pretrain", str(server))
    up = program("up", root, "fieldfed-server", "up", str(server))
    wait_for_port("127.0.0.1", port, 60, up)
    farms = []
    for number, name in enumerate(("oak", "vine")):
        data = draw_folder(root / "photos" / name, 2 + number, 15, 50 + number)
        folder = str(root / "farms" / name)
        flags = ("--data", str(data), "--superlink", f"127.0.0.1:{port}", "--threads", "1")
        call("fieldfed-client", "init", folder, *flags)
        farms.append(program(name, root, "fieldfed-client", "run", folder))
    return Site(root, up, farms)


def progress(site: Site) -> tuple[str, int]:
    """State of the run and its committed rounds."""
    path = site.server / "fieldfed.db"
    if not path.is_file():
        return "none", 0
    with Store.open(path) as store:
        run = store.latest_run()
        if run is None:
            return "none", 0
        last = store.last_committed(run.run)
        return run.state, 0 if last is None else last[0]


def kill(site: Site, target: str) -> bool:
    """SIGKILL to one kind of process; whether there was one."""
    if target == "everything":
        victims = [psutil.Process(site.up.pid), *psutil.Process(site.up.pid).children(True)]
    else:
        everyone = psutil.Process(site.up.pid).children(True)
        named = [p for p in everyone if any(TARGETS[target] in word for word in _words(p))]
        victims = named[:1]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    if target == "everything":
        site.up.start()  # as the machine's own service manager would
    return bool(victims)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def play(site: Site, targets: list[str], draw: random.Random) -> Cell:
    """One run with a kill for every target, at random moments while it goes on."""
    train = program("train", site.root, "fieldfed-server", "train", str(site.server))
    hits: list[dict[str, Any]] = []
    most, until = 0, time.monotonic() + RUN_SECONDS
    while targets or progress(site)[0] != "done":
        if time.monotonic() > until:
            raise SystemExit(f"the run stands still: {progress(site)}; see {site.root}")
        wait = draw.uniform(2, 25) if targets else 1.0
        before = opened(site.server)
        time.sleep(wait)
        if progress(site)[0] == "done":
            break
        if targets and progress(site)[0] == "running" and kill(site, targets[0]):
            hits.append({"target": targets.pop(0), "committed": progress(site)[1]})
            time.sleep(20)
        most = max(most, redone(site.server, before))
    stop_all([train])
    return {"kills": len(hits), "hits": hits, "rounds_redone_max": most}


def real(number: int) -> Cell:
    """One real run under fire, or undisturbed when ``number`` is 0."""
    draw = random.Random(number)
    targets = [draw.choice(list(TARGETS)) for _ in range(KILLS_PER_RUN)] if number else []
    with tempfile.TemporaryDirectory() as folder:
        site = open_site(Path(folder))
        try:
            figures = play(site, targets, draw)
            with Store.open(site.server / "fieldfed.db") as store:
                rows = list(store.candidates(1).values())
                rounds = [row for row in store.rounds(1) if row.kind == "align"]
                nodes = [[reply.farm for reply in store.replies(1, r.round)] for r in rounds]
                runs = len(store.runs())
        finally:
            stop_all([*site.farms, site.up])
    double = sum(len(names) - len(set(names)) for names in nodes) + (runs - 1)
    return figures | {"candidates": [row.digest for row in rows], "double_counted": double}


def main() -> None:
    """All cells, then the table."""
    cells = Cells("chaos")
    rows = [cells.run(f"lab {seed}", lambda seed=seed: lab(seed)) for seed in range(LAB_CELLS)]  # type: ignore[misc]
    reference, killed, number = cells.run("real 0", lambda: real(0)), 0, 1
    real_rows = []
    while killed < REAL_KILLS:
        row = cells.run(f"real {number}", lambda number=number: real(number))  # type: ignore[misc]
        if row is None:
            unfinished("chaos")
            return
        real_rows.append(row)
        killed, number = killed + row["kills"], number + 1
    if reference is None or None in rows:
        unfinished("chaos")
        return
    lab_rows = [row for row in rows if row is not None]
    everything = [*lab_rows, *real_rows]
    equal = [row["weights_equal"] for row in lab_rows]
    equal += [row["candidates"] == reference["candidates"] for row in real_rows]
    figures = {
        "kills": sum(row["kills"] for row in everything),
        "resumed": sum(row["kills"] for row in everything),
        "kills_real": killed,
        "rounds_redone_max": max(row["rounds_redone_max"] for row in everything),
        "double_counted": sum(row["double_counted"] for row in everything),
        "weights_equal": all(equal),
        "rows": everything,
    }
    path = cells.finish(figures, list(range(LAB_CELLS)))
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}, indent=2))
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
