"""Backbones for devices: dense, with fewer tokens, with linear attention, pruned, and together.

Each is a run of the product's own rounds in the lab (plants.py), federated over the farms of a
scale, from the shared weights or from what another run left. A run keeps its last backbone under
bench-work; a run whose parent is not there makes the parent again.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from client.infer import Classifier
from client.portable import calibrated
from common import backbone, fit
from common.anchors import compute_anchors
from common.backbone import head_macs, macs, parameters, tokens_by_block
from common.config import BackboneConfig, TrainConfig
from common.export import exported
from common.images import FarmFolder, Purpose, open_folder
from common.plan import PlanConfig
from common.portable import PortableAbout, PortableBundle
from common.resize import spec_at
from common.sampling import with_tokens
from common.spec import ModelSpec
from server.pretrain import ANCHORS_FILE, source_batches
from tests.benchmarks import plants
from tests.benchmarks.cells import Cell
from tests.benchmarks.plants import Flags

SIDE = 140
"""10 x 10 patches of 14 px; the shared position table (8 x 8) is interpolated."""
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Scale:
    """How much of it is done: which farms and seeds, how long they train.

    ``epochs`` are a student's from random weights, and from weights of its own.
    """

    root: Path = Path("bench-work/edge")
    farms: tuple[str, ...] = ("mango", "grape", "apple", "potato", "pepper_bell")
    seeds: tuple[int, ...] = (0, 1)
    rounds: int = 3
    per_class: int = plants.PER_CLASS
    epochs: tuple[int, int] = (60, 30)
    rates: tuple[float, ...] = (5e-4, 2e-3)
    seconds: float = 10.0
    anchor_images: int = BackboneConfig().anchor_images


@dataclass(frozen=True)
class Variant:
    """A backbone: what it begins as, and what becomes of it.

    Args:
        name: of it.
        parent: the variant whose last backbone it begins with; None: the shared weights.
        against: the variant that had the same training without any of this.
        linear: blocks whose attention is linear.
        tokens: share of the MACs that fewer tokens leave; None: all tokens.
        at: side of images in pixels that this share is of; the same shares of tokens stay at 140.
        merge: whether tokens that go are merged, not dropped.
        prune: share of the MACs that is pruned in one event behind the first round.
        int8: whether it is judged in 8 bits, too.
        once: whether one seed will do.
    """

    name: str
    parent: str | None = None
    against: str = "dense"
    linear: tuple[int, ...] = ()
    tokens: float | None = None
    at: int = SIDE
    merge: bool = True
    prune: float | None = None
    int8: bool = False
    once: bool = False

    def spec(self, like: ModelSpec) -> ModelSpec:
        """Of it, from the spec that it begins with."""
        changed = like.model_dump() | {"linear_blocks": self.linear or like.linear_blocks}
        spec = ModelSpec.model_validate(changed)
        if self.tokens is None:
            return spec
        fewer = with_tokens(spec_at(spec, self.at), self.tokens, merge=self.merge)
        return spec_at(fewer, like.image_size)


LARGE = 336
LONGER = "dense, trained on"
TOKENS, DROPPED = "tokens 0.65", "tokens 0.65, dropped"
PRUNED, SMALLEST = "pruned 0.5", "pruned 0.5, tokens 0.8"
BOTH = "linear 6 and 9, tokens 0.47"
VARIANTS = (
    Variant("dense", int8=True),
    Variant(TOKENS, tokens=0.65),
    Variant(BOTH, linear=(6, 9), tokens=0.47, at=LARGE),
    Variant(LONGER, parent="dense"),
    Variant(PRUNED, parent="dense", against=LONGER, prune=0.5),
    Variant(SMALLEST, parent=PRUNED, against=LONGER, tokens=0.8, int8=True),
    Variant(DROPPED, tokens=0.65, merge=False, once=True),
    Variant("tokens 0.5", tokens=0.5, once=True),
    Variant("tokens 0.35", tokens=0.35, once=True),
    Variant("linear 9, tokens 0.5", linear=(9,), tokens=0.5, at=LARGE, once=True),
    Variant("linear 6-10, tokens 0.5", linear=(6, 7, 8, 9, 10), tokens=0.5, at=LARGE, once=True),
    Variant("linear 0-2, tokens 0.65", linear=(0, 1, 2), tokens=0.65, at=LARGE, once=True),
)
"""The main ones, then a small frontier; MACs of the parent count where there is one."""


def named(name: str) -> Variant:
    """The variant of a name."""
    return next(one for one in VARIANTS if one.name == name)


def folder_of(scale: Scale, name: str, seed: int) -> Path:
    """Where a run keeps its last backbone."""
    return scale.root / f"seed{seed}" / name.replace(", ", "_").replace(" ", "_")


# --- a run -----------------------------------------------------------------------------------


def run(scale: Scale, name: str, seed: int) -> Cell:
    """One run to its end, judged on the whole test parts of its farms."""
    variant, folder = named(name), folder_of(scale, name, seed)
    if variant.parent and not (folder_of(scale, variant.parent, seed) / MODEL).is_file():
        run(scale, variant.parent, seed)
    plan = PlanConfig(warmup=0, max_drop_ratio=1.0)
    if variant.prune is not None:
        changes = {"prune_macs": variant.prune, "prune_events": 1, "rounds": scale.rounds + 1}
        plan = PlanConfig.model_validate(plan.model_dump() | changes)
    shutil.rmtree(folder, ignore_errors=True)  # of a cell that was killed
    judged = plants.play(
        TrainConfig(),
        scale.rounds + (variant.prune is not None),
        seed,
        farms=scale.farms,
        per_class=scale.per_class,
        probe=variant.parent is None,
        plan=plan,
        base=begin(scale, variant, seed),
        keep=folder,
        side=SIDE,
    )
    model, spec = backbone.load_backbone(folder / MODEL)
    cell = {
        "kind": "backbone",
        "model": name,
        "seed": seed,
        "spec": spec.to_json(),
        "macs": macs(spec),
        "parameters": parameters(model),
        "correct": judged.packed(),
    }
    return cell | ({"int8": in_8_bits(scale, folder / MODEL, seed)} if variant.int8 else {})


def begin(scale: Scale, variant: Variant, seed: int) -> Path:
    """What a run begins with, its anchors beside it."""
    if variant.parent is None:
        like = backbone.dense_spec(plants.NAME, SIDE)
        model = backbone.load_pretrained(like, str(plants.WEIGHTS))
    else:
        model, like = backbone.load_backbone(folder_of(scale, variant.parent, seed) / MODEL)
    spec = variant.spec(like)
    changed = backbone.build(spec)
    changed.load_state_dict(model.state_dict())
    path = scale.root / f"seed{seed}" / "begin" / "base.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    backbone.save_backbone(path, changed, spec)
    images = source_batches(plants.source(), spec, scale.anchor_images, seed)
    anchors = compute_anchors(changed, images, seed)
    path.with_name(ANCHORS_FILE).write_bytes(anchors.to_bytes())
    return path


# --- on devices ------------------------------------------------------------------------------


def farm_folder(scale: Scale, name: str, seed: int) -> FarmFolder:
    """A farm's images, as its runs have them."""
    config, state = plants.farm_config(scale.root / f"seed{seed}", name, seed, scale.per_class)
    state.mkdir(parents=True, exist_ok=True)
    return open_folder(
        config.farm.data, per_class=scale.per_class, seed=seed, cache=state / "images.json"
    )


def bundle_of(scale: Scale, path: Path, name: str, seed: int) -> tuple[PortableBundle, FarmFolder]:
    """A backbone with the classifier that a farm fits to it, as its devices get it."""
    model, spec = backbone.load_backbone(path)
    folder = farm_folder(scale, name, seed)
    classifier = fit.fit_classifier(*fit.extract(model, folder.fit, spec), len(folder.classes))
    about = PortableAbout(
        version=1,
        backbone=spec.name,
        width=spec.width,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        classes=folder.classes,
        temperature=1.0,
        threshold=0.0,
    )
    weight, bias = (one.detach().numpy() for one in (classifier.weight, classifier.bias))
    return PortableBundle(about, exported(model, spec.image_size), weight, bias), folder


def in_8_bits(scale: Scale, path: Path, seed: int) -> Cell:
    """The backbone in 8 bits at every farm, calibrated on its own images: which are right."""
    with plants.workers() as pool:
        work = partial(_farm_in_8_bits, scale, path, seed)
        found = dict(zip(scale.farms, pool.map(work, scale.farms), strict=True))
    return {
        "file_bytes": max(size for size, _ in found.values()),
        "correct": plants.packed_by({"model": {name: ok for name, (_, ok) in found.items()}}),
    }


def _farm_in_8_bits(scale: Scale, path: Path, seed: int, name: str) -> tuple[int, Flags]:
    bundle, folder = bundle_of(scale, path, name, seed)
    small = calibrated(bundle, folder.fit)
    return len(small.graph), judged(small, folder)


def judged(bundle: PortableBundle, folder: FarmFolder) -> Flags:
    """Which test images a bundle is right about, in ONNX Runtime."""
    classifier = Classifier(bundle, threads=1)
    batches = folder.open_test(Purpose.REPORT).batches(bundle.about, 32)
    found = [classifier.logits(x.numpy()).argmax(1) == y.numpy() for x, y in batches]
    return np.concatenate(found)


# --- what costs how much ---------------------------------------------------------------------


def attention_macs(spec: ModelSpec) -> int:
    """Of all heads: queries, keys, values, their products and the projection."""
    return sum(
        heads * head_macs(spec, count, block in spec.linear_blocks)
        for block, (heads, count) in enumerate(zip(spec.heads, tokens_by_block(spec), strict=True))
    )


def saved(variant: Variant, sides: Sequence[int]) -> list[Cell]:
    """What a variant saves of a dense backbone, by the side of images; nothing is trained."""
    found = []
    for side in sides:
        dense = backbone.dense_spec(plants.NAME, side)
        spec = variant.spec(dense)
        found.append(
            {
                "model": variant.name,
                "image_size": side,
                "macs": macs(spec),
                "saved": 1 - macs(spec) / macs(dense),
                "attention_saved": 1 - attention_macs(spec) / attention_macs(dense),
            }
        )
    return found
