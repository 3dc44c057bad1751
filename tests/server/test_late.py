"""Stragglers on simulated time: late replies are folded once, by age, or discarded and counted."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server.close
from common.config import RecoveryConfig
from common.errors import RejectReason
from common.messages import AlignRequest, Request
from server.aggregate import aggregate
from server.requests import Requests
from server.rows import ReplyRow
from tests.lab.network import Lab

QUICK: dict[str, Any] = {"grace_seconds": 0, "deadline_seconds": 10_000, "attempts": 1}


def replies(lab: Lab) -> list[ReplyRow]:
    with lab.store() as store:
        run = store.latest_run()
        assert run is not None
        assert run.state == "done", run.detail
        rounds = [row.round for row in store.rounds(run.run) if row.kind == "align"]
        return [row for number in rounds for row in store.replies(run.run, number)]


def counted(lab: Lab) -> Counter[RejectReason]:
    with lab.store() as store:
        return Counter(store.rejection_counts(1))


def test_a_late_reply_is_folded_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, weights = Lab(tmp_path, rounds=4), []

    def spy(readers: Any, shares: Any, **options: Any) -> Any:
        weights.append(dict(zip([reader.node for reader in readers], shares, strict=True)))
        return aggregate(readers, shares, **options)

    monkeypatch.setattr(server.close, "aggregate", spy)
    lab.simulate([10, 11, 25], quorum=0.6, staleness=3, **QUICK)
    late = [row for row in replies(lab) if row.of_round < row.round]
    assert 3 in {row.node for row in late}, "the slow farm was never late"
    for row in late:
        age = row.round - row.of_round
        assert weights[row.round - 1][row.node] == pytest.approx(row.examples / np.sqrt(1 + age))
    assert not counted(lab)[RejectReason.LATE]


def test_without_a_window_late_replies_are_discarded_and_counted(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=4)
    lab.simulate([10, 11, 25], quorum=0.6, **QUICK)
    assert all(row.of_round == row.round for row in replies(lab))
    assert counted(lab)[RejectReason.LATE] >= 1
    with lab.store() as store:
        assert not store.pauses(), "being slow is no fault"


def test_an_update_from_before_a_cut_is_sliced_by_the_mask(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=4, warmup=2, prune_heads=0.4)
    # rounds 1 and 2 score; the slow farm's reply to round 2 arrives after the cut
    lab.simulate([10, 10, 35], quorum=0.6, staleness=3, **QUICK)
    with lab.store() as store:
        masks = {row.round: row.mask for row in store.rounds(1) if row.kind == "align"}
    late = [row for row in replies(lab) if masks[row.round] != masks[row.of_round]]
    assert late, "no reply crossed the cut"
    assert not counted(lab)[RejectReason.FOREIGN_MASK]


def test_an_update_from_before_a_cut_since_which_all_weights_are_trained_does_not_count(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path, rounds=4, warmup=2, prune_heads=0.4)
    recovery = RecoveryConfig(trainable="full")
    lab.config = lab.config.model_copy(update={"recovery": recovery})
    lab.simulate([10, 10, 35], quorum=0.6, staleness=3, **QUICK)
    with lab.store() as store:
        masks = {row.round: row.mask for row in store.rounds(1) if row.kind == "align"}
        details = [row.detail for row in store.rejections(1)]
        assert not store.pauses(), "it could not know"
    assert all(masks[row.round] == masks[row.of_round] for row in replies(lab))
    assert +counted(lab) == {RejectReason.LATE: 1}
    assert any("since which more is" in detail for detail in details)


def test_no_reply_counts_twice_however_often_it_is_asked_for(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=5)
    rules = QUICK | {"attempts": 5, "attempt_seconds": 4}
    link, _ = lab.simulate([10, 12, 40], quorum=0.6, staleness=5, **rules)
    counts = Counter((row.node, row.of_round) for row in replies(lab))
    assert set(counts.values()) == {1}
    assert link.sent > link.trained > 0
    assert link.trained >= len(counts)


def test_asynchronous_rounds_use_every_farm_and_wait_for_none(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=6, prune_heads=0.3)
    _, clock = lab.simulate([10, 20, 50], mode="async", buffer=1, staleness=10, **QUICK)
    assert {row.node for row in replies(lab)} == {1, 2, 3}
    assert max(Counter((row.node, row.of_round) for row in replies(lab)).values()) == 1
    alone = clock.now()
    with lab.store() as store:
        assert Counter(row.state for row in store.rounds(1))["committed"] == 6
    assert alone < 6 * 50, "rounds waited for the slowest farm"


def test_a_farm_comes_back_from_an_outage(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=4)
    rules = QUICK | {"deadline_seconds": 300, "attempts": 3}
    lab.simulate([10, 10, 10], {2: [(15.0, 700.0)]}, quorum=0.6, **rules)
    present = {row.round for row in replies(lab) if row.node == 2}
    assert 4 - len(present) >= 1
    assert all(row.state == "committed" for row in _aligned(lab))


def _aligned(lab: Lab) -> list[Any]:
    with lab.store() as store:
        return [row for row in store.rounds(1) if row.kind == "align"]


def test_a_sample_of_the_farms_is_asked(tmp_path: Path) -> None:
    lab = Lab(tmp_path, count=4, rounds=3)
    lab.simulate([5, 5, 5, 5], sample=2, **QUICK)
    per_round = Counter(row.round for row in replies(lab))
    assert per_round == {1: 2, 2: 2, 3: 2}
    assert len({row.node for row in replies(lab)}) > 2, "always the same farms"


@pytest.mark.parametrize("window", [0, 3])
def test_a_farm_is_told_which_of_its_replies_count(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What did not count is given back, so saying so wrongly would lose work or count it twice."""
    lab = Lab(tmp_path, rounds=5)
    seen: list[tuple[int, Request]] = []
    align = Requests.align

    def spy(self: Requests, node: int, *arguments: Any, **named: Any) -> AlignRequest:
        request = align(self, node, *arguments, **named)
        seen.append((node, request))
        return request

    monkeypatch.setattr(Requests, "align", spy)
    lab.simulate([10, 11, 25], quorum=0.6, staleness=window, **QUICK)
    rows = replies(lab)
    asked = [(node, r) for node, r in seen if isinstance(r, AlignRequest) and r.round > 1]
    assert {node for node, _ in asked} == {1, 2, 3}
    for node, request in asked:
        mine = [row.of_round for row in rows if row.node == node and row.round < request.round]
        assert request.folded == max(mine, default=None)
    slow = [request.folded for node, request in asked if node == 3]
    assert (slow[-1] is None) == (window == 0)
