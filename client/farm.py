"""A farm at work: from a request to its reply. Images and the classifier stay in here.

For each request the farm brings its copy of the backbone up to date, refits its private
classifier to it, evaluates, aligns, scores, codes the update, writes the reply to disk and only
then answers. Asked the same again, it answers from disk.
"""

import hashlib
import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from client import traffic
from client.align import Aligned, align
from client.base import Base, MissingBaseError, brought_up, newest_base
from client.bodies import can_fetch
from client.criteria import Scoring, score
from client.lesson import be_taught, calibration_batches
from client.privacy import Curtain
from client.residual import Coded, carried, encode
from client.scores import FarmScores
from client.state import FarmState
from client.teacher import Asked, Teacher, teacher_of
from client.turns import turn
from common import codec, fit, moments
from common.anchors import Anchors
from common.config import FarmConfig
from common.errors import (
    ConfigError,
    DataError,
    DiskError,
    ModelError,
    ProtocolError,
    QualityError,
    StateError,
)
from common.images import FarmFolder, Purpose, open_folder
from common.logs import bound
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Lesson,
    Refusal,
    Reply,
    Request,
    Work,
    spoken,
)
from common.precision import bf16_supported
from common.scores import encode_neurons
from common.student import Student, recalibrate
from common.surgery import collect_moments
from common.trainable import TrainableSet

log = logging.getLogger(__name__)

MOMENTS_BATCH = 32


class Farm:
    """One farm: its settings, images and state."""

    def __init__(self, config: FarmConfig, folder: FarmFolder, state: FarmState) -> None:
        self.name, self._settings = config.farm.name, config.farm
        self._folder = folder
        self._state = state
        self._autocast = config.farm.precision == "bf16" or (
            config.farm.precision == "auto" and bf16_supported()
        )

    @classmethod
    def open(cls, config: FarmConfig, state_dir: Path) -> "Farm":
        """Open the image folder and the state of a farm; raises DataError."""
        if config.farm.threads:
            torch.set_num_threads(config.farm.threads)
        state = FarmState(state_dir)
        folder = open_folder(
            config.farm.data,
            per_class=config.farm.per_class,
            seed=config.farm.seed,
            cache=state_dir / "images.json",
        )
        return cls(config, folder, state)

    def handle(self, request: Request) -> Reply:
        """Answer a request, in its protocol; what cannot be done is refused, with the reason."""
        return spoken(self._handled(request), request.protocol)

    def _handled(self, request: Request) -> Reply:
        try:
            if isinstance(request, HelloRequest):
                return self._hello()
            with (
                bound(run=request.run, round=request.round, farm=self.name),
                turn(self._settings.turns, self._settings.places),
            ):
                return self._work(request)
        except MissingBaseError as error:
            return Refusal(reason="missing_base", detail=str(error))
        except DataError as error:
            log.error("%s", error)
            return Refusal(reason="data", detail=f"{self.name}: its image folder cannot be used")
        except (ProtocolError, ModelError, ConfigError) as error:
            return Refusal(reason="bad_request", detail=str(error)[:500])
        except QualityError as error:
            return Refusal(reason="internal", detail=str(error)[:500])
        except StateError as error:  # its text names folders: it stays in the farm's own log
            log.error("%s", error)
            detail = f"{self.name}: its disk is full or its state folder cannot be used"
            return Refusal(reason="internal", detail=detail)

    def _work(self, request: Asked) -> Reply:
        work = request.kind if isinstance(request, AlignRequest) else request.label
        cached = self._state.load_reply(request, work)
        if isinstance(cached, AlignReply | EvaluateReply):
            log.info("run %d round %d: answered from disk", request.run, request.round)
            if request.body is not None:  # what it stands on may be lost, and is what is wanted
                brought_up(self._state, request, self.name)
            counted = traffic.fields(self._state.folder)
            return cached.model_copy(update={"attempt": request.attempt, **counted})
        reply: AlignReply | EvaluateReply
        lost = None
        if isinstance(request, AlignRequest):
            reply, lost = self._align(request)
        else:
            reply = self._evaluate(request)
        try:
            self._state.save_reply(request, work, reply, lost)
        except DiskError as error:  # the work is done: better sent without a copy than not at all
            log.error("%s", error)
        # counted now, and now again when the reply is sent again: the counters never go backwards
        return reply.model_copy(update=traffic.fields(self._state.folder))

    def report(self) -> dict[str, str | int | float]:
        """Accuracy of the newest backbone on the test part, for the farm's own eyes.

        Raises:
            StateError: the farm has not received a backbone yet.
        """
        base = newest_base(self._state, f"farm {self.name}")
        judged = self._judge_own(base)
        return {
            "farm": self.name,
            "base": base.digest,
            "accuracy": judged.accuracy,
            "f1": judged.f1,
            "examples": len(judged.correct),
        }

    def _hello(self) -> HelloReply:
        return HelloReply(
            farm=self.name,
            examples=len(self._folder.fit),
            classes=len(self._folder.classes),
            held=self._state.held(),
            hub=can_fetch(self._state.folder),
        )

    # --- one round -------------------------------------------------------------------------

    def _align(self, request: AlignRequest) -> tuple[AlignReply, codec.Floats | None]:
        """The reply and what coding lost of its update."""
        started = time.monotonic()
        private = Curtain.of(request, self._state.folder, self._settings)
        base, anchors = self._bring_up(request), self._anchors(request)
        classifier = self._refit(base)
        judged = self._judge(base, classifier)
        scores = self._score(request, base, classifier, anchors)
        sent = self._moments(request, base)
        aligned = self._learn(request, base, classifier, anchors)
        delta = aligned.delta
        if private is not None:
            delta = private.update(delta)
            scores = None if scores is None else private.scores(scores)
        coded = self._encode(request, aligned.trained, delta)
        log.info(
            "%s round %d: decide accuracy %.3f, loss %.3f, %d steps",
            *(self.name, request.round, judged.accuracy, aligned.loss, aligned.steps),
        )
        reply = AlignReply(
            **request.identity(),
            farm=self.name,
            examples=len(self._folder.fit),
            accuracy=judged.accuracy,
            f1=judged.f1 if private is None else 0.0,
            loss=aligned.loss if private is None else 0.0,
            dal=aligned.dal if private is None else 0.0,
            steps=aligned.steps,
            train_seconds=aligned.seconds,
            seconds=time.monotonic() - started,
            update=coded.update,
            head_importance=scores.head_importance if scores else None,
            head_mmd2=scores.head_mmd2 if scores else None,
            neuron_importance=encode_neurons(scores.neuron_importance) if scores else None,
            moments=sent,
        )
        return reply, coded.lost

    def _encode(self, request: AlignRequest, trained: TrainableSet, delta: codec.Floats) -> Coded:
        """What was learned, and what earlier replies left behind, as one coded update."""
        rest = carried(self._state, request, trained)
        values = delta if rest is None else delta + rest
        seed = self._seed(request, request.round)
        return encode(values, request.train, request.base, trained.rank, seed)

    def _score(
        self, request: AlignRequest, base: Base, classifier: nn.Linear, anchors: Anchors | None
    ) -> FarmScores | None:
        """Scores of the shared backbone, where they are asked for.

        Before alignment: once the classifier has learnt its images by heart, the few that it still
        misses would decide which heads matter.
        """
        if request.criterion is None:
            return None
        model, spec = base.transformer()
        scoring = Scoring(
            model=model,
            spec=spec,
            classifier=classifier,
            part=self._folder.fit,
            batch_size=request.train.batch_size,
            anchors=anchors,
            seed=_seed_of(request.seed, request.round),
            autocast=self._autocast,
        )
        return score(request.criterion, scoring)

    def _moments(self, request: AlignRequest, base: Base) -> codec.Bytes | None:
        """Second moments of the shared backbone on the fit part, where they are asked for."""
        if request.moments is None:
            return None
        model, spec = base.transformer()
        with torch.inference_mode():
            batches = self._folder.fit.batches(spec, MOMENTS_BATCH)
            chosen = (images for images, _ in batches)
            neurons = request.moments == "all"
            found = collect_moments(model, chosen, neurons, self._autocast)
        return moments.pack(found, request.moments)

    def _learn(
        self, request: AlignRequest, base: Base, classifier: nn.Linear, anchors: Anchors | None
    ) -> Aligned:
        if request.lesson is not None:
            return self._be_taught(request, request.lesson, base, classifier)
        model, spec = base.transformer()
        return align(
            model,
            classifier,
            self._folder.fit,
            spec,
            request.train,
            anchors,
            seed=self._seed(request, request.round),
            autocast=self._autocast,
            max_steps=request.steps,
            teacher=teacher_of(
                self._state, request, spec, lambda *held: self._classifier_of(Base(*held))
            ),
        )

    def _be_taught(
        self, request: AlignRequest, lesson: Lesson, base: Base, classifier: nn.Linear
    ) -> Aligned:
        student, _ = base.student()
        held = self._state.load_backbone(lesson.teacher)
        if held is None:
            raise MissingBaseError(f"{self.name} does not hold the teacher {lesson.teacher[:12]}")
        teacher = Base(*held, lesson.teacher)
        return be_taught(
            student,
            classifier,
            Teacher(*held, self._classifier_of(teacher)),
            self._folder.fit,
            request.train,
            lesson,
            seed=self._seed(request, request.round),
            autocast=self._autocast,
            max_steps=request.steps,
        )

    def _anchors(self, request: AlignRequest) -> Anchors | None:
        """The anchors that the request names, from it or from disk."""
        digest, anchors = request.anchors_digest, None
        if digest is None:
            return None
        if request.anchors is not None:
            if hashlib.sha256(request.anchors.data).hexdigest() != digest:
                raise ProtocolError("the anchors are not those that the request names")
            anchors = Anchors.from_bytes(request.anchors.tobytes())
            self._state.save_anchors(digest, request.anchors)
        else:
            anchors = self._state.load_anchors(digest)
        if anchors is None:
            raise MissingBaseError(f"{self.name} does not hold anchors {digest[:12]}")
        return anchors

    # --- a report --------------------------------------------------------------------------

    def _evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        started = time.monotonic()
        base = self._bring_up(request)
        for number in range(1, request.local_rounds + 1):
            model, spec = base.transformer()
            align(
                model,
                self._refit(base, keep=False),
                self._folder.fit,
                spec,
                request.train,
                None,
                seed=self._seed(request, number),
                autocast=self._autocast,
            )
            log.info("%s: local round %d of %d", self.name, number, request.local_rounds)
        if request.part == "decide":
            judged = self._judge(base, self._refit(base))
        else:
            judged = self._judge_test(base, keep=request.local_rounds == 0)
            self._state.save_report(request.label, request.base, judged.correct.tolist())
        log.info("%s report %s: accuracy %.3f", self.name, request.label, judged.accuracy)
        return EvaluateReply(
            **request.identity(),
            farm=self.name,
            label=request.label,
            examples=len(judged.correct),
            accuracy=judged.accuracy,
            f1=judged.f1,
            seconds=time.monotonic() - started,
        )

    # --- steps that both share -------------------------------------------------------------

    def _bring_up(self, request: Asked) -> Base:
        """What the request stands on; a student with the statistics of this farm's images."""
        base = brought_up(self._state, request, self.name)
        if isinstance(base.model, Student):
            recalibrate(base.model, calibration_batches(self._folder.fit, base.spec))
        return base

    def _refit(self, base: Base, keep: bool = True, autocast: bool | None = None) -> nn.Linear:
        """The private classifier, fitted to the features of this backbone on the fit part."""
        features, labels = self._features(base, autocast)
        classifier = fit.fit_classifier(features, labels, len(self._folder.classes))
        if keep:
            self._state.save_classifier(base.digest, classifier, self._folder.classes)
        return classifier

    def _features(self, base: Base, autocast: bool | None) -> tuple[Tensor, Tensor]:
        chosen = self._autocast if autocast is None else autocast
        return fit.extract(base.model, self._folder.fit, base.spec, autocast=chosen)

    def _judge(self, base: Base, classifier: nn.Linear) -> fit.Evaluation:
        features, labels = fit.extract(
            base.model, self._folder.decide, base.spec, autocast=self._autocast
        )
        return fit.evaluate(classifier, features, labels)

    def _judge_own(self, base: Base) -> fit.Evaluation:
        return self._test(base, self._classifier_of(base))

    def _classifier_of(self, base: Base) -> nn.Linear:
        """The classifier that the farm keeps for this backbone, or a new one."""
        found = self._state.load_classifier(base.digest, len(self._folder.classes))
        if found is None:  # full precision, as for a report
            return self._refit(base, keep=True, autocast=False)
        return found

    def _judge_test(self, base: Base, keep: bool) -> fit.Evaluation:
        # full precision, so that a reported figure does not depend on the farm's hardware
        classifier = self._refit(base, keep=keep, autocast=False)
        return self._test(base, classifier)

    def _test(self, base: Base, classifier: nn.Linear) -> fit.Evaluation:
        test = self._folder.open_test(Purpose.REPORT)
        return fit.evaluate(classifier, *fit.extract(base.model, test, base.spec))

    def _seed(self, request: Work, number: int) -> int:
        """Farm randomness depends on seed, round and farm alone, so a run can be repeated."""
        return _seed_of(request.seed, number, self.name)


def _seed_of(*parts: int | str) -> int:
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
