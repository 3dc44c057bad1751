"""A real network whose farms' links drop, delay, cut and repeat what the SuperLink answers."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from tests.system.conftest import Told
from tests.system.proxy import Exchange, Fate
from tests.system.site import FARMS, Site, call, open_site, words
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system]

SETTINGS = {"rounds": {"attempt_seconds": 6, "attempts": 30, "deadline_seconds": 240}}


@dataclass
class Script:
    """The fates of the first answers of each kind that carry something; the rest passes.

    The first two of each kind are left alone, so that both farms are known before trouble begins.
    """

    fates: dict[str, list[Fate]]
    seen: dict[str, int] = field(default_factory=dict)

    def __call__(self, exchange: Exchange) -> Fate:
        if exchange.name == "pull-messages" and len(exchange.response) < 100:
            return Fate.PASS  # nothing to do
        number = self.seen.get(exchange.name, 0)
        self.seen[exchange.name] = number + 1
        fates = [Fate.PASS, Fate.PASS, *self.fates.get(exchange.name, [])]
        return fates[number] if number < len(fates) else Fate.PASS


SCRIPT = {
    "pull-messages": [Fate.DROP, Fate.TRUNCATE, Fate.DELAY],
    "pull-object": [Fate.TRUNCATE, Fate.REPEAT, Fate.DROP],
    "push-object": [Fate.DROP, Fate.DELAY, Fate.TRUNCATE, Fate.REPEAT],
    "push-messages": [Fate.REPEAT, Fate.DROP, Fate.DELAY],
    "confirm-message-received": [Fate.DROP, Fate.REPEAT],
    "send-node-heartbeat": [Fate.DROP],
}


def finished(site: Site) -> list[str]:
    """Train to the end; digests of the candidates."""
    assert "run 1 is done" in call("fieldfed-server", "train", site.server)
    with site.store as store:
        return [row.digest for row in store.candidates(1).values()]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, list[str]]]:
    with open_site(tmp_path_factory.mktemp("spoiled"), Script(SCRIPT), SETTINGS) as site:
        yield site, finished(site)


def test_a_run_over_bad_links_ends_with_the_model_of_a_run_over_good_ones(
    spoiled: tuple[Site, list[str]], told: Told
) -> None:
    with told.site.store as store:
        assert spoiled[1] == [row.digest for row in store.candidates(1).values()]


def test_every_kind_of_trouble_did_occur(spoiled: tuple[Site, list[str]]) -> None:
    suffered = spoiled[0].proxy.suffered
    for name, fates in SCRIPT.items():
        assert any(suffered[name, fate] for fate in fates), name
    assert {fate for _, fate in suffered} == set(Fate) - {Fate.PASS}


def test_every_farm_counts_once_in_every_round(spoiled: tuple[Site, list[str]]) -> None:
    with spoiled[0].store as store:
        for number in (1, 2):
            assert sorted(row.farm for row in store.replies(1, number)) == sorted(FARMS)
        requests = sum(row.requests for row in store.traffic(1))
    # two rounds, and two reports of each farm
    assert requests > 4 * len(FARMS), "nothing was asked again: the trouble was none"


def test_a_farm_killed_in_the_middle_of_its_work_is_asked_again(
    spoiled: tuple[Site, list[str]],
) -> None:
    site = spoiled[0]
    arguments = ("train", site.server, "--rounds", "2", "--label", "again")
    train = site.start("again", "fieldfed-server", *arguments)
    wait_until(lambda: killed(site), 120, "work on a round of the second run")
    wait_until(lambda: train.returncode is not None, 200, "the end of the run")
    assert train.returncode == 0, train.last_words()
    with site.store as store:
        assert [len(store.replies(2, number)) for number in (1, 2)] == [len(FARMS)] * 2
        assert sum(row.requests for row in store.traffic(2)) > 4 * len(FARMS)


def killed(site: Site) -> bool:
    """Kill a farm's work once it is at work on a round of the second run."""
    with site.store as store:
        if store.latest_run() is None or not store.rounds(2):
            return False
    everyone = {process.pid: process for farm in site.farms for process in farm.observe()}
    executors = {pid for pid, process in everyone.items() if "client.executor" in words(process)}
    speaking = {pid for pid, process in everyone.items() if parent(process) in executors}
    at_work = [process for process in everyone.values() if parent(process) in speaking]
    # one that has just begun, so that its answer cannot be on its way yet
    begun = [process for process in at_work if time.time() - process.create_time() < 1.0]
    for process in begun[:1]:
        process.kill()
    return bool(begun)


def parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0
