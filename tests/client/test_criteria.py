"""Every criterion yields the same record, and says what it claims to say."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from client import gates
from client.criteria import CRITERIA, Scoring, score
from client.scores import FarmScores
from common import fit
from common.backbone import block_layers, build, dense_spec
from common.budget import Budget, choose_mask
from common.images import FarmFolder, open_folder
from common.mask import Mask
from common.plan import Criterion
from common.scores import Floats, UnitScores
from common.surgery import prune
from tests.lab.network import SIDE, TINY, draw_folder

NAMES: tuple[Criterion, ...] = get_args(Criterion)
SPEC = dense_spec("vit_tiny_patch16_224", SIDE, TINY)
HEADS, NEURONS = sum(SPEC.heads), sum(SPEC.neurons)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FarmFolder:
    return open_folder(draw_folder(tmp_path_factory.mktemp("farm"), 3, 12, 5))


@pytest.fixture
def scoring(folder: FarmFolder) -> Scoring:
    torch.manual_seed(0)
    return subject(build(SPEC).eval(), folder)


def subject(model: nn.Module, folder: FarmFolder, seed: int = 1) -> Scoring:
    features, labels = fit.extract(model, folder.fit, SPEC)
    return Scoring(
        model=model,  # type: ignore[arg-type]
        spec=SPEC,
        classifier=fit.fit_classifier(features, labels, 3),
        part=folder.fit,
        batch_size=16,
        anchors=None,
        seed=seed,
        autocast=False,
    )


def weights_of(scoring: Scoring) -> list[torch.Tensor]:
    parts = (scoring.model, scoring.classifier)
    return [value.clone() for part in parts for value in part.state_dict().values()]


def test_every_criterion_that_may_be_asked_for_is_there() -> None:
    assert set(CRITERIA) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_normalised_repeatable_and_leaves_no_trace(
    name: Criterion, scoring: Scoring
) -> None:
    before = weights_of(scoring)
    first, second = score(name, scoring), score(name, scoring)
    for values, count in ((first.head_importance, HEADS), (first.neuron_importance, NEURONS)):
        assert values.shape == (count,)
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert values.sum() == pytest.approx(1, abs=1e-5)
        assert len(np.unique(values)) > count / 2, "it tells units apart"
    for field in ("head_importance", "head_mmd2", "neuron_importance"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    for old, new in zip(before, weights_of(scoring), strict=True):
        assert torch.equal(old, new)
    assert all(weight.grad is None for weight in scoring.model.parameters())
    assert all(weight.requires_grad for weight in scoring.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_backbone_is_scored_by_what_is_left(name: Criterion, scoring: Scoring) -> None:
    dense = Mask.dense(SPEC)
    mask = choose_mask(units(score(name, scoring)), dense, SPEC, Budget(macs_kept=0.6))
    model, spec = prune(scoring.model, SPEC, mask.keep_in(dense))
    again = Scoring(**(vars(scoring) | {"model": model, "spec": spec}))
    scores = score(name, again)
    assert len(scores.head_importance) == sum(spec.heads) < HEADS
    assert len(scores.neuron_importance) == sum(spec.neurons) < NEURONS
    choose_mask(UnitScores.from_flat(*flat(scores), spec), mask, SPEC, Budget(macs_kept=0.5))


def flat(scores: FarmScores) -> tuple[Floats, Floats]:
    return scores.head_importance, scores.neuron_importance


def units(scores: FarmScores) -> UnitScores:
    return UnitScores.from_flat(*flat(scores), SPEC)


def test_magnitude_follows_the_weights(scoring: Scoring) -> None:
    block = block_layers(scoring.model)[1]
    width = block.attn.head_dim
    with torch.no_grad():
        block.attn.proj.weight[:, width : 2 * width] *= 50
        block.fc1.weight[3] *= 50
    scores = units(score("magnitude", scoring))
    assert int(scores.flat_heads().argmax()) == SPEC.heads[0] + 1
    assert int(scores.flat_neurons().argmax()) == SPEC.neurons[0] + 3

    def norm(head: int) -> float:
        at = slice(head * width, (head + 1) * width)
        parts = [part[at] for part in block.attn.qkv.weight.detach().chunk(3)]
        columns = block.attn.proj.weight.detach()[:, at]
        return float(torch.cat([part.flatten() for part in (*parts, columns)]).norm())

    ratio = scores.heads[1][0] / scores.heads[1][1]
    assert ratio == pytest.approx(norm(0) / norm(1), rel=1e-4)


def test_random_is_the_same_on_every_farm_and_another_in_every_round(
    scoring: Scoring, tmp_path: Path
) -> None:
    elsewhere = subject(scoring.model, open_folder(draw_folder(tmp_path, 3, 10, 9)))
    here = score("random", scoring).head_importance
    np.testing.assert_array_equal(here, score("random", elsewhere).head_importance)
    later = Scoring(**(vars(scoring) | {"seed": 2}))
    assert not np.array_equal(here, score("random", later).head_importance)


def test_gates_of_units_that_do_nothing_close_first(scoring: Scoring) -> None:
    block = block_layers(scoring.model)[2]
    width = block.attn.head_dim
    with torch.no_grad():
        block.attn.proj.weight[:, :width] = 0
        block.fc2.weight[:, 5] = 0
    scores = units(score("l1gates", scoring))
    assert scores.heads[2][0] == scores.flat_heads().min()
    assert scores.neurons[2][5] == scores.flat_neurons().min()


def test_more_pressure_leaves_less_of_the_gates(scoring: Scoring) -> None:
    def left(pressure: float) -> float:
        learned = gates.learn(
            scoring.model,
            scoring.classifier,
            scoring.part,
            SPEC,
            batch_size=16,
            seed=1,
            pressure=pressure,
        )
        return float(torch.cat([g.flatten() for g in learned.heads]).mean())

    assert left(100.0) < left(1.0) < left(0.0)
