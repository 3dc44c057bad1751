"""What a farm keeps on its own disk; nothing in here ever leaves it, except cached replies.

    backbones/DIGEST.safetensors     the newest training bases and the one before the last cut
    students/DIGEST.safetensors      the newest students, as far as they are shared: without the
                                     statistics of batch normalisation (common/student.py)
    classifiers/DIGEST.safetensors   this farm's classifier for that backbone
    replies/RUN-ROUND-WORK...        the answer to a request, sent again when it is asked again, and
                                     what coding its update lost (client/residual.py)
    anchors/DIGEST.safetensors       what alignment is measured against (common/anchors.py)
    cuts/MASK.json                   what was kept at a prune event that led to this mask
    reports/LABEL.json               per-image results on the test part, for the farm's own eyes

Every file is written whole or not at all, and a damaged one counts as absent.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common import backbone
from common.anchors import Anchors
from common.errors import FieldfedError, ModelError
from common.files import write_atomically
from common.mask import Keep
from common.messages import AlignReply, Bytes, Floats, Reply, Request, Work, from_parts, to_parts
from common.spec import ModelSpec, StudentSpec
from common.student import Student, unpack_student

log = logging.getLogger(__name__)

BACKBONES_KEPT, STUDENTS_KEPT = 3, 2
ALIGNED_KEPT, REPORTED_KEPT, ANCHORS_KEPT, CUTS_KEPT = 2, 3, 2, 2

_LOST = "lost"
_FOLDERS = ("backbones", "students", "classifiers", "replies", "reports", "anchors", "cuts")


@dataclass(frozen=True, eq=False)
class Left:
    """A reply and what coding lost of its update, fp32 (n,); None: nothing."""

    reply: AlignReply
    lost: Floats | None


class FarmState:
    """The folder of one farm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)

    def held(self) -> tuple[str, ...]:
        """Digests of all that a request can stand on: backbones, then students."""
        return self.backbones() + self.students()

    # --- backbones -------------------------------------------------------------------------

    def backbones(self) -> tuple[str, ...]:
        """Digests of the backbones on disk, newest first."""
        return tuple(path.stem for path in _newest_first(self.folder / "backbones"))

    def load_backbone(
        self, digest: str, touch: bool = True
    ) -> tuple[VisionTransformer, ModelSpec] | None:
        """The backbone with this digest, or None when it is absent or damaged.

        With ``touch`` it is the newest from now on.
        """
        path = self._backbone_path(digest)
        held = _read(path, digest, backbone.unpack)
        if held is not None and touch:
            os.utime(path)
        return held

    def save_backbone(
        self, digest: str, model: VisionTransformer, spec: ModelSpec, draft: bool = False
    ) -> None:
        """Keep a backbone and throw the oldest away, but for the one before the last cut.

        The server may undo a cut some rounds later: then that one is the base again, and nobody
        wants it to come over the link a second time. For a draft nothing is thrown away: nobody
        knows which of several will be the base.
        """
        backbone.save_backbone(self._backbone_path(digest), model, spec)
        if draft:
            return
        paths = _newest_first(self.folder / "backbones")
        uncut = next((path for path in paths if _spec_of(path) not in (spec, None)), None)
        for path in paths[BACKBONES_KEPT:]:
            if path != uncut:
                path.unlink(missing_ok=True)
                self._classifier_path(path.stem).unlink(missing_ok=True)

    def _backbone_path(self, digest: str) -> Path:
        return self.folder / "backbones" / f"{digest}.safetensors"

    # --- students --------------------------------------------------------------------------

    def students(self) -> tuple[str, ...]:
        """Digests of the students on disk, newest first."""
        return tuple(path.stem for path in _newest_first(self.folder / "students"))

    def load_student(self, digest: str) -> tuple[Student, StudentSpec] | None:
        """The student with this digest, or None when it is absent or damaged."""
        path = self._student_path(digest)
        held = _read(path, digest, unpack_student)
        if held is not None:
            os.utime(path)
        return held

    def save_student(self, digest: str, student: Student, spec: StudentSpec) -> None:
        """Keep a student, and throw the oldest away with their classifiers."""
        write_atomically(self._student_path(digest), backbone.pack(student, spec))
        for path in _newest_first(self.folder / "students")[STUDENTS_KEPT:]:
            path.unlink(missing_ok=True)
            self._classifier_path(path.stem).unlink(missing_ok=True)

    def _student_path(self, digest: str) -> Path:
        return self.folder / "students" / f"{digest}.safetensors"

    # --- classifiers -----------------------------------------------------------------------

    def save_classifier(self, digest: str, classifier: nn.Linear, classes: Sequence[str]) -> None:
        """Keep the classifier that fits the backbone ``digest``, with its class names."""
        tensors = {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()}
        body = save_tensors(tensors, metadata={"classes": json.dumps(list(classes))})
        write_atomically(self._classifier_path(digest), body)

    def load_classifier(self, digest: str, classes: int | None = None) -> nn.Linear | None:
        """The classifier for the backbone ``digest``, or None when it is absent or damaged.

        With ``classes`` also when it knows another number of them.
        """
        try:
            tensors = load_tensors(self._classifier_path(digest).read_bytes())
            known, width = tensors["weight"].shape
            classifier = nn.Linear(width, known)
            classifier.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return None
        return classifier if classes in (None, known) else None

    def _classifier_path(self, digest: str) -> Path:
        return self.folder / "classifiers" / f"{digest}.safetensors"

    # --- replies ---------------------------------------------------------------------------

    def save_reply(
        self, request: Work, work: str, reply: Reply, lost: Floats | None = None
    ) -> None:
        """Keep a finished reply, so that a repeated request costs no second training.

        Args:
            request: that it answers.
            work: tells apart what may be asked in one round: alignment, and reports by label.
            reply: to be sent again.
            lost: what coding lost of its update, fp32 (n,).
        """
        text, arrays = to_parts(reply)
        path = self._reply_path(request, work)
        if lost is not None:
            arrays = {**arrays, _LOST: lost}
        about = {"message": text, "asked": _asked(request)}
        write_atomically(path, save_arrays(arrays or _NOTHING, metadata=about))
        # two kinds, so that reports never push out the reply whose residual is still needed
        kept = self._aligned()[:ALIGNED_KEPT] + self._reported()[:REPORTED_KEPT]
        for old in set((self.folder / "replies").glob("*.safetensors")) - set(kept):
            old.unlink(missing_ok=True)

    def load_reply(self, request: Work, work: str) -> Request | Reply | None:
        """The reply to an earlier attempt at the same work, or None.

        A server that was restored from a backup numbers its runs from there on again: what was
        asked under these numbers then, in other words, is other work.
        """
        found = self._read_reply(self._reply_path(request, work))
        if found is None or found[2] not in ("", _asked(request)):
            return None
        return found[0]

    def newest_aligned(self, run: int) -> "Left | None":
        """The newest reply to a round of alignment in this run, with what coding lost of it."""
        paths = [path for path in self._aligned() if path.name.startswith(f"{run}-")]
        if not paths:
            return None
        # never an older one in its stead: what that one left behind is part of the newest
        found = self._read_reply(paths[0])
        if found is None or not isinstance(found[0], AlignReply):
            log.warning("'%s' is damaged; what it left behind is lost", paths[0])
            return None
        return Left(found[0], found[1])

    def _read_reply(self, path: Path) -> tuple[Request | Reply, Floats | None, str] | None:
        """A reply, what coding lost of it, and what was asked ('' before that was kept)."""
        try:
            with safe_open(path, framework="np") as file:
                about = file.metadata() or {}
                text = about["message"]
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            lost = arrays.pop(_LOST, None)
            arrays = arrays if "nothing" not in arrays else {}
            return from_parts(text, arrays), lost, about.get("asked", "")
        except (OSError, SafetensorError, KeyError, FieldfedError):
            return None

    def _aligned(self) -> list[Path]:
        return [path for path in _newest_first(self.folder / "replies") if "-align-" in path.name]

    def _reported(self) -> list[Path]:
        return [p for p in _newest_first(self.folder / "replies") if "-align-" not in p.name]

    def _reply_path(self, request: Work, work: str) -> Path:
        # the base is part of the name: a server that started over may reuse run and round numbers
        name = f"{request.run}-{request.round}-{work}-{request.base[:16]}.safetensors"
        return self.folder / "replies" / name

    # --- anchors ---------------------------------------------------------------------------

    def save_anchors(self, digest: str, body: Bytes) -> None:
        """Keep anchors by the sha256 of their bytes, and throw the oldest away."""
        write_atomically(self.folder / "anchors" / f"{digest}.safetensors", body.tobytes())
        for old in _newest_first(self.folder / "anchors")[ANCHORS_KEPT:]:
            old.unlink(missing_ok=True)

    def load_anchors(self, digest: str) -> Anchors | None:
        """These anchors, or None when they are absent or damaged."""
        try:
            body = (self.folder / "anchors" / f"{digest}.safetensors").read_bytes()
            if hashlib.sha256(body).hexdigest() != digest:
                return None
            return Anchors.from_bytes(body)
        except (OSError, FieldfedError):
            return None

    # --- cuts ------------------------------------------------------------------------------

    def save_cut(
        self, mask: str, spec: ModelSpec, keep: Keep, base: str, draft: bool = False
    ) -> None:
        """Keep what a prune event, that led to ``mask``, left of the backbone ``base``."""
        cut = {
            "base": base,
            "spec": spec.to_json(),
            "heads": [kept.tolist() for kept in keep.heads],
            "neurons": [kept.tolist() for kept in keep.neurons],
        }
        write_atomically(self.folder / "cuts" / f"{mask}.json", json.dumps(cut).encode())
        if draft:
            return
        cuts = sorted((self.folder / "cuts").glob("*.json"), key=lambda p: -p.stat().st_mtime_ns)
        for old in cuts[CUTS_KEPT:]:
            old.unlink(missing_ok=True)

    def load_cut(self, mask: str) -> tuple[ModelSpec, Keep] | None:
        """The spec before the cut that led to ``mask`` and what was kept, or None."""
        try:
            cut = json.loads((self.folder / "cuts" / f"{mask}.json").read_text())
            kept = [
                tuple(np.array(block, dtype=np.int64) for block in cut[kind])
                for kind in ("heads", "neurons")
            ]
            return ModelSpec.from_json(cut["spec"]), Keep(*kept)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def before_cut(self, mask: str) -> str | None:
        """The digest of the backbone that the cut which led to ``mask`` was made from, or None."""
        try:
            base = json.loads((self.folder / "cuts" / f"{mask}.json").read_text())["base"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return base if isinstance(base, str) and re.fullmatch("[0-9a-f]{64}", base) else None

    # --- reports ---------------------------------------------------------------------------

    def save_report(self, label: str, base: str, correct: Sequence[bool]) -> None:
        """Keep which test images were classified correctly, in the order of the test part."""
        report = {"label": label, "base": base, "correct": [int(flag) for flag in correct]}
        write_atomically(self.folder / "reports" / f"{label}.json", json.dumps(report).encode())


_M = TypeVar("_M", VisionTransformer, Student)
_S = TypeVar("_S", ModelSpec, StudentSpec)
_NOTHING = {"nothing": np.zeros(1, np.uint8)}
_BY_THEN = {"steps", "folded"}
"""What a request that is made again after a crash may say differently."""


def _read(
    path: Path, digest: str, unpack: Callable[[bytes], tuple[_M, _S]]
) -> tuple[_M, _S] | None:
    """What lies under a digest, or None when it is absent, or damaged and so removed."""
    try:
        model, spec = unpack(path.read_bytes())
    except OSError:
        return None
    except ModelError:
        path.unlink(missing_ok=True)
        return None
    if backbone.digest(model, spec) != digest:
        log.warning("%s on disk is damaged; it will be fetched again", digest[:12])
        path.unlink(missing_ok=True)
        return None
    return model, spec


def _asked(request: Work) -> str:
    """sha256 of all that decides the answer to a request."""
    text = request.model_dump_json(exclude={*request.WAYS, *_BY_THEN})
    return hashlib.sha256(text.encode()).hexdigest()


def _spec_of(path: Path) -> ModelSpec | None:
    try:
        return backbone.read_spec(path)
    except ModelError:
        return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime_ns)
