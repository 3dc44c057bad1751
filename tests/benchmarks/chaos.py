"""Hundreds of random ``kill -9``: in the lab, and on the processes of a real network.

``make chaos`` (about 55 minutes on 2 cores; MINUTES=N stops earlier, the next call goes on).
A lab cell is 20 kills of one process that is server and farms at once. A real cell is one run on
real SuperLink, SuperExec, server process and two SuperNodes, in which one of the server's programs,
or all of them, are killed at random moments; nobody helps but ``fieldfed-server up``, which is
started again only when it was killed itself. A link cell is one real run whose farms' links drop,
delay, cut and repeat answers at random.
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from common.processes import stop_all
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.lab.chaos import opened, redone
from tests.system.proxy import Exchange, Fate
from tests.system.site import Site, open_site, words

ROOT = Path(__file__).parent.parent.parent
LAB_CELLS, LAB_KILLS, REAL_KILLS, KILLS_PER_RUN = 10, 20, 20, 4
RUN_SECONDS = 900.0
TARGETS = {
    "server process": "import server.app",
    "superexec": "flower-superexec",
    "superlink": "flower-superlink",
    "everything": "",
}
SETTINGS = {
    "plan": {"rounds": 4, "warmup": 1, "prune_events": 2},
    "rounds": {"deadline_seconds": 240, "attempts": 8},
}
LINK_CELLS, LINK_FAULTS = 3, 0.04


def lab(seed: int) -> Cell:
    """Twenty kills in the lab."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "tests.lab.chaos", folder, str(LAB_KILLS), str(seed)]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"lab cell {seed}: {done.stdout[-500:]}\n{done.stderr[-3000:]}")
        figures: Cell = json.loads(done.stdout.splitlines()[-1])
        return figures


def progress(site: Site) -> tuple[str, int]:
    """State of the run and its committed rounds."""
    if not (Path(site.server) / "fieldfed.db").is_file():
        return "none", 0
    with site.store as store:
        run = store.latest_run()
        if run is None:
            return "none", 0
        last = store.last_committed(run.run)
        return run.state, 0 if last is None else last[0]


def found(site: Site, target: str) -> list[psutil.Process]:
    """The processes of that kind below ``up``."""
    everyone = psutil.Process(site.up.pid).children(True)
    return [process for process in everyone if TARGETS[target] in words(process)]


def kill(site: Site, target: str) -> bool:
    """SIGKILL to one kind of process; whether there was one."""
    if target == "everything":
        victims = [psutil.Process(site.up.pid), *psutil.Process(site.up.pid).children(True)]
    else:
        victims = found(site, target)[:1]
    hit = 0
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now, by itself
            victim.kill()
            hit += 1
    if target == "everything":
        site.up.start()  # as the machine's own service manager would
    return hit > 0


def play(site: Site, targets: list[str], draw: random.Random) -> Cell:
    """One run with a kill for every target, at random moments while it goes on."""
    train = site.start("train", "fieldfed-server", "train", site.server)
    hits: list[dict[str, Any]] = []
    most, until = 0, time.monotonic() + RUN_SECONDS
    while progress(site)[0] != "done":
        if time.monotonic() > until:
            raise SystemExit(f"the run stands still: {progress(site)}; see {site.root}")
        before = opened(Path(site.server))
        time.sleep(1.0)
        if targets and found(site, "server process") and progress(site)[0] == "running":
            time.sleep(draw.uniform(0, 30))
            committed = progress(site)[1]
            if kill(site, targets[0]):
                hits.append({"target": targets.pop(0), "committed": committed})
                time.sleep(5)
        most = max(most, redone(Path(site.server), before))
    stop_all([train])
    # the run is done: whatever was killed, it has been taken up again
    return {"kills": len(hits), "resumed": len(hits), "hits": hits, "rounds_redone_max": most}


def real(number: int) -> Cell:
    """One real run under fire, or undisturbed when ``number`` is 0."""
    draw = random.Random(number)
    targets = [draw.choice(list(TARGETS)) for _ in range(KILLS_PER_RUN)] if number else []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_site(Path(folder), settings=SETTINGS) as site,
    ):
        return play(site, targets, draw) | outcome(site)


def links(number: int) -> Cell:
    """One real run whose farms' links drop, delay, cut and repeat answers at random."""
    draw = random.Random(number)
    spoil = [fate for fate in Fate if fate is not Fate.PASS]

    def choose(_exchange: Exchange) -> Fate:
        return draw.choice(spoil) if draw.random() < LINK_FAULTS else Fate.PASS

    with (
        tempfile.TemporaryDirectory() as folder,
        open_site(Path(folder), choose, SETTINGS) as site,
    ):
        play(site, [], draw)
        suffered = Counter[str]()
        for (_, fate), count in site.proxy.suffered.items():
            suffered[fate.value] += count
        return {"faults": dict(suffered)} | outcome(site)


def outcome(site: Site) -> Cell:
    """What a finished run left behind."""
    with site.store as store:
        rows = list(store.candidates(1).values())
        rounds = [row for row in store.rounds(1) if row.kind == "align"]
        nodes = [[reply.farm for reply in store.replies(1, r.round)] for r in rounds]
        runs = len(store.runs())
    double = sum(len(names) - len(set(names)) for names in nodes) + (runs - 1)
    return {
        "candidates": [row.digest for row in rows],
        "farms": [len(names) for names in nodes],
        "double_counted": double,
    }


def main() -> None:
    """All cells, then the table."""
    cells = Cells("chaos")
    rows = [cells.run(f"lab {seed}", partial(lab, seed)) for seed in range(LAB_CELLS)]
    reference, killed, number = cells.run("real 0", partial(real, 0)), 0, 1
    while killed < REAL_KILLS and None not in rows:
        rows.append(cells.run(f"real {number}", partial(real, number)))
        killed, number = killed + (rows[-1] or {"kills": 0})["kills"], number + 1
    spoiled = [
        cells.run(f"links {seed}", partial(links, seed)) for seed in range(1, LINK_CELLS + 1)
    ]
    done, over_bad_links = _finished(rows), _finished(spoiled)
    if reference is None or len(done) < len(rows) or len(over_bad_links) < LINK_CELLS:
        unfinished("chaos")
        return
    for row in done:
        if "candidates" in row:
            row["weights_equal"] = row["candidates"] == reference["candidates"]
    figures = {
        "kills": sum(row["kills"] for row in done),
        "resumed": sum(row["resumed"] for row in done),
        "kills_real": killed,
        "rounds_redone_max": max(row["rounds_redone_max"] for row in done),
        "double_counted": sum(row["double_counted"] for row in [*done, *over_bad_links]),
        "weights_equal": all(row["weights_equal"] for row in done),
        "link_faults": sum(sum(row["faults"].values()) for row in over_bad_links),
        "rows": [*done, *over_bad_links],
    }
    path = cells.finish(figures, list(range(LAB_CELLS)))
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}, indent=2))
    print(f"figures: {path}")


def _finished(rows: list[Cell | None]) -> list[Cell]:
    return [row for row in rows if row is not None]


if __name__ == "__main__":
    main()
