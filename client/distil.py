"""A small convolutional network learns from what a farm serves with, on the farm's own images.

The teacher sees every augmented image that the student sees. The student that is right about most
of the decide part, of all epochs, is kept and calibrated there, as a version is.
"""

import copy
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from client.lesson import heeding
from client.portable import together
from client.serving import Bundle
from client.shadow import best_temperature, sure_from
from client.teacher import Teacher
from common import fit
from common.config import TrainConfig
from common.errors import ModelError
from common.export import exported
from common.heads import evaluation_mode
from common.images import FarmFolder, Part
from common.lesson import Terms
from common.portable import PortableBundle
from common.spec import ModelSpec
from common.student import Student

log = logging.getLogger(__name__)


class DistilConfig(Terms):
    """How a student learns from one farm's images."""

    student: str = Field(default="mobilenetv3_small_100", description="a timm network")
    weights: Path | None = Field(default=None, description="safetensors file; none: random")
    epochs: int = Field(default=60, ge=1, le=10_000)
    batch_size: int = Field(default=16, ge=8, le=1024)
    lr: float = Field(default=2e-3, gt=0, le=1, description="AdamW")
    weight_decay: float = Field(default=0.05, ge=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**32)


@dataclass(frozen=True, eq=False)
class Distilled:
    """A student with its classifier, and how often both it and its teacher are right.

    ``curve`` holds its accuracy on the decide part behind every epoch; ``accuracy`` is the best.
    """

    student: Student
    classifier: nn.Linear
    temperature: float
    threshold: float
    accuracy: float
    teacher_accuracy: float
    curve: tuple[float, ...]


def teach(
    teacher: Bundle, folder: FarmFolder, config: DistilConfig, *, autocast: bool = False
) -> Distilled:
    """Train a student on the fit part and choose its best epoch on the decide part.

    Raises:
        ModelError: an unknown student, or a teacher without a map.
        QualityError: training diverged.
        DataError: no image can be read.
    """
    spec = teacher.about.manifest.spec
    if teacher.about.classes != folder.classes:
        raise ModelError(
            "the farm's classes are others than those of the version in use; let it learn the next "
            "version first: fieldfed-client update"
        )
    student = Student(config.student, config.weights, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = nn.Linear(student.width, len(folder.classes))
    best = _Best(student, classifier, folder.decide, spec)
    steps = folder.fit.batch_count(config.batch_size, train=True)

    def look(step: fit.Step) -> None:
        if (step.number + 1) % steps == 0:
            best.look((step.number + 1) // steps, step.loss)

    asked = Teacher(teacher.model, spec, teacher.classifier)
    with ExitStack() as stack:
        fit.train_epochs(
            student,
            classifier,
            folder.fit,
            spec,
            TrainConfig(
                lr=config.lr,
                classifier_lr=config.lr,
                batch_size=config.batch_size,
                weight_decay=config.weight_decay,
            ),
            trainable=[name for name, _ in student.named_parameters()],
            seed=config.seed,
            autocast=autocast,
            penalty=heeding(stack, config, asked, student, classifier, autocast=autocast),
            epochs=config.epochs,
            on_step=look,
        )
    return best.calibrated(teacher)


class _Best:
    """The student of the epoch that was right most often on the decide part, the first of them."""

    def __init__(
        self, student: Student, classifier: nn.Linear, part: Part, spec: ModelSpec
    ) -> None:
        self._student, self._classifier, self._part, self._spec = student, classifier, part, spec
        self._curve: list[float] = []
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def look(self, epoch: int, loss: float) -> None:
        """Judge what there is, and keep it if it is the best so far."""
        with evaluation_mode(self._student, self._classifier):
            found = fit.evaluate(self._classifier, *self._extract(self._student))
        log.info("epoch %d: loss %.3f, decide accuracy %.3f", epoch, loss, found.accuracy)
        if found.accuracy > max(self._curve, default=-1.0):
            modules = self._student.state_dict(), self._classifier.state_dict()
            self._kept = copy.deepcopy(modules[0]), copy.deepcopy(modules[1])
        self._curve.append(found.accuracy)

    def calibrated(self, teacher: Bundle) -> Distilled:
        """With temperature and threshold, and the teacher judged on the same images."""
        assert self._kept is not None
        self._student.load_state_dict(self._kept[0])
        self._classifier.load_state_dict(self._kept[1])
        self._student.eval()
        features, labels = self._extract(self._student)
        with torch.inference_mode():
            logits = self._classifier(features)
        temperature = best_temperature(logits, labels)
        threshold = sure_from(logits / temperature, labels)
        judged = fit.evaluate(teacher.classifier, *self._extract(teacher.model))
        return Distilled(
            self._student,
            self._classifier,
            temperature,
            threshold,
            max(self._curve),
            judged.accuracy,
            tuple(self._curve),
        )

    def _extract(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        return fit.extract(model, self._part, self._spec)


def portable_student(made: Distilled, teacher: Bundle) -> PortableBundle:
    """A student as ONNX and numbers; raises ModelError where ONNX Runtime says something else."""
    about = teacher.about.model_copy(
        update={"temperature": made.temperature, "threshold": made.threshold}
    )
    graph = exported(made.student, about.manifest.spec.image_size)
    return together(about, made.student.name, made.student, graph, made.classifier)
