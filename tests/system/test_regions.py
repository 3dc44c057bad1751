"""Two regions and a centre with real processes, and the centre killed on its way."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.processes import Child, free_port, stop_all, wait_for_port
from server.store import Store
from tests.lab.network import draw_folder
from tests.system.proxy import Proxy
from tests.system.site import call, command, init_farm, site_settings, start, tell
from tests.waiting import wait_until

pytestmark = pytest.mark.system

REGIONS = {"north": "oak", "south": "vine"}
SECONDS = 600.0


@dataclass
class Union:
    """What is running."""

    root: Path
    centre: str
    children: list[Child]

    def candidates(self, server: str) -> dict[int, str]:
        """Digests by round of the last run of a server."""
        path = self.root / server / "fieldfed.db"
        if not path.is_file():
            return {}
        with Store.open(path, read_only=True) as store:
            return {number: row.digest for number, row in store.candidates(1).items()}


@pytest.fixture(scope="module")
def union(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Union]:
    root = tmp_path_factory.mktemp("union")
    source = draw_folder(root / "photos" / "source", 3, 16, 7)
    centre = root / "centre"
    ports = {name: free_port() for name in REGIONS}
    entries = "".join(
        f'\n[[regions]]\nname = "{name}"\naddress = "127.0.0.1:{port}"\nmember = "{name}.member"\n'
        for name, port in ports.items()
    )
    write(centre, source, {"server": {"name": "coop", "port": free_port()}}, entries)
    call("fieldfed-server", "pretrain", str(centre))
    call("fieldfed-server", "region", "request", str(centre))
    with ExitStack() as stack:
        children: list[Child] = []
        stack.callback(lambda: tell(children))
        stack.callback(lambda: stop_all(children, 15))
        for number, (name, farm) in enumerate(REGIONS.items()):
            port = free_port()
            settings = {
                "server": {"name": name, "port": port},
                "region": {"centre": "coop", "port": ports[name], "fewest": 1},
                "rounds": {"min_farms": 1},
            }
            write(root / name, source, settings)
            request, member = str(centre / "centre" / "coop.csr"), str(centre / f"{name}.member")
            call("fieldfed-server", "certify", str(root / name), request, "--out", member)
            up = start(f"up-{name}", command("fieldfed-server", "up", str(root / name)), root)
            children.append(up)
            wait_for_port("127.0.0.1", port, 120, up)
            there = cast(Proxy, SimpleNamespace(address=f"127.0.0.1:{port}"))
            folder = init_farm(root, farm, number, there)
            children.append(start(farm, command("fieldfed-client", "run", folder), root))
        yield Union(root, str(centre), children)


def write(folder: Path, source: Path, settings: dict[str, Any], more: str = "") -> None:
    """The settings of a server."""
    folder.mkdir()
    (folder / "server.toml").write_text(site_settings(0, source, settings) + more)


def test_a_centre_leads_two_regions_also_when_it_is_killed(union: Union) -> None:
    def all_there() -> bool:
        said = call_quietly("fieldfed-server", "region", "check", union.centre, "--json")
        return said is not None and all(line["images"] for line in json.loads(said))

    wait_until(all_there, SECONDS, "the introduction of both regions")
    call("fieldfed-server", "train", str(union.root / "north"), code=2)
    run = ("fieldfed-server", "train", union.centre, "--label", "spring", "--once")
    train = start("train", command(*run), union.root)
    union.children.append(train)
    wait_until(lambda: union.candidates("centre"), SECONDS, "the first round")
    assert train.pid is not None
    os.kill(train.pid, signal.SIGKILL)
    wait_until(lambda: train.returncode is not None, 30, "the end of the centre")
    said = call(*run, seconds=SECONDS)
    assert "run 1 is done" in said
    assert "run 1 of the label 'spring' is done already" in call(*run)
    expected = union.candidates("centre")
    assert len(expected) == 2
    for name in REGIONS:
        assert union.candidates(name) == expected
    status = json.loads(call("fieldfed-server", "status", union.centre, "--json"))
    assert status["run"] == 1
    assert status["state"] == "done"
    assert {row["farm"] for row in status["farms"]} == set(REGIONS)
    assert status["mask"]["heads_kept_ratio"] < 1
    assert [row["replies"] for row in status["rounds"]] == [2, 2]
    for farm in REGIONS.values():
        assert farm not in json.dumps(status)


def call_quietly(*arguments: str) -> str | None:
    """What a command printed; None when it failed."""
    try:
        return call(*arguments)
    except AssertionError:
        return None
