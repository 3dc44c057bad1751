import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from common.config import TrainConfig
from common.errors import DataError, QualityError
from common.fit import (
    Step,
    TrainingLog,
    evaluate,
    extract,
    fit_classifier,
    train_epochs,
    zero_classifier,
)
from common.images import Part
from common.spec import ModelSpec

SPEC = ModelSpec(name="any", image_size=16, heads=(2,), neurons=(8,), head_width=4, width=6)


class Tiny(nn.Module):
    """A backbone small enough to see through: (B,3,16,16) -> (B,6)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 4, stride=4)
            self.out = nn.Linear(4 * 16, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(images)).flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """Two classes told apart by colour."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths, labels = [], []
    for number in range(36):
        label = number % 2
        tint = np.array([1.0, 0.4, 0.2] if label else [0.2, 0.4, 1.0])
        pixels = (rng.uniform(0, 255, (20, 20, 1)) * tint).astype(np.uint8)
        paths.append(folder / f"{number}.png")
        labels.append(label)
        Image.fromarray(pixels).save(paths[-1])
    return Part(tuple(paths), np.array(labels, dtype=np.int64))


def clouds(seed: int, count: int = 60, width: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


# --- the classifier -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1e-1]))
def test_the_gradient_vanishes_at_the_classifier(seed: int, l2: float) -> None:
    features, labels = clouds(seed)
    linear = fit_classifier(features, labels, 3, l2)
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    standard = (x - mean) / std
    weight = linear.weight.detach().double() * std  # undo the folding
    bias = linear.bias.detach().double() + linear.weight.detach().double() @ mean
    excess = torch.softmax(standard @ weight.T + bias, 1) - nn.functional.one_hot(labels, 3)
    gradient = excess.T @ standard / len(x) + l2 * weight
    assert gradient.abs().max() < 1e-5
    assert excess.mean(0).abs().max() < 1e-5


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6))
def test_order_and_scale_of_the_features_do_not_matter(seed: int) -> None:
    features, labels = clouds(seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    scale, shift = (
        torch.tensor([1e3, 1.0, 1e-3, 5.0, 0.1]),
        torch.tensor([0.0, 9.0, -3.0, 1.0, 2.0]),
    )
    one = fit_classifier(features, labels, 3)(features)
    moved = features * scale + shift
    other = fit_classifier(moved[order], labels[order], 3)(moved)
    torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)


def test_constant_features_and_absent_classes_are_taken() -> None:
    features, labels = clouds(1)
    features[:, 2] = 7.3
    linear = fit_classifier(features, labels, 5)
    assert linear.weight.shape == (5, 5)
    assert linear.weight.dtype == torch.float32
    assert linear(features).argmax(1).max() < 3
    assert linear.weight[:, 2].abs().max() == 0


def test_fitting_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    features, labels = clouds(4)
    one, two = fit_classifier(features, labels, 3), fit_classifier(features, labels, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.weight, two.weight)


def test_features_of_inference_mode_can_be_fitted() -> None:
    with torch.inference_mode():
        features, labels = clouds(2)
        linear = fit_classifier(features, labels, 3)
    linear(torch.zeros(1, 5)).sum().backward()
    assert linear.weight.grad is not None


def test_features_that_are_not_finite_are_refused() -> None:
    features, labels = clouds(3)
    features[4, 1] = float("nan")
    with pytest.raises(QualityError, match="not finite"):
        fit_classifier(features, labels, 3)


# --- evaluation ---------------------------------------------------------------------------------


def test_accuracy_and_macro_f1_by_hand() -> None:
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3))
        linear.bias.zero_()
    predicted, labels = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    judged = evaluate(linear, torch.eye(3)[predicted], labels)
    assert judged.correct.tolist() == [True, True, False, True, False, False]
    assert judged.accuracy == pytest.approx(0.5)
    # class 0: 2*2/(3+3), class 1: 2*1/(2+3); class 2 is only predicted, hence not averaged
    assert judged.f1 == pytest.approx((4 / 6 + 2 / 5) / 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_a_perfect_classifier_scores_one(labels: list[int]) -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
        linear.bias.zero_()
    judged = evaluate(linear, torch.eye(4)[labels], torch.tensor(labels))
    assert (judged.accuracy, judged.f1) == (1.0, 1.0)


# --- features -----------------------------------------------------------------------------------


def test_features_do_not_depend_on_batches(part: Part) -> None:
    model = Tiny().train()
    one, labels = extract(model, part, SPEC, batch_size=5)
    other, _ = extract(model, part, SPEC)
    torch.testing.assert_close(one, other)
    assert one.dtype == torch.float32
    assert not one.is_inference()
    assert labels.tolist() == part.labels.tolist()
    assert model.training


def test_bf16_features_are_close(part: Part) -> None:
    exact, _ = extract(Tiny(), part, SPEC)
    rough, _ = extract(Tiny(), part, SPEC, autocast=True)
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.05


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    gone = Part((tmp_path / "gone.png",), np.zeros(1, dtype=np.int64))
    with pytest.raises(DataError, match=r"none of the 1 images.*gone\.png"):
        extract(Tiny(), gone, SPEC)
    with pytest.raises(DataError, match="none could be read"):
        train(Tiny(), gone)


# --- the epoch loop -----------------------------------------------------------------------------


def train(model: nn.Module, part: Part, seed: int = 0, **changes: object) -> TrainingLog:
    classifier = zero_classifier(6, 2)
    config = TrainConfig(batch_size=16, lr=1e-2, classifier_lr=1e-2)
    arguments: dict[str, object] = {"trainable": ["conv.bias", "out.weight"], "epochs": 2}
    return train_epochs(
        model,
        classifier,
        part,
        SPEC,
        config,
        seed=seed,
        **(arguments | changes),  # type: ignore[arg-type]
    )


def test_training_lowers_the_loss_and_touches_only_what_it_may(part: Part) -> None:
    model = Tiny()
    model.conv.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Step] = []
    log = train(model, part, epochs=12, on_step=seen.append)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"conv.bias", "out.weight"}
    assert log.loss < 0.5 < seen[0].loss
    assert [step.number for step in seen] == list(range(24))
    assert {step.steps for step in seen} == {24}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert flags == {"conv.weight": False, "conv.bias": True, "out.weight": True, "out.bias": True}
    assert all(weight.grad is None for weight in model.parameters())


def test_training_follows_from_the_seed(part: Part) -> None:
    def weights(seed: int) -> Tensor:
        model = Tiny()
        train(model, part, seed=seed)
        return model.out.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_penalty_is_added_and_logged(part: Part) -> None:
    model = Tiny()
    plain = train(Tiny(), part)
    log = train(model, part, penalty=lambda: 50.0 * model.out.weight.square().sum())
    assert log.penalty > 0
    assert log.loss > log.penalty
    assert plain.penalty == 0
    assert model.out.weight.norm() < Tiny().out.weight.norm()
    assert log.steps == plain.steps == 4


def test_divergence_is_an_error_that_says_what_to_lower(part: Part) -> None:
    model = Tiny()
    with pytest.raises(QualityError, match=r"diverged.*step 0.*lower \[train\] lr"):
        train(model, part, penalty=lambda: torch.tensor(float("nan")))
    assert all(weight.requires_grad for weight in model.parameters())


def test_images_that_vanish_while_training_are_skipped(
    part: Part, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Part((*part.paths, tmp_path / "gone.png"), np.append(part.labels, 0))
    with caplog.at_level(logging.WARNING):
        assert train(Tiny(), broken).steps == 4
    assert "gone.png" in caplog.text


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_rate_warms_up_and_falls_towards_zero(
    part: Part, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(Tiny(), part, epochs=epochs)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-2)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] <= max(rates)


def test_only_matrices_decay(part: Part) -> None:
    model = Tiny()
    config = TrainConfig(batch_size=16, lr=1e-3, classifier_lr=1e-30, weight_decay=1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    head = zero_classifier(6, 2)  # no gradient reaches the backbone: what changes it is decay
    names = ["out.bias", "out.weight"]
    train_epochs(model, head, part, SPEC, config, trainable=names, seed=0, epochs=1)
    now = dict(model.named_parameters())
    shrunk = now["out.weight"].norm() / before["out.weight"].norm()
    assert 0.99 < shrunk < 0.9995
    torch.testing.assert_close(now["out.bias"], before["out.bias"], atol=1e-6, rtol=0)
