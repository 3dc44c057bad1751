"""What a centre takes from regions, what it refuses, and what it asks them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import backbone, codec
from common.config import PrivacyConfig, ServerConfig
from common.errors import ConfigError, RejectReason, StateError
from common.mask import Mask
from common.scores import median_tau
from common.services import RegionConfig, RegionEntry
from common.spec import ModelSpec
from server.centre import Orders, require_centre, run_centre, run_id_of
from server.region_link import Line, Region, RegionLink
from server.region_record import Order, RegionReply
from server.settings import RunSettings
from server.status import snapshot
from server.store import Store
from tests.lab.network import SIDE, TINY, Lab
from tests.lab.regions import CENTRE, CutLine, Puppet

DENSE = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """For its pre-trained backbone; its farms are never asked."""
    return Lab(tmp_path_factory.mktemp("centre"), 1, rounds=2)


@pytest.fixture
def folder(lab: Lab, tmp_path: Path) -> Path:
    shutil.copytree(lab.server_dir, tmp_path / "server")
    return tmp_path / "server"


def config(lab: Lab, rules: dict[str, Any] | None = None, **plan: Any) -> ServerConfig:
    before = lab.config
    plain = {"deadline_seconds": 60, "grace_seconds": 0, "min_farms": 1, "strikes": 100}
    return before.model_copy(
        update={
            "server": before.server.model_copy(update={"name": CENTRE}),
            "rounds": before.rounds.model_copy(update=plain | (rules or {})),
            "plan": before.plan.model_copy(update=plan),
        }
    )


def lead(folder: Path, settings: ServerConfig, *regions: Region) -> None:
    with ExitStack() as stack:

        def reach(orders: Orders) -> RegionLink:
            link = RegionLink(regions, CENTRE, orders.describe, ask_seconds=0.02, seed=0)
            return stack.enter_context(link)

        run_centre(reach, folder, RunSettings(config=settings, probe=False))


@contextmanager
def looked(folder: Path) -> Iterator[Store]:
    with Store.open(folder / "fieldfed.db", read_only=True) as store:
        yield store


def test_each_bad_record_is_refused_by_name_and_the_round_goes_on(
    lab: Lab, folder: Path, tmp_path: Path
) -> None:
    kept: dict[int, bytes] = {}
    stranger = Puppet("east", tmp_path, DENSE)

    def twist(order: Order, record: bytes) -> bytes:
        number = order.request.round
        kept[number] = record
        other = replace(order, request=order.request.model_copy(update={"base": "ab" * 32}))
        bare = north.reply(order)
        if not isinstance(bare, RegionReply):
            return record
        twists: dict[int, Callable[[], bytes]] = {
            2: lambda: kept[1],
            3: lambda: record[:-1] + bytes([record[-1] ^ 1]),
            4: lambda: stranger.seal(order, stranger.reply(order)),
            5: lambda: north.seal(order, north.reply(other, update=bare.update)),
            6: lambda: north.seal(order, north.reply(order, update=_nan(bare.update, order))),
            7: lambda: record[:40],
        }
        return twists.get(number, lambda: record)()

    north, south = Puppet("north", tmp_path, DENSE, twist), Puppet("south", tmp_path, DENSE)
    lead(folder, config(lab, rounds=7, prune_heads=None), north.region, south.region)
    with looked(folder) as store:
        rounds = [row for row in store.rounds(1) if row.kind == "align"]
        assert [row.participants for row in rounds] == [2, 1, 1, 1, 1, 1, 1]
        refused = {row.round: row for row in store.rejections(1)}
    assert "question 'align-1-" in refused[2].detail
    assert "changed on its way" in refused[3].detail
    assert "no key of network 'north'" in refused[4].detail
    assert refused[5].reason is RejectReason.FOREIGN_BASE
    assert refused[6].reason is RejectReason.NOT_FINITE
    assert "no sealed record" in refused[7].detail
    for number in (2, 3, 4, 7):
        assert "region north" in refused[number].detail
        assert refused[number].reason is RejectReason.MALFORMED
    assert len(refused) == 6


def _nan(update: codec.Bytes, order: Order) -> codec.Bytes:
    header = codec.read_header(update)
    values = np.zeros(header.count, np.float32)
    coded = codec.encode(values + 1, order.request.base, bits=32, rank=header.rank).copy()
    coded[-4:] = np.array([np.nan], "<f4").view(np.uint8)
    return coded


def test_a_score_round_without_its_sums_is_refused(lab: Lab, folder: Path, tmp_path: Path) -> None:
    def twist(order: Order, record: bytes) -> bytes:
        scored = getattr(order.request, "criterion", None) is not None
        return north.seal(order, north.reply(order, head_most=None)) if scored else record

    north, south = Puppet("north", tmp_path, DENSE, twist), Puppet("south", tmp_path, DENSE)
    lead(folder, config(lab, prune_heads=0.4, rounds=2), north.region, south.region)
    with looked(folder) as store:
        (only,) = store.rejections(1)
        last = store.last_committed(1)
        assert last is not None
        assert Mask.from_json(store.mask(last[1].mask)).heads_kept_ratio < 1
    assert only.reason is RejectReason.SHAPE
    assert "head_most" in only.detail


def test_a_region_that_is_away_holds_nobody_up(lab: Lab, folder: Path, tmp_path: Path) -> None:
    north = Puppet("north", tmp_path, DENSE)
    keys = Puppet("south", tmp_path, DENSE).keys.keys
    lead(folder, config(lab), north.region, Region("south", keys, CutLine()))
    with looked(folder) as store:
        assert [row.participants for row in store.rounds(1) if row.kind == "align"] == [1, 1]
    assert [row["farm"] for row in snapshot(folder)["farms"]] == ["north"]


def test_an_interrupted_line_is_taken_up_again(
    lab: Lab, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.region_link.PAUSE_SECONDS", 0.02)
    north = Puppet("north", tmp_path, DENSE)
    line = Flaky(north)
    lead(folder, config(lab), Region("north", north.keys.keys, line))
    with looked(folder) as store:
        assert [row.participants for row in store.rounds(1) if row.kind == "align"] == [1, 1]
        assert not store.rejections(1)
    assert line.cuts > 5


class Flaky(CutLine):
    """A line of which every other call is cut."""

    def __init__(self, line: Line) -> None:
        self._line, self.cuts, self._calls = line, 0, 0

    def _cut(self) -> bool:
        self._calls += 1
        self.cuts += self._calls % 2
        return bool(self._calls % 2)

    def give(self, order: bytes) -> None:
        if self._cut():
            super().give(order)
        self._line.give(order)

    def take(self, key: str, attempt: int) -> bytes | None:
        if self._cut():
            super().take(key, attempt)
        return self._line.take(key, attempt)


class Shy(CutLine):
    """A region whose port is open, and whose farms are not there yet."""

    def take(self, key: str, attempt: int) -> bytes | None:
        return None


def test_a_region_without_farms_is_not_waited_for(lab: Lab, folder: Path, tmp_path: Path) -> None:
    north, keys = Puppet("north", tmp_path, DENSE), Puppet("south", tmp_path, DENSE).keys.keys
    lead(folder, config(lab), north.region, Region("south", keys, Shy()))
    with looked(folder) as store:
        assert [row.participants for row in store.rounds(1) if row.kind == "align"] == [1, 1]
        assert not store.rejections(1)


def test_without_regions_no_round_is_played(lab: Lab, folder: Path) -> None:
    with pytest.raises(StateError, match="came online"):
        lead(folder, config(lab, {"deadline_seconds": 2}))


# --- orders --------------------------------------------------------------------------------------


def test_the_scale_is_found_in_round_1_and_travels_from_then_on(
    lab: Lab, folder: Path, tmp_path: Path
) -> None:
    north, south = Puppet("north", tmp_path, DENSE), Puppet("south", tmp_path, DENSE)
    settings = config(lab, criterion="taha", warmup=2, rounds=3, prune_heads=0.4)
    lead(folder, settings, north.region, south.region)
    shifts = [vars(one.reply(one.orders[0]))["shift"] for one in (north, south)]
    expected = median_tau(np.stack(shifts).mean(axis=0, dtype=np.float64))
    asked = {one.request.round: one.terms.tau for one in north.orders if one.key[:5] == "align"}
    assert asked == {1: None, 2: pytest.approx(expected), 3: pytest.approx(expected)}
    assert {one.terms.exponent for one in north.orders} == {1.0}


def test_a_cut_reaches_regions_in_kilobytes(lab: Lab, folder: Path, tmp_path: Path) -> None:
    north = Puppet("north", tmp_path, DENSE)
    lead(folder, config(lab, prune_heads=0.4, rounds=3), north.region)
    rounds = {one.request.round: one for one in north.orders if one.request.kind == "align"}
    kinds = {number: one.request.body_kind for number, one in rounds.items()}
    assert kinds == {1: "full", 2: "delta", 3: "delta"}
    sizes = {number: len(one.to_bytes()) for number, one in rounds.items()}
    assert sizes[2] < sizes[1] / 2
    assert north.orders[-1].request.mask != north.orders[0].request.mask


def test_every_run_has_another_id(lab: Lab, folder: Path, tmp_path: Path) -> None:
    north = Puppet("north", tmp_path, DENSE)
    lead(folder, config(lab, rounds=2), north.region)
    lead(folder, config(lab, rounds=3), north.region)
    with looked(folder) as store:
        ids = [run_id_of(row) for row in store.runs()]
    assert [one.terms.run_id for one in north.orders if one.request.round == 1] == ids
    assert len(set(ids)) == 2


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": PrivacyConfig(clip=1.0)}, "server.toml of every region"),
        ({"region": RegionConfig(centre="coop", port=9)}, "not both"),
        ({"rounds": {"step_budget": True}}, "step_budget"),
        ({"plan": {"criterion": "taha", "warmup": 1, "prune_heads": 0.4}}, "plan.warmup"),
        ({"regions": ("north", "north")}, "two of the same name"),
    ],
)
def test_what_a_centre_cannot_have_is_named(changes: dict[str, Any], said: str) -> None:
    values = ServerConfig()
    for name, value in changes.items():
        made = value
        if isinstance(value, dict):
            made = getattr(values, name).model_copy(update=value)
        if isinstance(value, tuple):
            made = tuple(
                RegionEntry(name=one, address="localhost:1", member=Path("m")) for one in value
            )
        values = values.model_copy(update={name: made})
    with pytest.raises(ConfigError, match=said):
        require_centre(values)


def test_an_ordinary_centre_is_allowed() -> None:
    require_centre(ServerConfig())


def test_a_region_has_the_same_number_whatever_others_there_are(tmp_path: Path) -> None:
    numbers = {Puppet(name, tmp_path, DENSE).region.node for name in ("north", "south", "west")}
    assert len(numbers) == 3
    assert all(0 <= number < 2**48 for number in numbers)
    again: ModelSpec = DENSE
    assert Puppet("north", tmp_path / "again", again).region.node in numbers
