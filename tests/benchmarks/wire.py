"""Bytes of real rounds: ten SuperNodes, each behind a link of its own that counts at the socket.

Counted is TCP payload between a SuperNode and the SuperLink with everything that Flower adds:
envelopes, HTTP headers, polls, heartbeats. A round lasts from when its work is opened until the
next one's.
"""

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.config import TrainConfig
from common.processes import (
    Child,
    free_port,
    stop_all,
    terminate_like_interrupt,
    wait_for_port,
)
from server.store import Store
from tests.benchmarks import plants
from tests.system.site import call, command, start, toml
from tests.system.slowlink import GOOD, Conditions, SlowLink

LOOK_SECONDS = 0.1
LIMIT_SECONDS = 3000


@dataclass
class Tally:
    """Bytes up and down of every link over time."""

    links: Mapping[str, SlowLink]
    looks: list[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=list)

    def look(self) -> None:
        """Note what every link has carried by now."""
        now = {farm: (link.up, link.down) for farm, link in self.links.items()}
        self.looks.append((time.time(), now))

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Bytes up and down between two times (unix seconds), mean over farms."""
        first, last = (self._at(moment) for moment in (start, end))
        up = fmean(last[farm][0] - first[farm][0] for farm in self.links)
        down = fmean(last[farm][1] - first[farm][1] for farm in self.links)
        return up, down

    def _at(self, moment: float) -> dict[str, tuple[int, int]]:
        earlier = [seen for when, seen in self.looks if when <= moment]
        return earlier[-1] if earlier else self.looks[0][1]


@dataclass(frozen=True)
class Measured:
    """Rounds of a run, and what 100 s without work cost afterwards; bytes are means over farms."""

    rounds: list[dict[str, float]]
    idle: dict[str, float]
    resets: int = 0


@contextmanager
def network(
    root: Path,
    sections: Mapping[str, Mapping[str, Any]],
    farms: Sequence[str],
    conditions: Conditions = GOOD,
    preload: bool = False,
) -> Iterator[tuple[Path, Tally]]:
    """A server and real farms; yields the server's folder and the bytes of the farms' links."""
    port, server = free_port(), root / "server"
    _write_settings(server / "server.toml", {**sections, "server": {"port": port}})
    with terminate_like_interrupt(), ExitStack() as stack:
        children: list[Child] = []
        stack.callback(lambda: stop_all(children, 20))
        call("fieldfed-server", "pretrain", str(server))
        up = start("up", command("fieldfed-server", "up", str(server)), root)
        children.append(up)
        wait_for_port("127.0.0.1", port, 120, up)
        links = {}
        for number, name in enumerate(farms):
            link = stack.enter_context(SlowLink("127.0.0.1", port, conditions, number))
            links[name] = link
            folder = root / "farms" / name
            _write_settings(folder / "farm.toml", {"farm": _farm(root, name, link)})
            if preload:
                base = str(server / "base.safetensors")
                call("fieldfed-client", "load", str(folder), base)
            children.append(start(name, command("fieldfed-client", "run", str(folder)), root))
        tally = Tally(links)
        ended = threading.Event()
        stack.callback(ended.set)
        threading.Thread(target=_watch, args=(tally, ended), daemon=True).start()
        yield server, tally


def train(server: Path) -> None:
    """One run to its end."""
    call("fieldfed-server", "train", str(server), seconds=LIMIT_SECONDS)


def rounds_of(server: Path, tally: Tally) -> list[dict[str, float]]:
    """Bytes and seconds of each round of alignment of the first run, mean over farms."""
    with Store.open(server / "fieldfed.db", read_only=True) as store:
        rounds = [row for row in store.rounds(1) if row.kind == "align"]
        end = store.run(1).finished or time.time()
        reported = min(
            (row.received - row.seconds for row in store.reports(1, "model")), default=end
        )
    starts = [row.started for row in rounds] + [reported]
    found = []
    for row, start_, stop in zip(rounds, starts, starts[1:], strict=False):
        up, down = tally.between(start_, stop)
        found.append({"round": row.round, "up": up, "down": down, "seconds": stop - start_})
    return found


def settings(train_config: TrainConfig, rounds: int, **plan: Any) -> dict[str, dict[str, Any]]:
    """Sections of a server's settings for the shared ViT-S and its source species."""
    return {
        "backbone": {
            "name": plants.NAME,
            "image_size": plants.SIDE,
            "weights": str(plants.WEIGHTS.resolve()),
            "source": str(plants.source()),
            "anchor_images": 64,
        },
        "plan": {"rounds": rounds, **plan},
        "rounds": {"deadline_seconds": LIMIT_SECONDS, "grace_seconds": 0},
        "train": train_config.model_dump(exclude_none=True),
    }


def measure(
    train_config: TrainConfig,
    rounds: int,
    farms: Sequence[str],
    conditions: Conditions = GOOD,
    idle_seconds: float = 0.0,
    **plan: Any,
) -> Measured:
    """One run. On links that are not good the farms hold the first backbone already."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sections = settings(train_config, rounds, **plan)
        sections["rounds"]["min_farms"] = len(farms)
        preload = conditions != GOOD
        with network(root, sections, farms, conditions, preload) as (server, tally):
            train(server)
            found = rounds_of(server, tally)
            ended = time.time()
            time.sleep(idle_seconds)
            up, down = tally.between(ended, time.time() - LOOK_SECONDS)
            share = 100 / idle_seconds if idle_seconds else 0.0
            resets = sum(link.resets for link in tally.links.values())
            return Measured(found, {"up": up * share, "down": down * share}, resets)


def _farm(root: Path, name: str, link: SlowLink) -> dict[str, Any]:
    return {
        "name": name,
        "data": str((plants.SHARED / "data" / "farms" / name).resolve()),
        "superlink": link.address,
        "per_class": plants.PER_CLASS,
        "threads": 1,
        "turns": str(root / "turns"),
        "places": plants.PROCESSES,
        "poll_seconds": 30,
    }


def _write_settings(path: Path, sections: Mapping[str, Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml(sections))


def _watch(tally: Tally, ended: threading.Event) -> None:
    while not ended.wait(LOOK_SECONDS):
        tally.look()
