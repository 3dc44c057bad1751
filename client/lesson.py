"""A student is taught on a farm's images: what local and federated distillation have in common.

    loss = cross-entropy + alpha T^2 KL(teacher || student) + beta |maps|^2   (common/distil.py)

The teacher answers every augmented image that the student has just seen, with the classifier that
the farm has fitted to it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
from torch import Tensor, nn

from client.align import Aligned
from client.teacher import Teacher, teaching
from common import distil
from common.config import TrainConfig
from common.fit import train_epochs
from common.images import Part
from common.lesson import Terms
from common.pixels import Input
from common.student import Student
from common.trainable import trainable_set

CALIBRATION_BATCH = 64


def heeding(
    stack: ExitStack,
    terms: Terms,
    teacher: Teacher,
    student: Student,
    classifier: nn.Linear,
    *,
    autocast: bool,
) -> Callable[[], Tensor] | None:
    """Alpha T^2 KL + beta |maps|^2 of the images that the student has just seen, a scalar.

    It is good while the stack is open. None: of labels alone nobody is asked.

    Raises:
        ModelError: the maps of a teacher that has none are to be heeded.
    """
    if terms.alpha == terms.beta == 0:
        return None
    soft = stack.enter_context(
        teaching(
            student,
            classifier,
            teacher,
            weight=terms.alpha,
            temperature=terms.temperature,
            autocast=autocast,
        )
    )
    if terms.beta == 0:
        return soft
    maps = stack.enter_context(distil.attention_map(teacher.model, teacher.spec))

    def with_maps() -> Tensor:
        total = soft()  # has the teacher look
        return total + terms.beta * distil.map_distance(student.map.float(), maps[0].float())

    return with_maps


def be_taught(
    student: Student,
    classifier: nn.Linear,
    teacher: Teacher,
    part: Part,
    config: TrainConfig,
    terms: Terms,
    *,
    seed: int,
    autocast: bool,
    max_steps: int | None = None,
) -> Aligned:
    """Teach all parameters of a student, and the farm's classifier of it, for one round.

    Args:
        student: left taught; its statistics are then those of training, and to be set anew.
        classifier: private (C) -> (K); left taught along.
        teacher: is asked, and not changed.
        part: the fit part.
        config: rates and epochs.
        terms: weights of what the teacher says.
        seed: of order and augmentation.
        autocast: forward in bfloat16.
        max_steps: ends earlier.

    Raises:
        ModelError: the teacher has no map.
        QualityError: the loss is no longer finite.
        DataError: none of the images can be read.
    """
    chosen = trainable_set(student, config.trainable)
    parameters = dict(student.named_parameters())
    start = {name: parameters[name].detach().clone() for name in chosen.layout.names}
    with ExitStack() as stack:
        log = train_epochs(
            student,
            classifier,
            part,
            teacher.spec,
            config,
            trainable=chosen.layout.names,
            seed=seed,
            autocast=autocast,
            penalty=heeding(stack, terms, teacher, student, classifier, autocast=autocast),
            epochs=config.epochs,
            max_steps=max_steps,
        )
    changes = {name: parameters[name].detach() - before for name, before in start.items()}
    delta = chosen.layout.flatten(changes)
    return Aligned(chosen, delta, log.loss, 0.0, log.steps, log.seconds)


def calibration_batches(part: Part, spec: Input) -> Iterator[Tensor]:
    """Images of a part (B,3,S,S) as they are, mixed: a part has them class by class."""
    order = np.random.default_rng(0).permutation(len(part))
    mixed = Part(tuple(part.paths[index] for index in order), part.labels[order])
    for images, _ in mixed.batches(spec, CALIBRATION_BATCH):
        yield images
