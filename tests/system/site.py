"""A real network in a folder, opened by our commands alone: a server and two farms on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.processes import Child, free_port, stop_all, wait_for_port
from server.store import Store
from tests.lab.network import SIDE, TINY, draw_folder
from tests.system.proxy import Choose, Proxy, unharmed
from tests.system.slowlink import SlowLink

BIN = Path(sys.executable).parent
FARMS = ("oak", "vine")

_SETTINGS: dict[str, dict[str, object]] = {
    "backbone": {
        "name": "vit_tiny_patch16_224",
        "image_size": SIDE,
        "epochs": 2,
        "anchor_images": 32,
    },
    "plan": {
        "rounds": 2,
        "warmup": 0,
        "prune_events": 1,
        "prune_heads": 0.4,
        "max_drop_ratio": 1.0,
    },
    "rounds": {"min_farms": 2, "grace_seconds": 0, "deadline_seconds": 120},
    "train": {"epochs": 1, "batch_size": 16},
}


@dataclass
class Site:
    """A running network."""

    root: Path
    up: Child
    farms: list[Child]
    proxy: Proxy
    children: list[Child]
    """All that ends with the site: the server, the farms, and what :meth:`start` started."""

    @property
    def server(self) -> str:
        """The server's folder."""
        return str(self.root / "server")

    @property
    def store(self) -> Store:
        """The server's store, to be closed after use."""
        return Store.open(self.root / "server" / "fieldfed.db", read_only=True)

    def start(self, name: str, *arguments: str) -> Child:
        """Start one of our commands beside them."""
        child = start(name, command(*arguments), self.root)
        self.children.append(child)
        return child


def command(*arguments: str) -> list[str]:
    """One of our commands, from where this Python has its own."""
    return [str(BIN / arguments[0]), *arguments[1:]]


def call(*arguments: str, code: int = 0, seconds: float = 600) -> str:
    """Run one of our commands to its end, within so many seconds; returns all that it printed."""
    return finish(command(*arguments), code, seconds)


def finish(arguments: list[str], code: int = 0, seconds: float = 600) -> str:
    """Run a command to its end, as :func:`call` does."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def start(name: str, arguments: list[str], root: Path) -> Child:
    """Start one of our commands, with its log in ``root``."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    child = Child(name, lambda: arguments, root / f"{name}.log", env)
    child.start()
    return child


def words(process: psutil.Process) -> str:
    """What a process was started with; nothing when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def tell(children: Sequence[Child]) -> None:
    """Print how each child's log ends; pytest shows it beside a failure."""
    for child in children:
        print(f"--- {child.name}\n{child.last_words(15)}")


@contextmanager
def open_site(
    root: Path,
    choose: Choose = unharmed,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    names: Sequence[str] = FARMS,
    more: Mapping[str, str] | None = None,
) -> Iterator[Site]:
    """Pre-train, start the server and its farms; everything ends with the context.

    Args:
        root: an empty folder.
        choose: the fate of what passes between the farms and the server.
        settings: of the server, over those of above.
        names: of the farms that are started.
        more: what stands in a farm's settings besides, by its name.
    """
    port, server = free_port(), root / "server"
    source = draw_folder(root / "photos" / "source", 3, 16, 7)
    server.mkdir(parents=True)
    (server / "server.toml").write_text(site_settings(port, source, settings or {}))
    call("fieldfed-server", "pretrain", str(server))
    with ExitStack() as stack:
        children: list[Child] = []
        stack.callback(lambda: tell(children))
        stack.callback(lambda: stop_all(children, 15))
        up = start("up", command("fieldfed-server", "up", str(server)), root)
        children.append(up)
        wait_for_port("127.0.0.1", port, 60, up)
        proxy = stack.enter_context(Proxy("127.0.0.1", port, choose))
        for number, name in enumerate(names):
            folder = init_farm(root, name, number, proxy)
            with (Path(folder) / "farm.toml").open("a") as file:
                file.write((more or {}).get(name, ""))
            children.append(start(name, command("fieldfed-client", "run", folder), root))
        yield Site(root, up, children[1:], proxy, children)


def init_farm(root: Path, name: str, number: int, link: Proxy | SlowLink) -> str:
    """Draw a farm's images and create it; returns its folder."""
    data = draw_folder(root / "photos" / name, 2 + number, 15, 50 + number)
    folder = str(root / "farms" / name)
    flags = ("--data", str(data), "--superlink", link.address, "--threads", "1")
    said = call("fieldfed-client", "init", folder, *flags)
    assert f"farm {name}: {2 + number} classes" in said
    return folder


def site_settings(port: int, source: Path, changes: Mapping[str, Mapping[str, object]]) -> str:
    own: dict[str, dict[str, object]] = {
        "server": {"port": port},
        "backbone": {"source": str(source)},
        "backbone.options": dict(TINY),
    }
    sections: dict[str, dict[str, object]] = {}
    for group in (_SETTINGS, own, changes):
        for name, values in group.items():
            sections[name] = sections.get(name, {}) | dict(values)
    return "seed = 1\n" + toml(sections)


def toml(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Settings as a file holds them."""
    lines = []
    for name, section in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"
