"""A server that is lost and comes back from a backup, while its farms work on and know of nothing.

Two farms behind the door, on loopback. The commands are those of deploy/guides/backup-restore.md.
Once the backup is of the newest state; once it was made in the middle of an earlier run, one
published version and one revocation ago.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.processes import Child, free_port, stop_all, wait_for_port
from server.status import snapshot
from server.store import Store
from tests.lab.network import draw_folder
from tests.system.site import call, command, site_settings, start, tell
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system, pytest.mark.timeout(1500)]

FARMS = ("oak", "vine")
PRUNED = ("--rounds", "2", "--prune-heads", "0.4", "--label", "pruned")


@dataclass
class Place:
    """A server and its farms; the server may be stopped, and its folder lost."""

    root: Path
    door: int
    children: list[Child]
    up: Child | None = None

    @property
    def folder(self) -> Path:
        """Of the server."""
        return self.root / "server"

    def server(self, verb: str, *rest: str, code: int = 0) -> str:
        """A command of the server's, to its end."""
        first, *more = verb.split()
        return call("fieldfed-server", first, *more, str(self.folder), *rest, code=code)

    def farm(self, name: str, verb: str, *rest: str, code: int = 0) -> str:
        """A command of a farm's, to its end."""
        return call("fieldfed-client", verb, str(self.root / "farms" / name), *rest, code=code)

    def start(self, name: str, *arguments: str) -> Child:
        """A command to stay."""
        child = start(name, command(*arguments), self.root)
        self.children.append(child)
        return child

    def start_server(self) -> None:
        """``up``, until farms may come."""
        self.up = self.start("up", "fieldfed-server", "up", str(self.folder))
        wait_for_port("127.0.0.1", self.door, 90, self.up)

    def lose_server(self) -> None:
        """Stop it, and remove all that it knew."""
        assert self.up is not None
        stop_all([self.up], 15)
        self.children.remove(self.up)
        shutil.rmtree(self.folder)

    def status(self) -> dict[str, Any]:
        """What ``status`` knows."""
        return snapshot(self.folder)

    def took_part(self, run: int) -> dict[int, set[str]]:
        """Farms whose replies count, by round."""
        with Store.open(self.folder / "fieldfed.db", read_only=True) as store:
            rounds = [row.round for row in store.rounds(run) if row.kind == "align"]
            return {one: {row.farm for row in store.replies(run, one)} for one in rounds}

    def candidates(self, run: int) -> list[str]:
        """Digests of what each round ended with."""
        with Store.open(self.folder / "fieldfed.db", read_only=True) as store:
            found = store.candidates(run)
            return [found[number].digest for number in sorted(found)]

    def joined(self) -> dict[str, list[bytes]]:
        """What a farm was given when it joined."""
        names = ("membership.json", "identity/certificate.pem", "identity/ca.pem")
        states = {farm: self.root / "farms" / farm / "state" for farm in FARMS}
        return {
            farm: [(state / name).read_bytes() for name in names] for farm, state in states.items()
        }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    port, door = free_port(), free_port()
    source = draw_folder(tmp_path / "photos" / "source", 3, 16, 7)
    changes: dict[str, dict[str, object]] = {
        "plan": {"rounds": 1},
        "door": {"host": "127.0.0.1", "port": door},
        "hub": {"host": "127.0.0.1", "port": free_port()},
    }
    text = re.sub(r"prune_heads = .*\n", "", site_settings(port, source, changes))
    with ExitStack() as stack:
        children: list[Child] = []
        stack.callback(lambda: tell(children))
        stack.callback(lambda: stop_all(children, 15))
        made = Place(tmp_path, door, children)
        made.folder.mkdir()
        (made.folder / "server.toml").write_text(text)
        made.server("pretrain")
        made.start_server()
        for number, name in enumerate(FARMS):
            data = draw_folder(tmp_path / "photos" / name, 2 + number, 15, 50 + number)
            made.farm(name, "init", "--data", str(data), "--threads", "1")
            asked = json.loads(made.server("enrol", name, "--json"))
            made.farm(name, "join", asked["door"], asked["code"])
            made.start(name, "fieldfed-client", "run", str(tmp_path / "farms" / name))
        yield made


def test_a_server_that_was_lost_comes_back_and_its_farms_need_not(place: Place) -> None:
    newest, earlier = place.root / "newest.tar", place.root / "earlier.tar"
    version_one(place)
    ended_with = version_two_and_a_backup_on_the_way(place, earlier)
    joined = place.joined()
    the_newest_backup(place, newest)
    an_earlier_backup(place, earlier, ended_with)
    assert place.joined() == joined, "nobody has joined again"


def version_one(place: Place) -> None:
    assert "run 1 is done" in place.server("train")
    assert place.took_part(1) == {1: set(FARMS)}
    place.server("registry publish", "--channel", "stable")


def version_two_and_a_backup_on_the_way(place: Place, earlier: Path) -> list[str]:
    """A backup between the two rounds of run 2; returns what those end with."""
    train = place.start("train", "fieldfed-server", "train", str(place.folder), *PRUNED)
    wait_until(
        lambda: place.status()["label"] == "pruned" and len(place.status()["rounds"]) > 1,
        240,
        "the second round of run 2",
    )
    said = place.server("backup", str(earlier))
    assert "it holds the network's keys" in said
    wait_until(lambda: train.returncode is not None, 240, "the end of run 2")
    assert train.returncode == 0
    place.server("registry publish", "--channel", "stable")
    assert re.search("version 2 (is in use|rejected|stays out)", place.farm("oak", "update"))
    return place.candidates(2)


def the_newest_backup(place: Place, newest: Path) -> None:
    before = place.status()
    place.server("backup", str(newest))
    place.lose_server()
    assert "all of it whole" in place.server("restore", str(newest))
    assert place.status()["rounds"] == before["rounds"]
    place.start_server()
    assert re.search("version 2 (is in use|stays out)", place.farm("oak", "update"))
    assert "run 3 is done" in place.server("train", "--label", "after")
    assert place.took_part(3) == {1: set(FARMS)}


def an_earlier_backup(place: Place, earlier: Path, ended_with: list[str]) -> None:
    place.server("revoke", "vine")
    cut(place)
    place.lose_server()
    assert "revoked since then" in place.server("restore", str(earlier))
    assert place.status()["state"] == "running"
    place.start_server()  # and the run of the backup goes on by itself
    wait_until(lambda: place.status()["state"] == "done", 240, "the end of the run that was cut")
    assert place.candidates(2) == ended_with
    assert place.took_part(2) == {1: set(FARMS), 2: set(FARMS)}

    # the channel names version 1 again, in a document that a device believes which has seen
    # version 2; then another version of that number
    assert re.search("version 1 (is in use|stays out|rejected)", place.farm("oak", "update"))
    place.server("registry publish", "--channel", "stable")
    assert re.search("version 2 (is in use|rejected|stays out)", place.farm("oak", "update"))

    assert "farm vine is out" in place.server("revoke", "vine")
    cut(place)


def cut(place: Place) -> None:
    """Wait until the door has put farm vine out."""
    log = place.folder / "logs" / "door.log"
    wait_until(
        lambda: "farm vine is revoked" in log.read_text(), 60, "the end of vine's connection"
    )
