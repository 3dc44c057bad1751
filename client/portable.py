"""From what a farm's trainer serves with to one file for its devices without torch."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from client.infer import Classifier
from client.served import About
from client.serving import Bundle, Serving
from client.shadow import best_temperature, sure_from
from common import fit
from common.errors import DataError, FieldfedError, QualityError
from common.export import exported, graph_of, require_parity, whole
from common.images import FarmFolder, Part
from common.int8 import quantised
from common.logs import start_logging
from common.portable import PortableAbout, PortableBundle
from common.runtime import Runtime
from common.spec import Spec

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
BATCH = 32
MAX_DROP = 0.02
"""Of accuracy on the decide part that 8 bits may cost: on few images one of them is more."""


def portable(bundle: Bundle, serving: Serving) -> PortableBundle:
    """A bundle as ONNX and numbers.

    Raises:
        ModelError: the backbone cannot be written as ONNX, or does something else there.
    """
    spec, tensors = bundle.about.manifest.spec, bundle.about.manifest.tensors
    graph = whole(graph_of(bundle.model, spec, tensors), serving.objects.folder)
    return together(bundle.about, spec.name, bundle.model, graph, bundle.classifier)


def together(
    about: About, name: str, model: nn.Module, graph: bytes, classifier: nn.Linear
) -> PortableBundle:
    """A network, its graph and a classifier as a bundle.

    Args:
        about: the version that it is of, with classes, temperature and threshold.
        name: of the network.
        model: takes images of the version's side to features.
        graph: of the model, its numbers inside.
        classifier: of these features.

    Raises:
        ModelError: ONNX Runtime says something else than the model.
    """
    spec = about.manifest.spec
    described = PortableAbout(
        version=about.manifest.counter,
        backbone=name,
        width=classifier.in_features,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        classes=about.classes,
        temperature=about.temperature,
        threshold=about.threshold,
    )
    return joined(described, model, graph, classifier)


def joined(
    about: PortableAbout, model: nn.Module, graph: bytes, classifier: nn.Linear
) -> PortableBundle:
    """The same, described already; raises as :func:`together` does."""
    require_parity(model, about.image_size, Runtime(graph))
    return PortableBundle(
        about, graph, classifier.weight.detach().numpy(), classifier.bias.detach().numpy()
    )


def calibrated_bundle(
    network: nn.Module, spec: Spec, classifier: nn.Linear, folder: FarmFolder, version: int
) -> tuple[PortableBundle, float]:
    """A network with a farm's classifier, calibrated on its decide part, and its accuracy there.

    Args:
        network: of images to features.
        spec: of the network.
        classifier: of these features.
        folder: the farm's images.
        version: that the bundle names.

    Raises:
        DataError: images cannot be read.
        ModelError: ONNX Runtime says something else.
    """
    features, labels = fit.extract(network, folder.decide, spec)
    with torch.inference_mode():
        logits = classifier(features)
    temperature = best_temperature(logits, labels)
    about = PortableAbout(
        version=version,
        backbone=spec.name,
        width=spec.width,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        classes=folder.classes,
        temperature=temperature,
        threshold=sure_from(logits / temperature, labels),
    )
    bundle = joined(about, network, exported(network, spec.image_size), classifier)
    return bundle, fit.evaluate_logits(logits, labels).accuracy


def in_8_bits(bundle: PortableBundle, folder: FarmFolder) -> PortableBundle:
    """The same in 8 bits, calibrated on the fit part and judged on the decide part.

    Raises:
        QualityError: it is right about fewer images than is worth it.
        DataError: no image to calibrate on, or to judge by, can be read.
    """
    small = calibrated(bundle, folder.fit)
    before, after = (right(Classifier(one), folder) for one in (bundle, small))
    log.info("right about %.3f of the decide part in 8 bits, %.3f in fp32", after, before)
    if after < before - MAX_DROP:
        raise QualityError(
            f"in 8 bits it is right about {after:.3f} of the decide part, in fp32 about "
            f"{before:.3f}; write it without --int8"
        )
    return small


def calibrated(bundle: PortableBundle, part: Part) -> PortableBundle:
    """The same in 8 bits, calibrated on some images of a part, and not judged.

    Raises:
        DataError: not one of them can be read.
    """
    about = bundle.about
    images = [image.numpy() for image, _ in _some(part).batches(about, 1)]
    if not images:
        raise DataError(f"not one of the {len(part)} images to calibrate on can be read")
    return PortableBundle(
        about.model_copy(update={"precision": "int8"}),
        quantised(bundle.graph, images),
        bundle.weight,
        bundle.bias,
    )


def right(classifier: Classifier, folder: FarmFolder) -> float:
    """Share of the readable images of the decide part that a classifier is right about.

    Raises:
        DataError: not one of them can be read.
        ModelError: the bundle cannot be run.
    """
    known, right_ones, seen = np.array(classifier.about.classes), 0, 0
    for images, labels in folder.decide.batches(classifier.about, BATCH):
        said = known[classifier.logits(images.numpy()).argmax(1)]
        right_ones += int((said == np.array(folder.classes)[labels.numpy()]).sum())
        seen += len(labels)
    if not seen:
        raise DataError(f"not one of the {len(folder.decide)} images to judge by can be read")
    return right_ones / seen


def _some(part: Part) -> Part:
    """A few images of a part, the same ones each time."""
    chosen = np.random.default_rng(0).permutation(len(part))[:CALIBRATION_IMAGES]
    return Part(tuple(part.paths[index] for index in chosen), part.labels[chosen])


def write_portable(
    serving: Serving, out: Path, folder: Callable[[], FarmFolder] | None = None
) -> PortableAbout:
    """Write what a device serves with to a file.

    Args:
        serving: of the device.
        out: the file.
        folder: opens the farm's images, for 8 bits; None: fp32.

    Raises:
        StateError: it serves with nothing yet.
        ModelError: as :func:`portable` does.
        QualityError, DataError: as :func:`in_8_bits` does.
        DiskError: the disk is full.
    """
    made = portable(serving.in_use(), serving)
    if folder is not None:
        made = in_8_bits(made, folder())
    made.write(out)
    return made.about


def main() -> int:
    """The program ``portable SERVING OUT``: returns its exit status."""
    start_logging()
    try:
        write_portable(Serving(Path(sys.argv[1])), Path(sys.argv[2]))
    except FieldfedError as error:
        log.error("%s", error)
        return error.exit_code
    return 0
