"""Kill a lab run with SIGKILL at random moments, again and again, and see what is left of it.

``python -m tests.lab.chaos FOLDER KILLS [SEED]`` prints figures as JSON. The run resumes after each
kill; server and farms share the process, so that a kill hits both in the middle of what they write.
Every finished run is compared with one that nobody disturbed: same candidates, to the last bit.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from server.store import Store
from tests.lab.network import Lab

PLAN: dict[str, Any] = {"rounds": 4, "warmup": 1, "prune_events": 2, "prune_heads": 0.4}


@dataclass
class Figures:
    """What the kills did.

    ``resumed`` counts kills after which the run came to its end; ``rounds_redone_max`` rounds that
    one kill made the run do again; ``double_counted`` updates that count twice;
    ``weights_equal`` whether every run ended with the undisturbed candidates.
    """

    kills: int = 0
    resumed: int = 0
    runs: int = 0
    rounds_redone_max: int = 0
    double_counted: int = 0
    weights_equal: bool = True


def batter(root: Path, kills: int, seed: int, tell: Callable[[Figures], None]) -> Figures:
    """Kill until ``kills`` kills have hit; ``tell`` is called after every finished run."""
    lab = Lab(root / "undisturbed", **PLAN)
    shutil.copytree(root / "undisturbed", root / "fresh")
    started = time.monotonic()
    if _child(lab, None):
        raise RuntimeError("the undisturbed run failed")
    whole = time.monotonic() - started
    expected = _candidates(lab)
    figures, draw = Figures(), random.Random(seed)
    while figures.kills < kills:
        _one_run(lab, root, figures, kills, lambda: draw.uniform(0.0, whole))
        figures.weights_equal &= _candidates(lab) == expected
        tell(figures)
    return figures


def _one_run(
    lab: Lab, root: Path, figures: Figures, kills: int, delay: Callable[[], float]
) -> None:
    """One run from its first line to its last, however often it is killed."""
    shutil.rmtree(lab.root)
    shutil.copytree(root / "fresh", lab.root)
    hits, done = 0, False
    while not done:
        before = opened(lab.server_dir)
        killed = _child(lab, delay() if figures.kills + hits < kills else None)
        hits += killed
        done = not killed or _over(lab)
        figures.rounds_redone_max = max(figures.rounds_redone_max, redone(lab.server_dir, before))
    figures.kills += hits
    figures.resumed += hits
    figures.runs += 1
    figures.double_counted += _double_counted(lab)


def _child(lab: Lab, delay: float | None) -> bool:
    """Run, or go on, in a forked process; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if delay is not None:
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            lab.run()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a run ended with an error instead of going on; see above")
    return os.WIFSIGNALED(status)


def opened(server_dir: Path) -> dict[int, int]:
    """How often each round of alignment of the last run was opened."""
    if not (server_dir / "fieldfed.db").is_file():
        return {}
    with Store.open(server_dir / "fieldfed.db") as store:
        run = store.latest_run()
        rows = [] if run is None else store.rounds(run.run)
    return {row.round: row.attempt for row in rows if row.kind == "align"}


def redone(server_dir: Path, before: dict[int, int]) -> int:
    """How many rounds that were ``opened`` before have been opened again since."""
    after = opened(server_dir)
    return sum(after[number] > times for number, times in before.items())


def _over(lab: Lab) -> bool:
    """Whether the run had come to its end already when it was hit."""
    if not (lab.server_dir / "fieldfed.db").is_file():
        return False
    with Store.open(lab.server_dir / "fieldfed.db") as store:
        run = store.latest_run()
    return run is not None and run.state == "done"


def _double_counted(lab: Lab) -> int:
    """Updates beyond the first of a farm and round, and what was folded without being on record."""
    wrong = 0
    with lab.store() as store:
        if len(store.runs()) != 1:
            wrong += 1
        for row in store.rounds(1):
            nodes = [reply.node for reply in store.replies(1, row.round)]
            wrong += len(nodes) - len(set(nodes))
            wrong += row.kind == "align" and row.participants != len(lab.farms)
    return wrong


def _candidates(lab: Lab) -> list[str]:
    with lab.store() as store:
        return [row.digest for row in store.candidates(1).values()]


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)  # a fork has none of the parent's threads, and would wait for them
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    figures = batter(root, kills, seed, lambda now: print(json.dumps(asdict(now)), flush=True))
    if figures.double_counted or not figures.weights_equal or figures.rounds_redone_max > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
