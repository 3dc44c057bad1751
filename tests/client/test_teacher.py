"""Self-distillation: what the backbone before a cut says, and when nobody is there to say it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from client.align import Aligned, align
from client.teacher import Teacher, teaching
from common.backbone import build, dense_spec
from common.config import TrainConfig
from common.images import FarmFolder, open_folder
from common.mask import Keep
from common.messages import AlignReply, AlignRequest, EvaluateRequest, Reply, Request
from common.surgery import prune
from tests.lab.network import Lab, draw_folder

SPEC = dense_spec(
    "vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
)
KEEP = Keep(
    (np.array([1]), np.array([0, 1])), tuple(np.arange(0, count, 2) for count in SPEC.neurons)
)
SMALL: dict[str, Any] = {"backbone": {"options": dict(SPEC.options), "epochs": 0}}
TAUGHT: dict[str, Any] = {"self_distil": 2.0, "self_distil_temperature": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FarmFolder:
    return open_folder(draw_folder(tmp_path_factory.mktemp("farm"), 3, 14, 1))


def model_of(seed: int = 0) -> tuple[VisionTransformer, nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(SPEC), nn.Linear(SPEC.width, 3)


def teacher_of(seed: int = 1) -> Teacher:
    model, classifier = model_of(seed)
    return Teacher(model, SPEC, classifier)


def learn(folder: FarmFolder, teacher: Teacher | None, **settings: Any) -> Aligned:
    model, classifier = model_of()
    smaller, spec = prune(model, SPEC, KEEP)
    config = TrainConfig(batch_size=16, epochs=2, **settings)
    arguments = (smaller, classifier, folder.fit, spec, config, None)
    return align(*arguments, seed=3, autocast=False, teacher=teacher)


def test_the_lesson_is_softened_divergence_and_distance_of_tokens_with_their_gradients() -> None:
    """By numbers: d/ds of T^2 KL(p_t || p_s) is T (p_s - p_t) over the images."""
    model, classifier = model_of()
    teacher = teacher_of()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    held: list[Tensor] = []

    def hold(_module: nn.Module, _inputs: object, said: Tensor) -> None:
        said.retain_grad()
        held.append(said)

    classifier.register_forward_hook(hold)
    with teaching(model, classifier, teacher, weight=0.7, temperature=3.0, autocast=False) as loss:
        model(images)
        value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        ours = (held[-1] / 3).double().softmax(1)
        theirs = (teacher.classifier(teacher.model(images)) / 3).double().softmax(1)
        a, b = (one.forward_features(images).flatten(0, 1) for one in (model, teacher.model))
    answers = 9 * (theirs * (theirs.log() - ours.log())).sum(1).mean()
    expected = 0.7 * (answers + (a - b).square().sum() / (b - b.mean(0)).square().sum())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)
    assert held[-1].grad is not None
    torch.testing.assert_close(
        held[-1].grad.double(), 0.7 * 3 * (ours - theirs) / 5, rtol=1e-4, atol=1e-7
    )
    assert all(one.grad is None for one in teacher.model.parameters())
    assert all(one.grad is None for one in teacher.classifier.parameters())
    assert dict(model.named_parameters())["blocks.0.attn.qkv.weight"].grad is not None
    assert not model._forward_hooks


def test_a_teacher_draws_no_random_numbers_and_hears_what_the_student_sees() -> None:
    model, classifier = model_of()
    teacher = Teacher(model_of(1)[0].train(), SPEC, classifier)
    heard: list[Tensor] = []
    teacher.model.register_forward_pre_hook(lambda _module, inputs: heard.append(inputs[0]))
    images = torch.zeros(2, 3, 32, 32)
    with teaching(model, classifier, teacher, weight=1.0, temperature=2.0, autocast=False) as loss:
        model(images)
        state = torch.random.get_rng_state()
        loss()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert heard[0] is images
    assert not teacher.model.training


def test_weight_nought_changes_not_one_bit(folder: FarmFolder) -> None:
    none = learn(folder, None)
    off = learn(folder, teacher_of(0), self_distil=0.0)
    assert np.array_equal(none.delta, off.delta)
    assert none.loss == off.loss


def test_a_student_comes_nearer_to_its_teacher(folder: FarmFolder) -> None:
    images = torch.cat([images for images, _ in folder.fit.batches(SPEC, 64)])
    teacher = teacher_of()

    def apart(weight: float) -> float:
        model, classifier = model_of()
        smaller, spec = prune(model, SPEC, KEEP)
        config = TrainConfig(batch_size=16, epochs=6, trainable="full", lr=2e-3, self_distil=weight)
        align(
            *(smaller, classifier, folder.fit, spec, config, None),
            seed=1,
            autocast=False,
            teacher=teacher,
        )
        with torch.no_grad():
            said = classifier(smaller.eval()(images)).softmax(1)
            taught = teacher.classifier(teacher.model(images)).softmax(1)
        return float((said - taught).abs().mean())

    assert apart(50.0) < 0.5 * apart(0.0)


def test_the_same_seed_gives_the_same_lesson(folder: FarmFolder) -> None:
    one, two = (learn(folder, teacher_of(), **TAUGHT) for _ in range(2))
    assert np.array_equal(one.delta, two.delta)
    assert not np.array_equal(one.delta, learn(folder, None).delta)


# --- a run with a prune event --------------------------------------------------------------------


Replies = dict[tuple[int, int], AlignReply]


def played(root: Path, **changes: Any) -> Replies:
    """Three rounds, the first of which ends with a cut; replies by node and round."""
    lab = Lab(root, 2, SMALL, rounds=3, prune_heads=0.5)
    replies: Replies = {}

    def listen(node: int, request: Request, reply: Reply) -> None:
        if isinstance(request, AlignRequest) and isinstance(reply, AlignReply):
            replies[node, request.round] = reply

    lab.run(fault=listen, train=lab.config.train.model_copy(update=changes))
    return replies


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Replies:
    return played(tmp_path_factory.mktemp("taught"), **TAUGHT)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> Replies:
    return played(tmp_path_factory.mktemp("untaught"))


def test_a_run_is_taught_from_its_cut_on_and_only_then(taught: Replies, untaught: Replies) -> None:
    assert sorted(taught) == [(node, number) for node in (1, 2) for number in (1, 2, 3)]
    for at, reply in taught.items():
        same = np.array_equal(reply.update, untaught[at].update)
        assert same == (at[1] == 1), at
    # as much work, and another objective: the term counts
    assert taught[1, 2].steps == untaught[1, 2].steps
    assert taught[1, 2].loss > untaught[1, 2].loss


def test_a_farm_without_the_old_base_goes_on_and_says_so_once_and_all_repeats_itself(
    tmp_path: Path,
    taught: Replies,
    untaught: Replies,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lab = Lab(tmp_path, 2, SMALL, rounds=3, prune_heads=0.5)
    replies: Replies = {}

    def forget(node: int, request: Request, reply: Reply) -> None:
        if isinstance(request, AlignRequest) and isinstance(reply, AlignReply):
            replies[node, request.round] = reply
            if node == 2 and request.round == 1:  # as a farm that comes only now: it has nothing
                for path in (lab.farms[1][1] / "backbones").iterdir():
                    path.unlink()

    with caplog.at_level(logging.WARNING):
        train = lab.config.train.model_copy(update=TAUGHT)
        link = lab.run(fault=forget, train=train)
    kinds = [
        (request.round, request.body_kind)
        for node, request in link.requests
        if node == 2 and isinstance(request, AlignRequest) and request.round == 2
    ]
    assert (2, "full") in kinds
    said = [one for one in caplog.messages if "without self-distillation" in one]
    assert len(said) == 1, "in the round after the cut, not in every round"
    # what it learns in the round after the cut is what it would learn without the setting
    assert replies[2, 2].loss == untaught[2, 2].loss
    assert replies[1, 2].loss == taught[1, 2].loss
    assert np.array_equal(replies[1, 2].update, taught[1, 2].update)


def test_a_farm_that_missed_the_round_of_the_cut_keeps_what_it_passes_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab(tmp_path, 2, SMALL, rounds=5, warmup=2, prune_heads=0.5)
    rounds = lab.config.rounds.model_copy(update={"sample": 1})
    train = lab.config.train.model_copy(update=TAUGHT)
    with caplog.at_level(logging.WARNING):
        link = lab.run(train=train, rounds=rounds)
    chains = [
        request
        for _, request in link.requests
        if isinstance(request, AlignRequest | EvaluateRequest) and request.body_kind == "chain"
    ]
    assert chains, "nobody was brought over the cut by several steps at once"
    assert not [one for one in caplog.messages if "without self-distillation" in one]
