"""The student that farms have taught together, made ready with what is this farm's alone."""

from dataclasses import dataclass

from client.base import Base, classifier_of
from client.lesson import calibration_batches
from client.portable import calibrated_bundle
from client.state import FarmState
from common.errors import StateError
from common.images import FarmFolder
from common.portable import PortableBundle
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


def _newest(state: FarmState) -> Base:
    for digest in state.students():
        held = state.load_student(digest)
        if held is not None:
            return Base(*held, digest)
    raise StateError(
        "this farm has taught no student yet; the server's operator begins with: "
        "fieldfed-server distil"
    )
