"""Two regions and a centre: one mask and backbone, no farm shows, and nothing counts twice."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import codec
from common.config import ServerConfig
from common.mask import Mask
from common.step import Step
from server.centre import CentreCloser
from server.models import Models
from server.region_close import RegionCloser
from server.region_desk import Desk
from server.region_record import _unpacked
from server.rows import CandidateRow, ReplyRow, RoundRow, ScoreRow
from server.status import snapshot
from server.store import Store
from tests.lab.regions import DeskLine, LabRegion, Regions, forked, kill
from tests.waiting import wait_until

PLAN: dict[str, Any] = {"rounds": 3, "warmup": 1, "prune_events": 1, "prune_heads": 0.4}
ROUND_FIELDS = {
    *("protocol", "run", "round", "attempt", "farm", "base", "mask", "examples", "accuracy", "f1"),
    *("seconds", "kind", "loss", "dal", "steps", "train_seconds", "farms"),
}
SCORE_ARRAYS = {"head_mean", "head_most", "neuron_mean", "neuron_most", "shift", "totals"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Regions:
    return Regions(tmp_path_factory.mktemp("regions") / "all", (3, 2), **PLAN)


@dataclass
class Seen:
    """What is on the disks of one server after a run, and what has left it."""

    state: str
    masks: dict[str, str]
    candidates: list[CandidateRow]
    rounds: list[RoundRow]
    replies: list[ReplyRow]
    scores: list[ScoreRow]
    status: dict[str, Any]
    records: dict[str, bytes]

    @classmethod
    def at(cls, folder: Path, records: dict[str, bytes]) -> "Seen":
        with Store.open(folder / "fieldfed.db", read_only=True) as store:
            run = store.latest_run()
            assert run is not None
            assert run.run == 1
            rounds = [row for row in store.rounds(1) if row.kind == "align"]
            return cls(
                run.state,
                store.masks(1),
                list(store.candidates(1).values()),
                rounds,
                [reply for row in rounds for reply in store.replies(1, row.round)],
                [row for rows in store.scores(1).values() for row in rows],
                snapshot(folder),
                records,
            )

    @property
    def digests(self) -> list[str]:
        return [row.digest for row in self.candidates]


@pytest.fixture(scope="module")
def played(place: Regions) -> dict[str, Seen]:
    """A run that nobody disturbed."""
    place.run()
    return look(place)


def look(place: Regions) -> dict[str, Seen]:
    found = {one.name: Seen.at(one.folder, place.lines[one.name].taken) for one in place.regions}
    return found | {"coop": Seen.at(place.folder, {})}


def messages(seen: Seen) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What left a region, as it is written."""
    for key, data in seen.records.items():
        text, arrays = _unpacked(data[8 + int.from_bytes(data[4:8], "little") :])
        yield key, json.loads(text), arrays


# --- one network ---------------------------------------------------------------------------------


def test_both_regions_end_with_the_centres_candidates_and_mask(played: dict[str, Seen]) -> None:
    centre = played["coop"]
    assert centre.state == "done"
    assert len(centre.digests) == PLAN["rounds"]
    mask = Mask.from_json(list(centre.masks.values())[-1])
    assert mask.heads_kept_ratio == pytest.approx(0.6, abs=0.05)
    for name in ("north", "south"):
        assert played[name].state == "done"
        assert played[name].digests == centre.digests
        assert [row.mask for row in played[name].candidates] == [
            row.mask for row in centre.candidates
        ]
        assert played[name].masks == centre.masks


def test_regions_really_hold_the_candidate(place: Regions, played: dict[str, Seen]) -> None:
    last = played["coop"].digests[-1]
    for one in place.regions:
        model, _ = Models(one.folder).view(last)
        assert model is not None


def test_every_region_and_every_farm_counts_once_a_round(played: dict[str, Seen]) -> None:
    assert [row.participants for row in played["coop"].rounds] == [2, 2, 2]
    assert [row.participants for row in played["north"].rounds] == [3, 3, 3]
    assert [row.participants for row in played["south"].rounds] == [2, 2, 2]


def test_status_of_the_centre_lists_regions(played: dict[str, Seen]) -> None:
    farms = {row["farm"]: row for row in played["coop"].status["farms"]}
    assert farms.keys() == {"north", "south"}
    for name in farms:
        images = {row.farm: row.examples for row in played[name].replies}
        assert farms[name]["images"] == sum(images.values())
        assert 0 < farms[name]["reports"]["model"] <= 1
        assert farms[name]["bytes_up"] > 0


# --- what leaves a region ------------------------------------------------------------------------


def test_no_farm_is_named_and_no_field_is_of_a_farm(played: dict[str, Seen]) -> None:
    for name in ("north", "south"):
        farms = {row.farm for row in played[name].replies}
        assert len(farms) == {"north": 3, "south": 2}[name]
        for data in played[name].records.values():
            assert not [one for one in (*farms, "class0") if one.encode() in _plain(data)]
        for key, fields, arrays in messages(played[name]):
            if key.startswith("align"):
                assert set(fields) == ROUND_FIELDS
                scored = key.startswith("align-1-")
                assert set(arrays) == {"update"} | (SCORE_ARRAYS if scored else set())
            else:
                assert not arrays


def _plain(data: bytes) -> bytes:
    """Without the signature, whose base64 may hold anything."""
    start = data.index(b'"signatures"')
    return data[:start] + data[8 + int.from_bytes(data[4:8], "little") :]


def test_figures_are_sums_or_means(played: dict[str, Seen]) -> None:
    for name in ("north", "south"):
        for key, fields, arrays in messages(played[name]):
            if not key.startswith("align"):
                continue
            sent = [row for row in played[name].replies if row.round == fields["round"]]
            assert fields["farms"] == len(sent)
            assert fields["examples"] == sum(row.examples for row in sent)
            assert fields["examples"] not in {row.examples for row in sent}
            for what in ("loss", "dal", "accuracy"):
                values = [getattr(row, what) for row in sent]
                assert fields[what] == pytest.approx(np.mean(values))
            assert fields["loss"] not in {row.loss for row in sent}
            if "totals" in arrays:
                assert_scores_are_of_nobody(arrays, played[name].scores)


def assert_scores_are_of_nobody(arrays: dict[str, Any], rows: list[ScoreRow]) -> None:
    own = [row.heads for row in rows if row.farm is not None]
    assert len(own) == arrays["totals"][1]
    for what in ("head_mean", "head_most"):
        assert not any(np.array_equal(arrays[what], heads) for heads in own)
    np.testing.assert_allclose(arrays["head_most"], np.stack(own).max(axis=0))
    shifts = [row.mmd2 for row in rows if row.mmd2 is not None]
    assert len(shifts) == len(own)
    assert not any(np.array_equal(arrays["shift"], shift) for shift in shifts)


# --- crashes -------------------------------------------------------------------------------------


class ShutLine(DeskLine):
    """A way to a desk that is shut as long as a file is there."""

    def __init__(self, folder: Path, bar: Path) -> None:
        super().__init__(folder)
        self._bar = bar

    def take(self, key: str, attempt: int) -> bytes | None:
        return (
            None if key.startswith("align") and self._bar.exists() else super().take(key, attempt)
        )


def dying(owner: type, method: str, number: int, once: Path) -> None:
    """Have this process kill itself where it would do this for round ``number``, but only once."""
    real = getattr(owner, method)

    def instead(self: Any, run: int, work: Any, *rest: Any) -> Any:
        if work.number == number and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, run, work, *rest)

    setattr(owner, method, instead)


def answered(region: LabRegion, number: int) -> bytes | None:
    """The region's sealed record of a round, if it is on its desk."""
    if not (region.folder / "region.db").is_file():
        return None
    with Desk.at(region.folder) as desk:
        found = desk._select("SELECT data FROM answers WHERE key LIKE ?", f"align-{number}-%")
    return bytes(found[0]["data"]) if found else None


def ended(child: int) -> int:
    """Wait for a process; the signal that killed it, 0 where it ended well."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_kills_between_any_two_steps_change_nothing(
    place: Regions, played: dict[str, Seen]
) -> None:
    place.restore()
    root = place.lab.root
    bar, north, south = root / "bar", *place.regions
    bar.touch()
    place.lines["north"] = ShutLine(north.folder, bar)

    def north_dies_before_sealing() -> None:
        dying(RegionCloser, "record", 3, root / "north-died")
        north.play()

    def centre_dies_before_its_commit() -> None:
        dying(CentreCloser, "close", 2, root / "centre-died")
        place.lead()

    children = {"north": north.fork(), "south": south.fork()}
    try:
        children["centre"] = forked(centre_dies_before_its_commit)
        # sealed, and not delivered
        wait_until(lambda: answered(north, 1), 120, "the record of round 1")
        first = answered(north, 1)
        kill(children.pop("north"))
        children["north"] = forked(north_dies_before_sealing)
        bar.unlink()
        # pulled, and not committed
        assert ended(children.pop("centre")) == signal.SIGKILL
        with place.store() as store:
            assert len(store.replies(1, 2)) == 2
            last = store.last_committed(1)
        assert last is not None
        assert last[0] == 1
        children["centre"] = forked(place.lead)
        # played, and not sealed
        assert ended(children.pop("north")) == signal.SIGKILL
        children["north"] = north.fork()
        assert ended(children.pop("centre")) == 0
        wait_until(lambda: _over(north) and _over(south), 60, "the end of the run in the regions")
    finally:
        for child in children.values():
            kill(child)
    after = look(place)
    assert answered(north, 1) in (None, first)
    for name, seen in after.items():
        assert seen.digests == played[name].digests
        assert [row.participants for row in seen.rounds] == [
            row.participants for row in played[name].rounds
        ]


def _over(region: LabRegion) -> bool:
    with region.store() as store:
        run = store.latest_run()
    return run is not None and run.state == "done"


# --- one network or two regions ------------------------------------------------------------------


def unclipped(config: ServerConfig) -> ServerConfig:
    """The same, with updates that are neither clipped nor rounded: both are no sums."""
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"update_bits": 32}),
            "plan": config.plan.model_copy(update={"rounds": 2}),
            "rounds": config.rounds.model_copy(update={"clip": 1e6}),
        }
    )


def coded_step(models: Models, digest: str) -> float:
    """The most that a number of a coded compensation, in 8 bits, moves by when it is rounded."""
    kept = models.step(digest)
    assert kept is not None
    cut = Step.from_bytes(kept).cut
    assert cut is not None and cut.names
    header = codec.read_header(cut.change)
    return float(np.abs(codec.decode(cut.change, base=None, count=header.count)).max()) / 127


def test_regions_find_what_one_network_of_the_same_farms_finds(
    place: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a round with scores and a cut: the same mask, and the same numbers but for rounding.

    What makes up for the cut is coded, so that the last bit may decide which way one is rounded.
    """
    place.restore()
    flat_config = unclipped(place.lab.config)
    place.lab.run(**{name: getattr(flat_config, name) for name in ("train", "plan", "rounds")})
    with place.lab.store() as store:
        flat = store.candidates(1)[1]
        (whole,) = (row.heads for row in store.scores(1)[1] if row.farm is None)
    quantum = coded_step(Models(place.folder), flat.digest)
    model, _ = Models(place.folder).view(flat.digest)
    expected = {name: value.detach().numpy() for name, value in model.named_parameters()}
    place.restore()
    monkeypatch.setattr(place, "config", unclipped(place.config))
    for one in place.regions:
        monkeypatch.setattr(one, "config", unclipped(one.config))
    place.run()
    seen = look(place)["coop"]
    assert seen.candidates[0].mask == flat.mask
    (agreed,) = (row.heads for row in seen.scores if row.farm is None)
    np.testing.assert_allclose(agreed, whole, rtol=1e-5, atol=1e-8)
    model, _ = Models(place.folder).view(seen.digests[0])
    found = {name: value.detach().numpy() for name, value in model.named_parameters()}
    apart = np.concatenate([np.abs(found[name] - expected[name]).ravel() for name in expected])
    assert apart.max() <= quantum + 1e-5
    assert np.mean(apart > 1e-5) < 1e-3, "more than a few numbers were rounded the other way"
