"""Cells of a benchmark: one line per finished cell, resumed after a kill, within a time budget.

bench-output/cells/NAME.jsonl   a line per finished cell, with the commit that it ran at: committed,
                                so that a long table can be finished on another machine, and every
                                interval computed again; delete it to begin again
bench-output/NAME.json          the result, once all cells are done: committed as evidence
bench-work/                     what cells keep beside their figures
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.files import write_atomically
from server.provenance import commit, provenance

Cell = dict[str, Any]


class Cells:
    """The cells of one benchmark.

    Args:
        name: of the benchmark.
        minutes: no new cell is begun after that; ``MINUTES`` in the environment overrides.
        root: of the project.
    """

    def __init__(self, name: str, minutes: float = 120, root: Path = Path()) -> None:
        self._name, self._root = name, root
        self._until = time.monotonic() + 60 * float(os.environ.get("MINUTES", minutes))
        self._path = root / "bench-output" / "cells" / f"{name}.jsonl"
        self.done: dict[str, Cell] = {}
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                try:
                    cell = json.loads(line)
                except ValueError:
                    continue  # cut off in the middle of a line: that cell runs again
                self.done[cell["cell"]] = cell

    def run(self, cell: str, work: Callable[[], Cell]) -> Cell | None:
        """The cell's figures, from an earlier call or now; None when the time is over."""
        if cell in self.done:
            return self.done[cell]
        if time.monotonic() >= self._until:
            return None
        started = time.monotonic()
        figures: Cell = {"cell": cell, "commit": commit()} | work()
        figures["seconds"] = round(time.monotonic() - started, 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[cell] = figures
        print(json.dumps(figures), flush=True)
        return figures

    def finish(self, figures: Cell, seeds: Sequence[int], command: str | None = None) -> Path:
        """Write the result with its provenance; returns its path."""
        about = provenance(command or f"make {self._name}", seeds[0]).model_dump(
            exclude={"seed"}, exclude_defaults=True
        )
        about["seeds"] = list(seeds)
        path = self._root / "bench-output" / f"{self._name}.json"
        text = json.dumps({"provenance": about} | figures, indent=2, sort_keys=True)
        write_atomically(path, text.encode() + b"\n")
        return path


def unfinished(name: str) -> NoReturn:
    """Say how to go on, and end with a status that is not success."""
    print(f"time is over; 'make {name}' goes on where it stopped", file=sys.stderr)
    raise SystemExit(75)
