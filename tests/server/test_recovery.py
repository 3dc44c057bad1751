"""After a cut farms may train other numbers, in other ways, than before it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import server.rounds
from common.backbone import build, dense_spec
from common.config import RecoveryConfig, ServerConfig, TrainConfig
from common.mask import Keep, Mask
from common.messages import AlignReply, AlignRequest, Reply, Request
from common.trainable import trainable_set
from server.residual import left_after
from server.rows import ReplyRow
from tests.lab.link import Fault
from tests.lab.network import TINY, Lab

PRUNE: dict[str, Any] = {"prune_heads": 0.5, "rounds": 4, "warmup": 1, "prune_events": 1}
FULL = RecoveryConfig(trainable="full", self_distil=2.0)


def lab_of(root: Path) -> Lab:
    lab = Lab(root, count=2, **PRUNE)
    lab.config = lab.config.model_copy(update={"recovery": FULL})
    return lab


def asked(lab: Lab, fault: Fault | None = None) -> list[AlignRequest]:
    """What farms were asked to align, in the order of rounds."""
    requests = [one for _, one in lab.run(fault=fault).requests if isinstance(one, AlignRequest)]
    return sorted(requests, key=lambda one: one.round)


def test_what_is_unset_stays_and_another_set_has_a_rate_of_its_own() -> None:
    train = TrainConfig(lr=0.5, rank=3, update_bits=8)
    same = RecoveryConfig(epochs=2).after(train)
    assert same == train.model_copy(update={"epochs": 2})
    full = RecoveryConfig(trainable="full").after(train)
    assert (full.lr, full.update_bits) == (None, 8)
    assert full.backbone_lr == TrainConfig(trainable="full").backbone_lr
    assert RecoveryConfig(trainable="full", lr=0.1).after(train).backbone_lr == 0.1


def test_it_begins_with_the_first_unit_that_goes() -> None:
    spec = dense_spec("vit_tiny_patch16_224", 32, TINY)
    whole = Mask.dense(spec)
    less = Mask(((0,), *whole.heads[1:]), whole.neurons, spec.heads, spec.neurons)
    fewer = (whole.neurons[0][1:], *whole.neurons[1:])
    config = ServerConfig(recovery=FULL)
    assert config.train_under(whole) == config.train
    for mask in (less, Mask(whole.heads, fewer, spec.heads, spec.neurons)):
        assert config.train_under(mask).trainable == "full"
        assert ServerConfig().train_under(mask) == TrainConfig()


def test_regions_train_alike_in_all_rounds() -> None:
    entry = {"name": "north", "address": "north.example:9000", "member": "north.json"}
    with pytest.raises(ValidationError, match="recovery cannot go with regions"):
        ServerConfig.model_validate({"recovery": {"epochs": 2}, "regions": [entry]})


def test_farms_train_all_weights_after_the_cut_and_its_rounds_count(tmp_path: Path) -> None:
    counts: dict[int, set[int]] = {}

    def look(_node: int, request: Request, reply: Reply) -> None:
        if isinstance(request, AlignRequest) and isinstance(reply, AlignReply):
            counts.setdefault(reply.round, set()).add(reply.update.nbytes)

    lab = lab_of(tmp_path)
    sets = {(one.round, one.train.trainable, one.train.self_distil) for one in asked(lab, look)}
    assert sets == {(1, "lora", 0.0), (2, "full", 2.0), (3, "full", 2.0), (4, "full", 2.0)}
    assert min(counts[2]) > 5 * max(counts[1])
    with lab.store() as store:
        assert [len(store.replies(1, number)) for number in range(1, 5)] == [2] * 4
        assert len({row.digest for row in store.candidates(1).values()}) == 4
        assert not store.rejections(1)


def test_step_budgets_count_the_epochs_of_rounds_after_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[dict[int, int]] = []

    def spy(replies: Sequence[ReplyRow], whole: dict[int, int]) -> dict[int, int]:
        full.append(whole)
        return {}

    monkeypatch.setattr(server.rounds, "step_budgets", spy)
    lab = lab_of(tmp_path)
    rules = lab.config.rounds.model_copy(update={"step_budget": True})
    recovery = RecoveryConfig(epochs=3)
    lab.config = lab.config.model_copy(update={"recovery": recovery, "rounds": rules})
    lab.run()
    before, *after = full
    assert after == [{node: 3 * steps for node, steps in before.items()}] * 3


def test_the_same_seed_gives_the_same_candidates(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        lab = lab_of(tmp_path / name)
        lab.run()
        with lab.store() as store:
            found.append([row.digest for row in store.candidates(1).values()])
    assert found[0] == found[1]


def test_a_residual_goes_on_only_where_its_numbers_are_trained_on() -> None:
    spec = dense_spec("vit_tiny_patch16_224", 32, TINY)
    model = build(spec)
    keep = Keep(
        tuple(np.arange(count) for count in spec.heads),
        tuple(np.arange(count) for count in spec.neurons),
    )
    lora, wider, full, bias = (
        trainable_set(model, kind, rank)
        for kind, rank in (("lora", 1), ("lora", 2), ("full", 1), ("bias", 1))
    )
    lost = np.arange(lora.layout.count, dtype=np.float32)
    assert np.array_equal(left_after(lost, lora, spec, keep, lora), lost)
    assert left_after(lost, lora, spec, keep, full).size == 0
    assert left_after(lost, lora, spec, keep, wider).size == 0
    biases = left_after(lost, lora, spec, keep, bias)
    assert biases.size == bias.layout.count
    assert set(biases.tolist()) < set(lost.tolist())
