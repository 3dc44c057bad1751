"""A farm on a metered link: it sleeps, is woken, takes part in a run, and sleeps again."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from client import traffic
from client.traffic import Counters
from common.processes import Child
from server.status import snapshot
from tests.system.proxy import Proxy
from tests.system.site import Site, call, init_farm, open_site, words
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system]

AWAKE_SECONDS = 25.0
"""A SuperNode needs some of it to start, to be seen by the server, and to ask for work."""
METERED = f"""link = "metered"
wake_hours = 2
awake_minutes = {AWAKE_SECONDS / 60:.4f}
poll_seconds = 3
"""


@dataclass
class Sleeper:
    """The farm, and a proxy of its own that counts what it says."""

    folder: Path
    child: Child
    proxy: Proxy

    @property
    def connected(self) -> bool:
        """Whether a SuperNode runs."""
        return any("flower-supernode" in words(process) for process in self.child.observe())

    @property
    def counted(self) -> Counters:
        """By the farm, on its disk."""
        return traffic.read(self.folder / "state") or Counters()

    @property
    def carried(self) -> Counters:
        """By the proxy, on the way."""
        return Counters(sent=self.proxy.carried["up"], received=self.proxy.carried["down"])

    def wait_for_sleep(self) -> list[str]:
        """Until it is not connected any more; returns what it has asked of the server."""
        wait_until(lambda: not self.connected, 60, "sleep")
        time.sleep(1.5)  # counters are on disk after a second
        assert self.counted == self.carried, "the farm's count is not the network's"
        return [exchange.name for exchange in self.proxy.take()]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path, names=["oak"]) as site:
        yield site


@pytest.fixture
def vine(site: Site) -> Iterator[Sleeper]:
    host, _, port = site.proxy.address.partition(":")
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(host, int(port)))
        folder = Path(init_farm(site.root, "vine", 1, proxy))
        with (folder / "farm.toml").open("a") as settings:
            settings.write(METERED)
        child = site.start("vine", "fieldfed-client", "run", str(folder))
        yield Sleeper(folder, child, proxy)


def test_it_sleeps_is_woken_takes_part_and_sleeps_again(site: Site, vine: Sleeper) -> None:
    wait_until(lambda: vine.connected, 60, "a first connection")
    said = vine.wait_for_sleep()
    assert said[:2] == ["register-node", "activate-node"]
    assert said[-2:] == ["deactivate-node", "unregister-node"], "it did not sign off"
    assert "sleeps for" in vine.child.log_file.read_text()
    train = site.start("train", "fieldfed-server", "train", site.server)
    before = vine.counted
    waiting = "waiting for farms"
    wait_until(lambda: waiting in train.log_file.read_text(), 60, waiting)
    assert not vine.proxy.take(), "something passed while it slept"
    assert vine.counted == before

    assert "vine wakes" in call("fieldfed-client", "wake", str(vine.folder))
    wait_until(lambda: vine.connected, 15, "waking")
    wait_until(lambda: train.returncode is not None, 300, "the end of the run")
    assert train.returncode == 0, train.last_words()
    assert vine.connected, "it fell asleep before the end of the run"
    vine.wait_for_sleep()

    check_the_record(site, before, vine.counted)
    check_the_end(vine)


def check_the_record(site: Site, before: Counters, after: Counters) -> None:
    """What the server keeps agrees with what passed."""
    with site.store as store:
        rows = [row for row in store.link_bytes(1) if row.farm == "vine"]
        sizes = [row for row in store.traffic(1) if row.farm == "vine"]
        assert {row.farm for row in store.link_bytes(1)} == {"oak", "vine"}
    assert [(row.round, row.kind) for row in rows] == [
        (0, "evaluate"),
        (1, "align"),
        (2, "align"),
        (2, "evaluate"),
    ]
    sent, received = (sum(getattr(row, name) for row in rows) for name in ("sent", "received"))
    assert before.sent < sent < after.sent, "its last reply went up after it was counted"
    assert before.received < received < after.received
    # all requests came down before the last reply; all replies but the last had gone up
    assert received > sum(row.bytes_down for row in sizes)
    assert after.sent > sum(row.bytes_up for row in sizes)
    (line,) = [row for row in snapshot(Path(site.server))["farms"] if row["farm"] == "vine"]
    assert (line["link_sent"], line["link_received"]) == (sent, received)
    shown = json.loads(call("fieldfed-server", "status", site.server, "--json"))
    assert shown["farms"] == snapshot(Path(site.server))["farms"]


def check_the_end(vine: Sleeper) -> None:
    """Asleep, it still ends at once when it is told to."""
    processes = vine.child.observe()
    assert vine.child.pid is not None
    os.kill(vine.child.pid, signal.SIGTERM)
    wait_until(lambda: vine.child.returncode is not None, 15, "the end of the farm")
    assert vine.child.returncode == 0
    wait_until(lambda: not [p for p in processes if words(p)], 15, "the end of its processes")
