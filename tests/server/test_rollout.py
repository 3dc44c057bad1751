"""A version goes out in steps: who is shown it, when it goes on, and what ends it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import ConfigError
from common.manifest import InstallReport, Outcome, read_channel
from server import rollout
from server.registry import STABLE, Registry
from server.rollout import RolloutPlan, judge, newest, offered, share_of
from server.versions import InstallRow, RolloutRow
from tests.lab.hub import LabHub
from tests.lab.versions import two_versions
from tests.waiting import wait_until

FARMS = [f"farm{number}" for number in range(400)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with two_versions(tmp_path / "server") as opened:
        opened.promote(STABLE, 1)
        yield opened


def plan_of(**values: object) -> RolloutPlan:
    return RolloutPlan.model_validate({"channel": STABLE, "version": 2} | values)


def report(registry: Registry, farm: str, outcome: Outcome = "committed") -> None:
    registry.rows.record_install(InstallRow(farm, "pi", 2, outcome, "", None, None, time.time()))


def now(registry: Registry) -> RolloutRow:
    row = registry.rows.rollout(STABLE)
    assert row is not None
    return row


def shown(registry: Registry) -> float:
    """Share of the farms that are shown the new version."""
    return sum(offered(now(registry), farm) for farm in FARMS) / len(FARMS)


# --- who is shown it -------------------------------------------------------------------------


def test_it_goes_to_canaries_a_tenth_a_half_and_all(registry: Registry) -> None:
    rollout.start(registry, plan_of(canary=["farm7", "farm8"]))
    assert [farm for farm in FARMS if offered(now(registry), farm)] == ["farm7", "farm8"]
    report(registry, "farm7")
    assert rollout.step(registry) == []  # the other has not said anything
    report(registry, "farm8")
    for number, share in enumerate((0.1, 0.5)):
        (moved,) = rollout.step(registry)
        assert f"{2 + number} of {2 + number} devices took it" in moved.detail
        assert rollout.step(registry) == []  # nobody new has said anything
        report(registry, f"farm{100 + number}")
        assert shown(registry) == pytest.approx(share, abs=0.06)
        assert offered(now(registry), "farm7")
    assert registry.named(STABLE).version == 1
    (moved,) = rollout.step(registry)
    assert moved.state == "done"
    assert registry.named(STABLE).version == 2
    assert registry.named(STABLE).why == "rolled out"
    assert rollout.step(registry) == []


@given(st.text("abc", min_size=1, max_size=5), st.integers(1, 50))
def test_who_is_in_stays_in(farm: str, version: int) -> None:
    assert 0 <= share_of(version, farm) < 1
    assert share_of(version, farm) == share_of(version, farm)
    row = RolloutRow(STABLE, version, 1, 1, "", plan_of().model_dump_json(), 0, "running", 0.0, "")
    earlier = [offered(row.changed(stage=stage), farm) for stage in range(3)]
    assert earlier == sorted(earlier)


def test_other_farms_go_first_the_next_time() -> None:
    first = [farm for farm in FARMS if share_of(2, farm) < 0.1]
    assert first != [farm for farm in FARMS if share_of(3, farm) < 0.1]


# --- when it goes on and what ends it --------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "hours", "verdict"),
    [
        ([], 1000, "wait"),
        (["committed"] * 9, 1, "wait"),
        (["committed"] * 9, 25, "good"),
        (["committed"] * 10, 0, "good"),
        (["committed"] * 5 + ["rejected"] * 5, 0, "good"),
        (["committed"] * 4 + ["rejected"] * 6, 0, "bad"),
        (["committed"] * 9 + ["rolled_back"], 0, "good"),
        (["committed"] * 8 + ["rolled_back", "refused"], 0, "bad"),
    ],
)
def test_thresholds(outcomes: list[str], hours: float, verdict: str) -> None:
    rows = [
        InstallRow(f"farm{number}", "pi", 2, outcome, "", None, None, 0.0)
        for number, outcome in enumerate(outcomes)
    ]
    assert judge(plan_of(min_reports=10), rows, len(rows), 3600 * hours)[0] == verdict
    stale = "wait" if hours < 24 else verdict
    assert judge(plan_of(min_reports=10), rows, 0, 3600 * hours)[0] == stale


def test_the_last_word_of_a_device_counts() -> None:
    rows = [
        InstallRow("apple", "pi", 2, outcome, "", None, None, 0.0)
        for outcome in ("committed", "rolled_back")
    ]
    (last,) = newest(rows)
    assert last.outcome == "rolled_back"


def test_a_bad_version_ends_its_rollout_for_every_farm(registry: Registry) -> None:
    begun = rollout.start(registry, plan_of(canary=["farm7"]))
    report(registry, "farm7")
    rollout.step(registry)
    report(registry, "farm9", "rolled_back")
    (ended,) = rollout.step(registry)
    assert ended.state == "aborted"
    assert ended.detail == "1 of 2 devices took it, 1 errors"
    named = registry.named(STABLE)
    assert (named.version, named.why) == (
        1,
        "rollout of 2 ended: 1 of 2 devices took it, 1 errors",
    )
    assert named.counter > begun.counter  # a newer state, so devices of the stage believe it


def test_by_hand(registry: Registry) -> None:
    rollout.start(registry, plan_of(canary=["farm7"]))
    paused = rollout.change(registry, STABLE, "paused")
    report(registry, "farm7")
    assert rollout.step(registry) == []
    assert offered(now(registry), "farm7")  # who has it keeps it
    assert rollout.change(registry, STABLE, "running").counter > paused.counter
    assert len(rollout.step(registry)) == 1
    rollout.abort(registry, STABLE)
    assert registry.named(STABLE).version == 1
    with pytest.raises(ConfigError, match="nothing is on its way to channel 'stable'"):
        rollout.abort(registry, STABLE)


def test_one_at_a_time(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="names version 1 already"):
        rollout.start(registry, plan_of(version=1))
    with pytest.raises(ConfigError, match="no version 9"):
        rollout.start(registry, plan_of(version=9))
    rollout.start(registry, plan_of())
    with pytest.raises(ConfigError, match="version 2 is on its way to channel 'stable'"):
        rollout.start(registry, plan_of())
    with pytest.raises(ConfigError, match="'rollout abort' first"):
        registry.require_settled(STABLE)
    assert registry.collect(keep=1).versions == ()


@pytest.mark.parametrize(
    "wrong",
    [{"stages": [0.5, 0.1, 1]}, {"stages": [0.1, 0.5]}, {"stages": []}, {"min_success": 1.5}],
)
def test_plans_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        plan_of(**wrong)


# --- through the hub -------------------------------------------------------------------------


def test_the_hub_shows_each_farm_its_own_and_moves_on(registry: Registry, tmp_path: Path) -> None:
    keys = registry.keys.keys
    with LabHub(tmp_path / "server").running() as hub:

        def version(farm: str) -> int:
            from datetime import UTC, datetime

            with hub.client(farm) as client:
                offer = client.latest(STABLE)
                return read_channel(offer.channel, keys, datetime.now(UTC)).version

        with Registry.open(hub.folder) as opened:  # as another process does
            rollout.start(opened, plan_of(canary=["apple"], stages=[1.0]))
        wait_until(lambda: version("apple") == 2, 20, "the canary's version")
        assert version("rice") == 1
        with hub.client("apple") as client:
            client.report(InstallReport(device="pi", version=2, outcome="committed"))
        wait_until(lambda: version("rice") == 2, 20, "everybody's version")
        assert now(registry).state == "done"
