"""Backbones and students of the server on disk: candidates, the steps to them, anchors by mask.

models/DIGEST.safetensors    a candidate, whole
models/DIGEST.delta          the step that leads to it from its parent (common/step.py)
anchors/MASK.safetensors     the anchors that belong to a mask

Where there is a step it is what counts: it is kilobytes, and on disk before the round commits. The
whole candidate is written beside the next round; should a crash come first, or a power cut damage
it, it is made again from its parent and the step. Only the first candidate of a run has no step.
"""

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from common import backbone, networks
from common.anchors import Anchors
from common.catchup import MAX_STEPS, chain, changed
from common.compress import compress
from common.errors import DiskError, FieldfedError, ProtocolError, StateError
from common.files import write_atomically
from common.messages import Array
from common.networks import Network
from common.spec import ModelSpec, Spec, StudentSpec
from common.step import Step
from common.student import Student

log = logging.getLogger(__name__)

FEWEST_STEPS = 3
"""An update has about a quarter of its numbers' bytes: two are never longer than the numbers."""
KEPT_BYTES = 250_000_000
"""Of bodies in memory: a candidate whole, anchors, and what brings farms up to date."""


@dataclass(frozen=True, eq=False)
class Way:
    """The shortest body that makes a candidate of one that a farm holds."""

    kind: Literal["delta", "chain", "tensors"]
    start: str
    body: Array


class Models:
    """The candidates of a network."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._models = state_dir / "models"
        self._anchors = state_dir / "anchors"
        self._bodies: dict[Path, Array] = {}
        self._parents: dict[str, str] = {}
        self._newest: tuple[str, Network, Spec] | None = None
        self._writer: threading.Thread | None = None

    def path(self, digest: str) -> Path:
        """Where the candidate lies."""
        return self._models / f"{digest}.safetensors"

    def save(self, model: Network, spec: Spec, step: Array | None = None) -> str:
        """Keep a candidate and, when it has one, the step from its parent.

        ``model`` stays in memory: it must not be changed after that.
        """
        digest = backbone.digest(model, spec)
        path, body = self.path(digest), backbone.pack(model, spec)
        self.settle()
        if step is None:
            write_atomically(path, body)
        else:
            write_atomically(self._step_path(digest), step.tobytes())
            self._writer = threading.Thread(target=self._write, args=(path, body))
            self._writer.start()
        self._newest = digest, model, spec
        return digest

    def _write(self, path: Path, body: bytes) -> None:
        try:
            write_atomically(path, body, durable=False)
        except DiskError as error:
            log.error("%s; the candidate can be made again from its step", error)

    def settle(self) -> None:
        """Wait until everything is on disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def sweep(self) -> None:
        """Remove files half written, of a process that was killed; call it before anything else."""
        for path in self._models.glob(".*"):
            path.unlink(missing_ok=True)

    def load(self, digest: str) -> tuple[VisionTransformer, ModelSpec]:
        """A backbone, the caller's to change; raises StateError when it is absent or damaged."""
        loaded = self.view(digest)
        self._newest = None
        return loaded

    def view(self, digest: str) -> tuple[VisionTransformer, ModelSpec]:
        """A backbone to look at only: the newest stays in memory. Raises as ``load`` does."""
        model, spec = self.network(digest)
        if not isinstance(model, VisionTransformer) or not isinstance(spec, ModelSpec):
            raise StateError(f"{digest[:12]} is a student ({spec.name}), not a backbone")
        return model, spec

    def load_student(self, digest: str) -> tuple[Student, StudentSpec]:
        """A student, the caller's to change; raises StateError as ``load`` does."""
        model, spec = self.network(digest)
        if not isinstance(model, Student) or not isinstance(spec, StudentSpec):
            raise StateError(f"{digest[:12]} is a backbone ({spec.name}), not a student")
        self._newest = None
        return model, spec

    def network(self, digest: str) -> tuple[Network, Spec]:
        """Either of them, to look at only; raises as ``load`` does."""
        if self._newest is None or self._newest[0] != digest:
            self.settle()
            self._newest = digest, *self._read(digest)
        return self._newest[1:]

    def _read(self, digest: str) -> tuple[Network, Spec]:
        """From disk: whole, or else from the parent and the step."""
        try:
            model, spec = networks.load(self.path(digest))
            if backbone.digest(model, spec) == digest:
                return model, spec
        except FieldfedError as error:
            log.warning("%s", error)
        if not self._step_path(digest).is_file():
            raise StateError(f"'{self.path(digest)}' is damaged; restore it from a backup")
        try:
            step = Step.from_bytes(np.frombuffer(self._step_path(digest).read_bytes(), np.uint8))
            model, spec = step.apply(*self._read(step.base))
        except ProtocolError as error:
            raise self._damaged(digest) from error
        if backbone.digest(model, spec) != digest:
            raise self._damaged(digest)
        log.warning("candidate %s is made again from its step", digest[:12])
        write_atomically(self.path(digest), backbone.pack(model, spec), durable=False)
        return model, spec

    def discard(self, digest: str) -> None:
        """Forget a draft that no round ended with."""
        self.settle()
        for path in (self.path(digest), self._step_path(digest)):
            path.unlink(missing_ok=True)
            self._bodies.pop(path, None)

    def body(self, digest: str) -> Array:
        """The candidate as bytes, compressed where that is shorter."""

        def packed() -> bytes:
            whole = np.frombuffer(backbone.pack(*self.network(digest)), np.uint8)
            return compress(whole).tobytes()

        return self._shared(self.path(digest), packed)

    def step(self, digest: str) -> Array | None:
        """The step that leads to this candidate (common/step.py), or None for a first one."""
        return self._if_kept(self._step_path(digest))

    def _step_path(self, digest: str) -> Path:
        return self._models / f"{digest}.delta"

    def _if_kept(self, path: Path) -> Array | None:
        known = path in self._bodies or path.is_file()
        return self._shared(path, path.read_bytes) if known else None

    def _shared(self, path: Path, read: Callable[[], bytes]) -> Array:
        """What a file holds; all requests of a round share one read-only array."""
        if path not in self._bodies:
            self._bodies[path] = np.frombuffer(read(), np.uint8)
            while len(self._bodies) > 1 and sum(b.size for b in self._bodies.values()) > KEPT_BYTES:
                self._bodies.pop(next(iter(self._bodies)))  # the oldest
        return self._bodies[path]

    def parent(self, digest: str) -> str | None:
        """The candidate that the step to this one is added to, or None when there is no step."""
        step = self.step(digest)
        if step is None:
            return None
        if digest not in self._parents:
            self._parents[digest] = Step.from_bytes(step).base
        return self._parents[digest]

    def way(self, held: Collection[str], digest: str) -> Way | None:
        """How a farm that holds these candidates gets to this one, if not with the whole of it."""
        path, parent = [digest], self.parent(digest)
        while parent is not None and parent not in held and len(path) < MAX_STEPS:
            path.append(parent)
            parent = self.parent(parent)
        if parent is None or parent not in held:
            return None
        if len(path) == 1:
            return Way("delta", parent, self._known_step(digest))
        steps = [self._known_step(one) for one in reversed(path)]
        body = self._shared(
            self._models / f"{parent}-{digest}.chain", lambda: chain(steps).tobytes()
        )
        kind: Literal["chain", "tensors"] = "chain"
        tensors = self._tensors(parent, digest) if len(path) >= FEWEST_STEPS else None
        if tensors is not None and tensors.size < body.size:
            kind, body = "tensors", tensors
        self.settle()
        return Way(kind, parent, body) if body.size < self.path(digest).stat().st_size else None

    def _known_step(self, digest: str) -> Array:
        step = self.step(digest)
        assert step is not None
        return step

    def _tensors(self, start: str, digest: str) -> Array | None:
        """What differs between two candidates, or None where units were cut in between."""

        def differing() -> bytes:
            now, _ = self.network(digest)
            before, _ = self._read(start)
            body = changed(before, now)
            return b"" if body is None else body.tobytes()

        body = self._shared(self._models / f"{start}-{digest}.tensors", differing)
        return body if body.size else None

    def _damaged(self, digest: str) -> StateError:
        return StateError(f"'{self._step_path(digest)}' is damaged; restore it from a backup")

    def save_anchors(self, mask: str, anchors: Anchors) -> None:
        """Keep the anchors of a mask."""
        path = self._anchors / f"{mask}.safetensors"
        self._bodies.pop(path, None)
        write_atomically(path, anchors.to_bytes())

    def import_anchors(self, mask: str, path: Path) -> None:
        """Take over the anchors that pre-training left, if it had source images."""
        if path.is_file():
            self.save_anchors(mask, Anchors.from_bytes(path.read_bytes()))

    def anchors(self, mask: str) -> Array | None:
        """The anchors of a mask as bytes, or None when the server has no source images."""
        return self._if_kept(self._anchors / f"{mask}.safetensors")
