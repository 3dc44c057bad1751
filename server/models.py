"""Backbones of the server on disk: candidates by digest, their deltas, anchors by mask.

models/DIGEST.safetensors    a candidate, whole
models/DIGEST.delta          the coded step that leads to it from its parent (its base)
anchors/MASK.safetensors     the anchors that belong to a mask
"""

import copy
from pathlib import Path

import numpy as np
from timm.models.vision_transformer import VisionTransformer

from common import backbone, codec
from common.anchors import Anchors
from common.errors import StateError
from common.files import write_atomically
from common.messages import Array
from common.spec import ModelSpec

BODIES_KEPT = 2
"""A candidate whole, and the step to it."""


class Models:
    """The candidates of a network."""

    def __init__(self, state_dir: Path) -> None:
        self._models = state_dir / "models"
        self._anchors = state_dir / "anchors"
        self._bodies: dict[Path, Array] = {}
        self._newest: tuple[str, VisionTransformer, ModelSpec] | None = None

    def path(self, digest: str) -> Path:
        """Where the candidate lies."""
        return self._models / f"{digest}.safetensors"

    def save(self, model: VisionTransformer, spec: ModelSpec, step: Array | None = None) -> str:
        """Keep a candidate and, when it has one, the coded step from its parent.

        ``model`` stays in memory: it must not be changed after that.
        """
        digest = backbone.digest(model, spec)
        if step is not None:
            write_atomically(self._models / f"{digest}.delta", step.tobytes())
        backbone.save_backbone(self.path(digest), model, spec)
        self._newest = digest, model, spec
        return digest

    def load(self, digest: str) -> tuple[VisionTransformer, ModelSpec]:
        """A candidate, the caller's to change; raises StateError when it is absent or damaged."""
        model, spec = self.view(digest)
        return copy.deepcopy(model), spec

    def view(self, digest: str) -> tuple[VisionTransformer, ModelSpec]:
        """A candidate to look at only: the newest stays in memory. Raises as ``load`` does."""
        if self._newest is None or self._newest[0] != digest:
            model, spec = backbone.load_backbone(self.path(digest))
            if backbone.digest(model, spec) != digest:
                raise StateError(f"'{self.path(digest)}' is damaged; restore it from a backup")
            self._newest = digest, model, spec
        return self._newest[1:]

    def body(self, digest: str) -> Array:
        """The candidate as bytes."""
        return self._shared(self.path(digest))

    def step(self, digest: str) -> Array | None:
        """The coded step that leads to this candidate, or None after a prune event."""
        path = self._models / f"{digest}.delta"
        return self._shared(path) if path.is_file() else None

    def _shared(self, path: Path) -> Array:
        """A file as bytes; all requests of a round share one read-only array."""
        if path not in self._bodies:
            if len(self._bodies) >= BODIES_KEPT:
                self._bodies.clear()
            self._bodies[path] = np.frombuffer(path.read_bytes(), np.uint8)
        return self._bodies[path]

    def step_parent(self, step: Array) -> str:
        """The digest of the candidate that a step is added to."""
        return codec.read_header(step).base

    def save_anchors(self, mask: str, anchors: Anchors) -> None:
        """Keep the anchors of a mask."""
        write_atomically(self._anchors / f"{mask}.safetensors", anchors.to_bytes())

    def import_anchors(self, mask: str, path: Path) -> None:
        """Take over the anchors that pre-training left, if it had source images."""
        if path.is_file():
            self.save_anchors(mask, Anchors.from_bytes(path.read_bytes()))

    def anchors(self, mask: str) -> Array | None:
        """The anchors of a mask as bytes, or None when the server has no source images."""
        path = self._anchors / f"{mask}.safetensors"
        return np.frombuffer(path.read_bytes(), np.uint8) if path.is_file() else None
