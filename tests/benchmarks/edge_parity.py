"""Whether ONNX Runtime says what torch says: logits of every kind of backbone on real images.

All test images of the first farm, with the classifier that the farm fits, in fp32. Where tokens are
chosen, two pairs of tokens can be alike to the last bit, and each way of adding up chooses its own;
such an image is outside of the bound, and counted. So are those on which torch in fp32 is outside
of it against torch in fp64: what no export can mend.
"""

from pathlib import Path

import numpy as np
import torch

from common import backbone
from common.export import TOLERANCE
from common.images import Purpose
from common.pixels import Floats
from common.runtime import Runtime
from tests.benchmarks.cells import Cell
from tests.benchmarks.edge_runs import (
    BOTH,
    DROPPED,
    MODEL,
    PRUNED,
    SMALLEST,
    TOKENS,
    Scale,
    Variant,
    begin,
    bundle_of,
    folder_of,
    run,
)

KINDS = ("dense", PRUNED, TOKENS, DROPPED, BOTH, SMALLEST)
LINEAR = Variant("linear 6 and 9", linear=(6, 9))
"""Alone, nothing trained: how two programs add up does not depend on it."""


def parity_cell(scale: Scale) -> Cell:
    """Every kind, in the first seed."""
    seed, found = scale.seeds[0], []
    for name in KINDS:
        path = folder_of(scale, name, seed) / MODEL
        if not path.is_file():
            run(scale, name, seed)
        found.append({"model": name, **parity(scale, path, seed)})
    found.append({"model": LINEAR.name, **parity(scale, begin(scale, LINEAR, seed), seed)})
    return {"kind": "parity", "rows": found}


@torch.inference_mode()
def parity(scale: Scale, path: Path, seed: int) -> Cell:
    """Of one backbone: the largest difference, and on how many images it is within the bound."""
    bundle, folder = bundle_of(scale, path, scale.farms[0], seed)
    model, spec = backbone.load_backbone(path)
    runtime = Runtime(bundle.graph)

    def logits(features: Floats) -> Floats:
        said: Floats = features @ bundle.weight.T + bundle.bias
        return said

    images = [x for x, _ in folder.open_test(Purpose.REPORT).batches(spec, 32)]
    plain = np.concatenate([logits(model(x).numpy()) for x in images])
    ours = np.concatenate([logits(runtime.features(x.numpy())) for x in images])
    precise = model.double()
    exact = np.concatenate([logits(precise(x.double()).numpy()) for x in images])
    worst, largest = np.abs(ours - plain).max(axis=1), float(np.abs(plain).max())
    bound = TOLERANCE * max(1.0, largest)
    return {
        "images": len(worst),
        "within": int((worst <= bound).sum()),
        "torch_within_of_fp64": int((np.abs(plain - exact).max(axis=1) <= bound).sum()),
        "bound": bound,
        "worst": float(worst.max()),
        "largest_logit": largest,
        "other_answers": int((ours.argmax(1) != plain.argmax(1)).sum()),
    }
