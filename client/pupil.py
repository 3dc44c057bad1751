"""The student that farms have taught together, made ready with what is this farm's alone."""

from dataclasses import dataclass

import torch
from torch import nn

from client.base import Base, classifier_of
from client.lesson import calibration_batches
from client.portable import joined
from client.shadow import best_temperature, sure_from
from client.state import FarmState
from common import fit
from common.errors import StateError
from common.export import exported
from common.images import FarmFolder
from common.portable import PortableAbout, PortableBundle
from common.spec import Spec
from common.student import recalibrate


@dataclass(frozen=True, eq=False)
class Made:
    """A student as a bundle, and how often it is right on the decide part."""

    bundle: PortableBundle
    name: str
    digest: str
    accuracy: float


def portable_pupil(state: FarmState, folder: FarmFolder, version: int) -> Made:
    """The newest student with statistics, classifier and calibration of a farm's own images.

    Args:
        state: of the farm.
        folder: its images.
        version: that the bundle names, of what the device serves with beside it.

    Raises:
        StateError: the farm has taught none yet.
        DataError: images cannot be read.
        ModelError: ONNX Runtime says something else.
    """
    base = _newest(state)
    student, spec = base.student()
    recalibrate(student, calibration_batches(folder.fit, spec))
    classifier = classifier_of(state, folder, base)
    bundle, accuracy = calibrated_bundle(student, spec, classifier, folder, version)
    return Made(bundle, spec.name, base.digest, accuracy)


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


def _newest(state: FarmState) -> Base:
    for digest in state.students():
        held = state.load_student(digest)
        if held is not None:
            return Base(*held, digest)
    raise StateError(
        "this farm has taught no student yet; the server's operator begins with: "
        "fieldfed-server distil"
    )
