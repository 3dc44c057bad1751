"""When a device looks for a version: told by the hub, in a window, at night on a metered link."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

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


class Ended(Exception):  # noqa: N818
    """The day is over."""


class World:
    """An updater, a hub, and a clock that sleeping moves."""

    channel, seen = "stable", 5

    def __init__(self, days: float, offers: int = 0, away: int = 0) -> None:
        self.now, self.end = MIDDAY, MIDDAY + timedelta(days=days)
        self.looked: list[datetime] = []
        self.compressed: list[bool] = []
        self.checked = 0
        self.offers, self.away = offers, away

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += timedelta(seconds=seconds)
        if self.now > self.end:
            raise Ended

    def check(self, _hub: Any) -> None:
        self.checked += 1

    def update(self, _hub: Any, *, compress: bool) -> None:
        self.looked.append(self.now)
        self.compressed.append(compress)
        if self.away:
            self.away -= 1
            raise LinkError("hub at nowhere: unavailable")

    def watch(self, channel: str, counter: int) -> Iterator[int]:
        assert (channel, counter) == ("stable", 5)
        self.sleep(7200)
        if self.offers:
            self.offers -= 1
            yield 1
        else:
            raise LinkError("hub at nowhere: unavailable")

    def follow(self, **how: Any) -> None:
        follower = Follower(self, self, sleep=self.sleep, clock=lambda: self.now, seed=0, **how)  # type: ignore[arg-type]
        with pytest.raises(Ended):
            follower.run()


def test_it_looks_when_the_hub_says_so() -> None:
    world = World(days=1, offers=3)
    world.follow(hours=None, metered=False)
    assert len(world.looked) >= 4
    gaps = [(b - a).total_seconds() for a, b in zip(world.looked, world.looked[1:], strict=False)]
    assert all(7200 <= gap < 7400 for gap in gaps)
    assert world.checked == len(world.looked)
    assert not any(world.compressed)


def test_on_a_metered_link_it_looks_once_a_night() -> None:
    world = World(days=10)
    world.follow(hours=None, metered=True)
    assert len(world.looked) == 10
    begin, end = NIGHT
    assert all(one.hour >= begin or one.hour <= end for one in world.looked)
    assert all(world.compressed)


def test_hours_hold_without_a_metered_link() -> None:
    world = World(days=3, offers=100)
    world.follow(hours=(2, 4), metered=False)
    assert {one.hour for one in world.looked} <= {2, 3, 4}
    assert len(world.looked) >= 3


def test_a_hub_that_is_away_is_tried_again() -> None:
    world = World(days=0.2, away=3)
    world.follow(hours=None, metered=False)
    assert len(world.looked) >= 4
    first, second = world.looked[:2]
    assert 300 <= (second - first).total_seconds() <= 700
