"""The round loop with real farm code in the lab: results, quarantine, determinism, resumption."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import codec
from common.compress import expand
from common.errors import LaunchError, RejectReason, StateError
from common.mask import Mask
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateRequest,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    Work,
)
from common.step import Step
from server.status import snapshot
from tests.lab.network import TINY, Lab

LIMIT = 100_000_000
PRUNE: dict[str, Any] = {"prune_heads": 0.4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A network of three farms after one run of two rounds with a prune event."""
    lab = Lab(tmp_path_factory.mktemp("lab"), **PRUNE)
    lab.run()
    return lab


@dataclass(frozen=True)
class Outcome:
    """What a run must repeat exactly."""

    reports: dict[tuple[str, str], float]
    candidates: list[str]
    masks: list[str]


def outcome(lab: Lab) -> Outcome:
    store = lab.store()
    try:
        run = store.latest_run()
        assert run is not None
        assert run.state == "done"
        return Outcome(
            {(row.label, row.farm): row.accuracy for row in store.reports(run.run)},
            [row.digest for row in store.candidates(run.run).values()],
            list(store.masks(run.run)),
        )
    finally:
        store.close()


def test_a_run_ends_with_reports_of_every_farm_and_a_smaller_model(finished: Lab) -> None:
    result = outcome(finished)
    assert {farm for label, farm in result.reports if label == "model"} == {
        "farm0",
        "farm1",
        "farm2",
    }
    store = finished.store()
    mask = Mask.from_json(store.mask(result.masks[-1]))
    store.close()
    assert sum(map(len, mask.heads)) == round(0.6 * 12)
    assert all(mask.heads)


def test_a_farm_is_sent_the_backbone_once_and_then_only_steps(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=3)
    kinds = [
        (request.round, request.body_kind)
        for node, request in lab.run().requests
        if node == 1 and isinstance(request, AlignRequest | EvaluateRequest)
    ]
    assert kinds == [(0, "full"), (1, "none"), (2, "delta"), (3, "delta"), (3, "delta")]


def test_a_farm_is_sent_the_anchors_once_for_every_mask(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=4, warmup=2, prune_heads=0.4)

    def forget(node: int, request: Request, _reply: Reply) -> None:
        if node == 2 and isinstance(request, AlignRequest) and request.round == 3:
            for path in (lab.farms[1][1] / "anchors").iterdir():
                path.write_bytes(path.read_bytes()[:-9])

    sent: dict[int, list[tuple[int, bool]]] = {1: [], 2: [], 3: []}
    for node, request in lab.run(fault=forget).requests:
        if isinstance(request, AlignRequest):
            sent[node].append((request.round, request.anchors is not None))
    assert sent[1] == [(1, True), (2, False), (3, True), (4, False)]
    assert sent[2] == [(1, True), (2, False), (3, True), (4, False), (4, True)]


def test_a_farm_that_skipped_rounds_is_not_sent_the_whole_backbone_again(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=8, warmup=4, prune_heads=0.4)
    link = lab.run(rounds=lab.config.rounds.model_copy(update={"sample": 1}))
    asked = [request for _, request in link.requests if isinstance(request, Work)]
    kinds = {request.body_kind for request in asked if request.round > 0}
    assert {"chain", "tensors"} & kinds
    assert "full" not in kinds, "all farms had the first backbone when they reported on it"
    assert outcome(lab).masks


def test_after_a_prune_event_a_farm_is_sent_what_changed(finished: Lab) -> None:
    store = finished.store()
    start, cut = store.run(1), store.candidates(1)[1]
    assert cut.mask != start.mask, "it was not a prune event"
    whole, step = Path(cut.path).stat().st_size, Path(cut.path).with_suffix(".delta").stat().st_size
    sent = {row.round: row.bytes_down for row in store.traffic(1) if row.kind == "align"}
    store.close()
    assert step < whole / 2
    assert sent[2] < len(finished.farms) * whole


def test_the_same_seed_gives_the_same_masks_and_accuracies_in_any_order_of_arrival(
    finished: Lab, tmp_path: Path
) -> None:
    again = Lab(tmp_path, **PRUNE)
    again.run(order=99)
    assert outcome(again) == outcome(finished)


def test_status_shows_rounds_farms_accuracy_and_mask(finished: Lab) -> None:
    values = snapshot(finished.server_dir)
    assert values["state"] == "done"
    assert [row["state"] for row in values["rounds"]] == ["committed", "committed"]
    assert [row["farm"] for row in values["farms"]] == ["farm0", "farm1", "farm2"]
    assert all(0 <= row["reports"]["model"] <= 1 for row in values["farms"])
    assert "block" in values["mask"]["text"]
    assert -1 <= values["agreement"] <= 1
    json.dumps(values)


def test_probe_local_and_final_report_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab(tmp_path, rounds=1)
    with caplog.at_level(logging.INFO, "client"):
        lab.run(local_rounds=2)
    store = lab.store()
    reports = store.reports(1)
    assert not store.rejections(1)
    store.close()
    labels = [(row.label, row.farm) for row in reports]
    assert labels == [(a, f"farm{n}") for a in ("local", "model", "probe") for n in range(3)]
    trained = sorted(message for message in caplog.messages if "local round" in message)
    assert trained == [f"farm{n}: local round {i} of 2" for n in range(3) for i in (1, 2)]


def test_a_macs_budget_removes_heads_and_neurons_and_is_kept(tmp_path: Path) -> None:
    lab = Lab(tmp_path, prune_macs=0.4, compensation="bias")
    lab.run()
    store = lab.store()
    last = store.last_committed(1)
    (ratio,) = {row.macs_ratio for row in store.rounds(1)}
    assert last is not None
    mask = Mask.from_json(store.mask(last[1].mask))
    store.close()
    assert ratio is not None
    assert 0.58 < ratio <= 0.6
    assert mask.heads_kept_ratio < 1
    assert mask.neurons_kept_ratio < 1


@pytest.mark.parametrize("criterion", ["taha", "l1gates"])
def test_farms_score_by_the_criterion_of_the_plan(criterion: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path, count=2, criterion=criterion, prune_macs=0.4, rounds=2)
    link = lab.run()
    asked = [request for _, request in link.requests if isinstance(request, AlignRequest)]
    assert {request.criterion for request in asked} == {criterion, None}
    with lab.store() as store:
        last = store.last_committed(1)
        assert last is not None
        kept = Mask.from_json(store.mask(last[1].mask))
    assert kept.heads_kept_ratio < 1
    assert kept.neurons_kept_ratio < 1


@pytest.mark.parametrize(
    ("backbone", "train"),
    [
        ({}, {"dal": "coral"}),
        ({}, {"trainable": "full"}),
        ({}, {"trainable": "lora", "rank": 2, "top": 0.2}),
        ({"source": None, "epochs": 0}, {}),
        ({"options": TINY | {"depth": 4}, "token_macs": 0.7, "linear_blocks": (1,)}, {}),
    ],
    ids=["coral", "full", "lora", "no source images", "fewer tokens, linear attention"],
)
def test_other_settings_reach_the_end(
    backbone: dict[str, Any], train: dict[str, Any], tmp_path: Path
) -> None:
    lab = Lab(tmp_path, settings={"backbone": backbone, "train": train}, **PRUNE)
    link = lab.run()
    aligned = [request for _, request in link.requests if isinstance(request, AlignRequest)]
    named = {request.anchors_digest is None for request in aligned}
    assert named == {"source" in backbone}
    assert outcome(lab).masks


def test_farms_send_few_bits_and_get_as_few_back(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=1, settings={"train": {"update_bits": 4}})
    sent = []

    def look(_node: int, _request: Request, reply: Reply) -> None:
        if isinstance(reply, AlignReply):
            sent.append(codec.read_header(expand(reply.update, LIMIT)).bits)

    lab.run(fault=look)
    steps = [path.read_bytes() for path in (lab.server_dir / "models").glob("*.delta")]
    assert sent == [4, 4, 4]
    updates = [Step.from_bytes(np.frombuffer(step, np.uint8)).update for step in steps]
    assert [codec.read_header(update).bits for update in updates] == [4]


def _nan(reply: AlignReply) -> Reply:
    update = expand(reply.update, LIMIT).copy()
    update[-64:] = 255  # the last fp32 numbers become NaN
    return reply.model_copy(update={"update": update})


def _short(reply: AlignReply) -> Reply:
    update = expand(reply.update, LIMIT)
    header = codec.read_header(update)
    values = codec.decode(update, base=reply.base, count=header.count)[:-2]
    return reply.model_copy(update={"update": codec.encode(values, reply.base, bits=32)})


def _cut_off(reply: AlignReply) -> Reply:
    return reply.model_copy(update={"update": reply.update[:-8].copy()})


def _nan_scores(reply: AlignReply) -> Reply:
    assert reply.head_importance is not None
    broken = np.full_like(reply.head_importance, np.nan)
    return reply.model_copy(update={"head_importance": broken})


BAD: dict[str, tuple[Callable[[AlignReply], Reply], RejectReason]] = {
    "nan": (_nan, RejectReason.NOT_FINITE),
    "nan scores": (_nan_scores, RejectReason.NOT_FINITE),
    "wrong shape": (_short, RejectReason.SHAPE),
    "cut off": (_cut_off, RejectReason.MALFORMED),
    "foreign mask": (lambda r: r.model_copy(update={"mask": "0" * 64}), RejectReason.FOREIGN_MASK),
    "foreign base": (lambda r: r.model_copy(update={"base": "0" * 64}), RejectReason.FOREIGN_BASE),
    "older round": (lambda r: r.model_copy(update={"round": 0}), RejectReason.STALE),
    "protocol": (lambda _r: Refusal(reason="protocol", detail="2"), RejectReason.PROTOCOL),
    "data": (lambda _r: Refusal(reason="data", detail="empty"), RejectReason.REFUSED),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_quarantined_counted_and_the_round_goes_on(
    name: str, tmp_path: Path
) -> None:
    change, reason = BAD[name]
    lab = Lab(tmp_path, **PRUNE)
    train = lab.config.train.model_copy(update={"update_bits": 32})

    def fault(node: int, _request: Request, reply: Reply) -> Reply | None:
        if node == 2 and isinstance(reply, AlignReply) and reply.round == 1:
            return change(reply)
        return None

    lab.run(fault=fault, train=train)
    store = lab.store()
    assert store.rejection_counts(1)[reason] == 1
    assert [row.node for row in store.replies(1, 1)] == [1, 3]
    store.close()
    assert snapshot(lab.server_dir)["rejected"] == {str(reason): 1}


def test_a_lost_reply_is_asked_for_again_and_answered_from_disk(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=1)
    seconds: list[float] = []

    def fault(node: int, request: Request, reply: Reply) -> str | None:
        if node == 1 and isinstance(reply, AlignReply):
            seconds.append(reply.seconds)
            return "lost on the way" if len(seconds) == 1 else None
        return None

    lab.run(fault=fault)
    assert len(seconds) == 2
    assert seconds[0] == seconds[1], "the farm trained again instead of answering from disk"
    store = lab.store()
    assert store.rejection_counts(1)[RejectReason.LOST] == 1
    assert len(store.replies(1, 1)) == 3
    store.close()


def test_a_farm_that_lost_its_state_gets_the_whole_backbone_again(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=2)

    def fault(node: int, request: Request, reply: Reply) -> None:
        if node == 1 and isinstance(request, AlignRequest) and request.round == 1:
            for path in (lab.farms[0][1] / "backbones").iterdir():
                path.unlink()

    kinds = [
        (request.round, request.body_kind)
        for node, request in lab.run(fault=fault).requests
        if node == 1 and isinstance(request, AlignRequest)
    ]
    assert kinds == [(1, "none"), (2, "delta"), (2, "full")]


def test_a_run_that_was_cut_continues_after_the_last_committed_round(tmp_path: Path) -> None:
    whole = Lab(tmp_path / "whole", rounds=3)
    whole.run()
    cut = Lab(tmp_path / "cut", rounds=3)

    def power_cut(_node: int, request: Request, _reply: Reply) -> None:
        if isinstance(request, AlignRequest) and request.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(fault=power_cut)
    link = cut.run()
    rounds = {request.round for _, request in link.requests if isinstance(request, AlignRequest)}
    assert rounds == {2, 3}
    assert outcome(cut) == outcome(whole)


def test_a_spooled_reply_damaged_by_a_power_cut_is_asked_for_again(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=1)
    answered: list[int] = []

    def power_cut(node: int, request: Request, _reply: Reply) -> None:
        if isinstance(request, AlignRequest):
            answered.append(node)
            if len(answered) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(fault=power_cut)
    store = lab.store()
    broken, kept = store.replies(1, 1)
    store.close()
    with Path(broken.path).open("r+b") as file:
        file.seek(broken.start + 50)
        file.write(b"\0" * 50)
    asked = {node for node, request in lab.run().requests if isinstance(request, AlignRequest)}
    assert asked == {1, 2, 3} - {kept.node}


def test_no_farm_at_all_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    lab.farms = []
    with pytest.raises(StateError, match="start the farms"):
        lab.run()
    assert snapshot(lab.server_dir)["state"] == "failed"


def test_a_stopped_link_ends_the_run_and_leaves_the_store_intact(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=2)

    def stop(_node: int, request: Request, _reply: Reply) -> None:
        if not isinstance(request, HelloRequest) and request.round == 2:
            raise LaunchError("the run was stopped")

    with pytest.raises(LaunchError):
        lab.run(fault=stop)
    store = lab.store()
    last = store.last_committed(1)
    store.close()
    assert last is not None
    assert last[0] == 1
