"""Cells of a benchmark: one line per finished cell, resumed after a kill, within a time budget.

bench-output/cells/NAME.jsonl   a line per finished cell, with the commit that it ran at: committed,
                                so that a long table can be finished on another machine, and every
                                interval computed again; delete it to begin again
bench-output/NAME.json          the result, once all cells are done: committed as evidence
bench-work/                     what cells keep beside their figures

The same command in several terminals shares the cells out: each takes one that nobody works on.
Once all are done, one more call prints the table.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from common.errors import StateError
from common.files import only_one, write_atomically
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
        self._read()

    def _read(self) -> None:
        if not self._path.is_file():
            return
        for line in self._path.read_text().splitlines():
            try:
                cell = json.loads(line)
            except ValueError:
                continue  # cut off in the middle of a line: that cell runs again
            self.done[cell["cell"]] = cell

    def run(self, cell: str, work: Callable[[], Cell]) -> Cell | None:
        """The cell's figures, from an earlier call or now.

        None when the time is over, or while another call works on it.
        """
        if cell in self.done:
            return self.done[cell]
        if time.monotonic() >= self._until:
            return None
        name = sha256(cell.encode()).hexdigest()[:16]
        with ExitStack() as stack:
            try:
                claim = self._root / "bench-work" / "claims" / f"{self._name}-{name}"
                stack.enter_context(only_one(claim))
            except StateError:
                return None
            self._read()  # another call may have ended it since
            return self.done.get(cell) or self._work(cell, work)

    def _work(self, cell: str, work: Callable[[], Cell]) -> Cell:
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
    print(
        f"time is over, or another call is at the rest; 'make {name}' goes on where it stopped",
        file=sys.stderr,
    )
    raise SystemExit(75)
