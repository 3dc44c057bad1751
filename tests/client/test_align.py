import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from client.align import Aligned, align
from common.anchors import Anchors, compute_anchors, domain_alignment_loss
from common.backbone import build, dense_spec
from common.codec import Floats
from common.config import TrainConfig
from common.errors import ProtocolError
from common.fit import evaluate, extract
from common.heads import tap_heads
from common.images import FarmFolder, open_folder
from common.spec import ModelSpec
from common.trainable import trainable_names, trainable_set

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return dense_spec("vit_tiny_patch16_224", 32, TINY)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> FarmFolder:
    """Two classes of stripes, lying and standing."""
    root, rng = tmp_path_factory.mktemp("farm"), np.random.default_rng(0)
    y, x = np.mgrid[0:36, 0:36] / 36
    for name, axis in (("lying", y), ("standing", x)):
        (root / name).mkdir()
        for number in range(30):
            wave = np.sin(20 * axis + rng.uniform(0, 7))[..., None] * rng.uniform(30, 90, 3)
            pixels = 128 + wave + rng.normal(0, 25, (36, 36, 3))
            file = root / name / f"{number}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    return open_folder(root)


def start(spec: ModelSpec) -> tuple[VisionTransformer, nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(spec), nn.Linear(spec.width, 2)


def anchors_of(model: VisionTransformer) -> Anchors:
    """Anchors of a source that looks nothing like the farm: noise."""
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(16, 3, 32, 32, generator=generator) * 2 for _ in range(3)]
    return compute_anchors(model, noise, seed=1)


def run(
    spec: ModelSpec,
    farm: FarmFolder,
    anchors: Anchors | None = None,
    seed: int = 0,
    **settings: object,
) -> tuple[Aligned, VisionTransformer, dict[str, Tensor]]:
    model, classifier = start(spec)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    values = {"batch_size": 16, "epochs": 3, "lr": 5e-3} | settings
    config = TrainConfig.model_validate(values)
    aligned = align(model, classifier, farm.fit, spec, config, anchors, seed=seed, autocast=False)
    return aligned, model, before


def norm(delta: Floats) -> float:
    return float(np.linalg.norm(delta))


@pytest.mark.parametrize("trainable", ["bias", "attention", "full"])
def test_delta_is_what_the_trainable_set_changed(
    spec: ModelSpec, farm: FarmFolder, trainable: str
) -> None:
    aligned, model, before = run(spec, farm, trainable=trainable, epochs=1)
    names = trainable_names(model, trainable)
    changes = trainable_set(model, trainable).layout.unflatten(aligned.delta)
    for name, weight in model.named_parameters():
        if name in names:
            assert torch.equal(changes[name], weight.detach() - before[name])
        else:
            assert torch.equal(weight, before[name])
    assert norm(aligned.delta) > 0
    assert aligned.steps == 2
    assert aligned.dal == 0


def test_alignment_learns_the_species(spec: ModelSpec, farm: FarmFolder) -> None:
    model, classifier = start(spec)
    config = TrainConfig(batch_size=16, epochs=1, lr=3e-3, classifier_lr=1e-2, trainable="full")
    first = align(model, classifier, farm.fit, spec, config, None, seed=0, autocast=False)
    last = align(model, classifier, farm.fit, spec, config, None, seed=1, autocast=False, epochs=8)
    assert last.steps == 8 * first.steps
    assert last.loss < 0.6 * first.loss
    assert evaluate(classifier, *extract(model, farm.decide, spec)).accuracy >= 0.9


def test_the_same_seed_gives_the_same_delta(spec: ModelSpec, farm: FarmFolder) -> None:
    anchors = anchors_of(start(spec)[0])
    one, two, other = (run(spec, farm, anchors, seed=seed, epochs=1)[0] for seed in (3, 3, 4))
    assert np.array_equal(one.delta, two.delta)
    assert one.dal == two.dal
    assert norm(one.delta - other.delta) > 0


def test_dal_pulls_the_heads_towards_their_anchors(spec: ModelSpec, farm: FarmFolder) -> None:
    anchors = anchors_of(start(spec)[0])

    def distance(model: VisionTransformer) -> float:
        images, _ = next(farm.fit.batches(spec, 64))
        with torch.no_grad(), tap_heads(model) as heads:
            model(images)
            return float(domain_alignment_loss(heads, anchors))

    _, free, _ = run(spec, farm, None)
    pulled, model, _ = run(spec, farm, anchors, dal_weight=20.0)
    assert distance(model) < 0.9 * distance(free)
    assert pulled.dal > 0
    assert pulled.loss > 20 * pulled.dal
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 3), (1000, 4)])
def test_a_step_budget_ends_training_earlier(
    spec: ModelSpec, farm: FarmFolder, most: int, expected: int
) -> None:
    model, classifier = start(spec)
    config = TrainConfig(dal_weight=0, epochs=2, batch_size=16)
    aligned = align(
        *(model, classifier, farm.fit, spec, config, None),
        seed=0,
        autocast=False,
        max_steps=most,
    )
    assert aligned.steps == expected
    assert np.isfinite(aligned.loss)


def test_dal_weight_zero_needs_no_anchors(spec: ModelSpec, farm: FarmFolder) -> None:
    anchors = anchors_of(start(spec)[0])
    off = run(spec, farm, anchors, dal_weight=0.0, epochs=1)[0]
    none = run(spec, farm, None, epochs=1)[0]
    assert np.array_equal(off.delta, none.delta)
    assert off.dal == none.dal == 0


def test_the_proximal_term_keeps_the_copy_near(spec: ModelSpec, farm: FarmFolder) -> None:
    free = run(spec, farm)[0]
    held = run(spec, farm, proximal=50.0)[0]
    assert norm(held.delta) < 0.7 * norm(free.delta)


def test_anchors_of_another_mask_are_refused(spec: ModelSpec, farm: FarmFolder) -> None:
    anchors = anchors_of(start(spec)[0])
    cut = anchors.select([np.array([0]), np.array([0, 1])])
    with pytest.raises(ProtocolError, match="anchors describe"):
        run(spec, farm, cut)


def test_bf16_stays_close_to_fp32(spec: ModelSpec, farm: FarmFolder) -> None:
    model, classifier = start(spec)
    config = TrainConfig(batch_size=16, epochs=1, dal_weight=1.0)
    anchors = anchors_of(model)
    rough = align(model, classifier, farm.fit, spec, config, anchors, seed=0, autocast=True)
    exact = run(spec, farm, anchors, epochs=1, dal_weight=1.0, lr=config.backbone_lr)[0]
    assert rough.loss == pytest.approx(exact.loss, rel=0.05, abs=0.02)
    assert rough.delta.dtype == np.float32
