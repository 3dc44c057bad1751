"""When a device looks for a version: told by the hub, in a window, at night on a metered link."""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from client.bell import Bell
from client.schedule import NIGHT, Follower, seconds_until
from common.errors import LinkError

MIDDAY = datetime(2026, 6, 1, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "now", "waits"),
    [
        (None, 12, 0),
        ((22, 5), 23, 0),
        ((22, 5), 4, 0),
        ((22, 5), 5, 17 * 3600),
        ((22, 5), 12, 10 * 3600),
        ((9, 17), 16, 0),
        ((9, 17), 17, 16 * 3600),
        ((9, 17), 3, 6 * 3600),
    ],
)
def test_a_window_opens(hours: tuple[int, int] | None, now: int, waits: int) -> None:
    assert seconds_until(hours, MIDDAY.replace(hour=now, minute=0)) == waits


class Ended(BaseException):
    """The days are over."""


class World(Bell):
    """A channel, and a bell whose waits move the clock."""

    def __init__(self, days: float, offers: int = 0, away: int = 0) -> None:
        super().__init__()
        self.now, self.end = MIDDAY, MIDDAY + timedelta(days=days)
        self.looked: list[datetime] = []
        self.orders: list[tuple[datetime, int]] = []
        self.offers, self.away = offers, away
        self.plans: list[tuple[datetime, Callable[[], None]]] = []
        self.follower: Follower | None = None

    def at(self, hours: float, what: Callable[[], None]) -> None:
        """What another thread does, so many hours after midday."""
        self.plans.append((MIDDAY + timedelta(hours=hours), what))
        self.plans.sort(key=lambda plan: plan[0])

    def wait(self, seconds: float) -> bool:
        assert seconds >= 0
        until = self.now + timedelta(seconds=seconds)
        while not self.rung and self.plans and self.plans[0][0] <= until:
            when, what = self.plans.pop(0)
            self.now = max(self.now, when)
            what()
        if not self.rung:
            self.now = until
        if self.now > self.end:
            raise Ended
        return super().wait(0)

    def look(self, version: int | None = None) -> None:
        if version is None:
            self.looked.append(self.now)
        else:
            self.orders.append((self.now, version))
        if self.away:
            self.away -= 1
            raise LinkError("hub at nowhere: unavailable")

    def watch(self, bell: Bell) -> bool:
        assert bell is self
        if self.wait(7200):
            return True
        if self.offers:
            self.offers -= 1
            return True
        raise LinkError("hub at nowhere: unavailable")

    def follow(self, **how: Any) -> None:
        self.follower = Follower(self, bell=self, clock=lambda: self.now, seed=0, **how)
        with pytest.raises(Ended):
            self.follower.run()

    def notice(self) -> None:
        assert self.follower is not None
        self.follower.notice()

    def install(self, version: int) -> None:
        assert self.follower is not None
        self.follower.install(version)


def test_it_looks_when_the_hub_says_so() -> None:
    world = World(days=1, offers=3)
    world.follow(hours=None, metered=False)
    assert len(world.looked) >= 4
    gaps = [(b - a).total_seconds() for a, b in zip(world.looked, world.looked[1:], strict=False)]
    assert all(7200 <= gap < 7400 for gap in gaps)


def test_on_a_metered_link_it_looks_once_a_night() -> None:
    world = World(days=10)
    world.follow(hours=None, metered=True)
    assert len(world.looked) == 10
    begin, end = NIGHT
    assert all(one.hour >= begin or one.hour <= end for one in world.looked)


def test_hours_hold_without_a_metered_link() -> None:
    world = World(days=3, offers=100)
    world.follow(hours=(2, 4), metered=False)
    assert {one.hour for one in world.looked} <= {2, 3, 4}
    assert len(world.looked) >= 3


def test_a_hub_that_is_away_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World(days=0.4, away=7)
    world.follow(hours=None, metered=False, jitter_seconds=0)
    gaps = [(b - a).total_seconds() for a, b in zip(world.looked, world.looked[1:], strict=False)]
    for gap, most in zip(gaps[:7], (60, 120, 240, 600, 600, 600, 600), strict=True):
        assert most / 2 <= gap <= most
    assert gaps[7] >= 7200, "it is there again"
    said = [one for one in caplog.records if "unavailable; tried again later" in one.message]
    assert [one.levelname for one in said if one.levelno > logging.DEBUG] == ["ERROR"]


# --- notices and orders ------------------------------------------------------------------------


def test_a_notice_ends_the_wait_for_the_hub() -> None:
    world = World(days=0.2)
    world.at(1, world.notice)
    world.follow(hours=None, metered=False)
    second = world.looked[1] - MIDDAY
    assert timedelta(hours=1) <= second <= timedelta(hours=1, minutes=1)


def test_a_notice_on_a_metered_link_waits_for_the_hours() -> None:
    world = World(days=1)
    world.at(3, world.notice)  # in the afternoon
    world.at(12, world.notice)  # at midnight, after the look of this night
    world.follow(hours=None, metered=True)
    first, second = world.looked
    assert first.hour == NIGHT[0]
    assert timedelta(hours=12) <= second - MIDDAY <= timedelta(hours=12, minutes=1)


def test_an_order_does_not_wait_for_the_hours() -> None:
    world = World(days=1)
    world.at(3, partial(world.install, 7))
    world.at(12, partial(world.install, 8))
    world.follow(hours=None, metered=True)
    assert world.orders == [
        (MIDDAY + timedelta(hours=3), 7),
        (MIDDAY + timedelta(hours=12), 8),
    ]
    assert len(world.looked) in (1, 2), "the look of the night is not left out"


def test_a_flood_of_notices_cannot_keep_it_from_looking_nor_make_it_look_all_the_time() -> None:
    world = World(days=0.05)
    for second in range(4000):
        world.at(second / 3600, world.notice)
    world.follow(hours=None, metered=False)
    assert 40 < len(world.looked) < 400  # half a minute apart, in 72


def test_what_goes_wrong_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    world = World(days=0.2)
    looks = []

    def look(version: int | None = None) -> None:
        looks.append(version)
        raise ZeroDivisionError

    world.look = look  # type: ignore[method-assign]
    world.follow(hours=None, metered=False)
    assert len(looks) > 10
    assert "the updater failed" in caplog.text


def test_it_ends_when_it_is_stopped() -> None:
    world = World(days=1)

    def stop() -> None:
        assert world.follower is not None
        world.follower.stop()

    world.at(1, stop)
    world.follower = Follower(world, hours=None, metered=False, bell=world, clock=lambda: world.now)
    world.follower.run()
    assert len(world.looked) == 1


def test_a_bell_rings_through_any_wait() -> None:
    bell, ended = Bell(), threading.Event()
    with bell.ending(ended.set):
        assert not ended.is_set()
        bell.ring()
        assert ended.is_set()
    assert bell.wait(0)
    assert not bell.wait(0)
    bell.ring()
    ended.clear()
    with bell.ending(ended.set):  # it rang a moment too early
        assert ended.is_set()
