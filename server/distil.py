"""Federated distillation: a run in which farms teach one student together.

The teacher is what an earlier run has come to. The run begins with a report on it, which brings it
to every farm as any base comes there; after that the round loop goes on as always, with the student
for its base. A farm teaches its copy on its own images (cross-entropy with its own classifier, the
teacher's soft answers and maps) and sends the coded change of all parameters; the server averages
them (FedAvg) and every farm reaches the same next student. The record of the run says of masks and
units what is true of the teacher, which does not change; MACs are the student's over the teacher's.

Statistics of batch normalisation take no part in any of this (common/student.py).
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save as save_tensors

from common.backbone import macs
from common.codec import Bits
from common.config import ServerConfig, TrainConfig
from common.errors import ConfigError, StateError
from common.export import exported, require_parity
from common.files import write_atomically
from common.messages import Reply
from common.plan import PlanConfig
from common.runtime import Runtime
from common.spec import ModelSpec
from common.step import Step
from common.student import Student, recalibrate, student_macs, student_spec
from common.trainable import trainable_set
from server.close import Base, RoundCloser, Work
from server.collect import Verdict
from server.intake import Intake
from server.models import Models
from server.pretrain import source_batches
from server.rounds import RoundLoop
from server.rows import CandidateRow, RunRow, VerdictRow
from server.settings import RunSettings, Taught
from server.store import Store

log = logging.getLogger(__name__)

UPDATE_BITS: Bits = 8


# --- before the run ------------------------------------------------------------------------------


def lesson_settings(
    config: ServerConfig, models: Models, teacher: str, label: str = "student"
) -> RunSettings:
    """The settings of a run in which farms teach the student of ``[distil]``; it is kept.

    Args:
        config: of the server; its plan and training are of backbones and count for nothing here.
        models: of the server.
        teacher: digest of a backbone that is kept there.
        label: of the closing report.

    Raises:
        ModelError: timm does not know the student, it is no convolutional network, or the weights
            are not its own.
        ConfigError: the teacher has no map to learn from, or is no larger than the student.
        StateError: the teacher is absent or damaged.
    """
    terms = config.distil
    _, spec = models.view(teacher)
    if terms.beta > 0:
        _require_map(spec)
    student = Student(terms.name, terms.weights, config.seed)
    described = student_spec(student, spec)
    if student_macs(described) >= macs(spec):
        raise ConfigError(
            f"the student ({terms.name}, {student_macs(described) / 1e6:.0f} million MACs per "
            f"image) costs as much as its teacher ({macs(spec) / 1e6:.0f} million); name a smaller "
            "one in [distil], or with --student"
        )
    digest = models.save(student, described)
    train = TrainConfig(
        trainable="full",
        epochs=terms.epochs,
        batch_size=terms.batch_size,
        lr=terms.lr,
        classifier_lr=terms.lr,
        weight_decay=terms.weight_decay,
        dal_weight=0.0,
        update_bits=UPDATE_BITS,
    )
    changes = {"plan": PlanConfig(rounds=terms.rounds), "train": train, "recovery": None}
    changed = config.model_copy(update=changes)
    return RunSettings(config=changed, label=label, taught=Taught(teacher=teacher, student=digest))


def _require_map(teacher: ModelSpec) -> None:
    if teacher.kept_tokens:
        raise ConfigError(
            f"the teacher ({teacher.name}) drops tokens, so there is no map of where it looks; set "
            "distil.beta = 0"
        )


def last_teacher(store: Store, number: int | None = None) -> str:
    """What a run has come to, by default the last that has come to a backbone.

    Raises:
        StateError: there is none yet, or that run has none.
    """
    runs = store.runs() if number is None else [store.run(number)]
    for run in reversed(runs):
        over = run.state == "done" or (number is not None and run.state != "running")
        last = store.last_committed(run.run) if over and not taught_in(run) else None
        if last is not None:
            return last[1].digest
    which = "no run" if number is None else f"run {number}"
    raise StateError(
        f"no teacher yet: {which} has ended with a backbone; run one to its end with: "
        "fieldfed-server train"
    )


def taught_in(run: RunRow) -> Taught | None:
    """Who taught whom in a run; None where the backbone itself was aligned."""
    values = json.loads(run.config_json).get("taught")
    return None if values is None else Taught.model_validate(values)


# --- the run -------------------------------------------------------------------------------------


class PupilIntake(Intake):
    """Leaves farms out whose release knows of no students."""

    def active(self) -> list[int]:
        """As always, of those that can be asked."""
        return [node for node in super().active() if self._requests.can_learn(node)]

    def _welcome(self, node: int, attempt: int, reply: Reply, size: int) -> Verdict:
        verdict = super()._welcome(node, attempt, reply, size)
        if verdict is Verdict.ACCEPTED and not self._requests.can_learn(node):
            log.warning(
                "farm %s is not asked: its release knows of no students; upgrade it",
                self.farms[node],
            )
        return verdict


class StudentCloser(RoundCloser):
    """Ends a round with the next student."""

    def close(
        self,
        run: int,
        work: Work,
        rule: object = None,
        verdict: VerdictRow | None = None,
    ) -> Base:
        """Average, commit; returns the next base. Nothing is cut, so nothing is judged."""
        assert rule is None
        assert verdict is None
        replies = self._store.replies(run, work.number)
        readers = [self._spool.open(row.spooled) for row in replies]
        student, spec = self._models.load_student(work.base.digest)
        trained = trainable_set(student, self._config.train.trainable)
        update, change, lost = self._update(run, work, replies, readers, trained)
        trained.add(student, change)
        digest = self._models.save(student, spec, Step(update).to_bytes())
        if lost.any():
            self._residuals.save(run, digest, lost)
        mask = work.base.mask
        candidate = self._candidate(student, spec, digest, work.base.digest, mask)
        self._commit(run, work.number, candidate, mask, replies, [], None)
        return Base(digest, mask)


class DistilLoop(RoundLoop):
    """One run in which a student is taught."""

    intake: ClassVar[type[Intake]] = PupilIntake
    closer: ClassVar[type[RoundCloser]] = StudentCloser

    def _base_after(self, number: int) -> Base:
        """The student as it begins is the base of the first round."""
        taught = self._settings.taught
        assert taught is not None
        return (
            Base(taught.student, self._start.mask) if number == 0 else super()._base_after(number)
        )

    def _first_reports(self) -> None:
        self._require_pupils()
        super()._first_reports()

    def _gather(self, work: Work) -> bool:
        self._participants.meet()
        self._hand_out_teacher()
        return super()._gather(work)

    def _asked(self, number: int) -> list[int]:
        self._require_pupils()
        return super()._asked(number)

    def _hand_out_teacher(self) -> None:
        """Farms that came later, or have lost the teacher, get it by a report on it."""
        online, teacher = set(self._link.online()), self._start.digest
        lacking = [
            node
            for node in self._intake.active()
            if node in online and not self._requests.holds(node, teacher)
        ]
        if lacking:
            self._report("probe", 0, self._start, nodes=lacking)

    def _require_pupils(self) -> None:
        if self._intake.farms and not any(map(self._requests.can_learn, self._intake.farms)):
            raise StateError(
                "the release of every farm is too old to teach a student; upgrade fieldfed there"
            )


# --- what an operator gets -----------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The student that a run has come to."""

    run: int
    round: int
    taught: Taught
    candidate: CandidateRow


def last_student(store: Store, number: int | None = None) -> Found:
    """The student of a run, by default of the last that has one.

    Raises:
        StateError: there is none yet, or that run has none.
    """
    runs = store.runs() if number is None else [store.run(number)]
    for run in reversed(runs):
        taught, last = taught_in(run), store.last_committed(run.run)
        if taught is not None and last is not None:
            return Found(run.run, last[0], taught, last[1])
    which = "no run" if number is None else f"run {number}"
    raise StateError(
        f"no student yet: {which} has ended a round with one; begin with: fieldfed-server distil"
    )


def write_student(config: ServerConfig, models: Models, found: Found, out: Path) -> dict[str, Any]:
    """Write a student as files that need no fieldfed; returns what is said beside it.

        model.safetensors   under the names that timm has for them
        model-fp32.onnx     the same as a graph, where there are source images
        student.json        where it comes from

    Without source images there are no statistics of batch normalisation: whoever uses the weights
    has to find them on images of their own.

    Raises:
        StateError: the student is absent or damaged.
        DataError: the source images cannot be used.
        ModelError: ONNX Runtime says something else.
        DiskError: the disk is full.
    """
    student, spec = models.load_student(found.candidate.digest)
    source = config.backbone.source
    out.mkdir(parents=True, exist_ok=True)
    tensors = dict(student.network.named_parameters())
    if source is not None:
        count, seed = config.backbone.anchor_images, config.seed
        recalibrate(student, source_batches(source, spec, count, seed))
        graph = exported(student, spec.image_size)
        require_parity(student, spec.image_size, Runtime(graph))
        write_atomically(out / "model-fp32.onnx", graph)
        tensors = student.network.state_dict()
    plain = {name: one.detach().contiguous() for name, one in tensors.items()}
    write_atomically(out / "model.safetensors", save_tensors(plain))
    about = {
        "run": found.run,
        "round": found.round,
        "student": found.candidate.digest,
        "teacher": found.taught.teacher,
        "spec": json.loads(spec.to_json()),
        "macs": found.candidate.macs,
        "params": found.candidate.params,
        "statistics": "none" if source is None else "of the source species",
    }
    write_atomically(out / "student.json", json.dumps(about, indent=2, sort_keys=True).encode())
    return about
