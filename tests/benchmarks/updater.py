"""Updates that are killed: 500 times, half of them with a power cut, and what is left each time.

``make chaos-updater`` (about 15 minutes on two idle cores). A hub that listens with TLS in a
process of its own; a device that tries version after version in a process that is killed: by the
clock, or at one of its operations on files, drawn at random from those of a whole update. After a
power cut the disk has lost a random part of what was not synced (tests/lab/powercut.py). After
every kill another process loads what serves, every tensor by its sha256.

    verified          kills after which a verified bundle served, and it was the old or the new one
    resent_bytes_max  most that came to the device and has to come again because of one kill: what
                      had come into memory, and after a power cut the last piece on disk
"""

import json
import random
import tempfile
from functools import partial
from pathlib import Path

import torch

from server.hub import CHUNK_BYTES
from tests.benchmarks.cells import Cell, Cells, unfinished
from tests.lab.device import Life, live
from tests.lab.updates import Network, network

KILLS, PER_CELL, SEED = 500, 50, 0


def kill(root: Path, kills: int, seed: int, power_cut: bool) -> Cell:
    """Versions until so many kills have hit."""
    torch.set_num_threads(1)
    draw, figures = random.Random(seed), Figures()
    with network(root, seed) as made:
        whole = live(made.site)
        if whole.killed:
            raise RuntimeError("an update that nobody killed was killed")
        while figures.kills < kills:
            update(made, whole, figures, draw, power_cut, kills)
    return vars(figures)


class Figures:
    """What the kills did."""

    def __init__(self) -> None:
        self.kills = self.verified = self.updates = self.lost = 0
        self.resent_bytes_max = 0
        self.failures: list[str] = []


def update(
    made: Network, whole: Life, figures: Figures, draw: random.Random, power_cut: bool, kills: int
) -> None:
    """One version, until it serves."""
    before = made.serving_version()
    manifest = made.publish()
    held, hits = made.held(manifest), 0
    while figures.kills + hits < kills:
        cut = draw if power_cut else None
        if draw.random() < 0.5:
            life = live(made.site, kill_after=draw.uniform(0, whole.seconds), power_cut=cut)
        else:
            life = live(made.site, kill_at=draw.randint(1, whole.operations), power_cut=cut)
        if not life.killed:
            break
        hits += 1
        before_kill, held = held, made.held(manifest)
        twice = life.received - (held - before_kill)
        figures.resent_bytes_max = max(figures.resent_bytes_max, twice)
        figures.lost += life.lost
        serves = made.serving_version()
        if serves in (before, manifest.counter):
            figures.verified += 1
        else:
            figures.failures.append(f"kill {figures.kills + hits}: {serves} serves, not {before}")
    else:
        live(made.site)
    figures.kills += hits
    figures.updates += 1
    if made.serving_version() != manifest.counter:
        figures.failures.append(f"version {manifest.counter} does not serve in the end")


def main() -> None:
    """All cells, then the sum."""
    cells = Cells("updater")
    done: list[Cell | None] = []
    for number in range(KILLS // PER_CELL):
        cut = number % 2 == 1
        name = f"{'power cuts' if cut else 'kills'}, seed {number // 2}"
        with tempfile.TemporaryDirectory() as folder:
            work = partial(kill, Path(folder), PER_CELL, number, cut)
            done.append(cells.run(name, work))
    if None in done:
        unfinished("chaos-updater")
    rows = [one for one in done if one is not None]
    figures = {
        "kills": sum(row["kills"] for row in rows),
        "verified": sum(row["verified"] for row in rows),
        "updates": sum(row["updates"] for row in rows),
        "lost": sum(row["lost"] for row in rows),
        "resent_bytes_max": max(row["resent_bytes_max"] for row in rows),
        "chunk_bytes": CHUNK_BYTES,
        "rows": rows,
        "commits": sorted({str(row["commit"]) for row in rows}),
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}))
    print(f"figures: {cells.finish(figures, [SEED], 'make chaos-updater')}")


if __name__ == "__main__":
    main()
