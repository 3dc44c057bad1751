"""Error feedback of the server: what coding a step lost is part of the next step of the run.

    models/DIGEST.residual   of the step that led to this candidate, fp32 (n,), by run

So a step may have as few bits a number as a farm's update (client/residual.py does the same there).
On disk before the round commits, like the candidate: a run that goes on after a crash, or from a
candidate of before an undone cut, finds what belongs to it.
"""

import logging
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.codec import Floats
from common.files import write_atomically
from common.mask import Keep
from common.spec import ModelSpec
from common.surgery import slice_flat
from common.trainable import TrainableSet

log = logging.getLogger(__name__)


def left_after(
    lost: Floats, before: TrainableSet, spec: ModelSpec, keep: Keep, after: TrainableSet
) -> Floats:
    """What is left of a residual once its backbone is cut; nothing where others are trained then.

    Args:
        lost: fp32 (n,), laid out as ``before`` says.
        before: what was trained.
        spec: of the backbone before the cut.
        keep: the cut.
        after: what is trained of the backbone after it.
    """
    if not before.holds(after):
        return np.zeros(0, np.float32)
    return slice_flat(lost, before.layout, spec, keep, after.layout)


class Residuals:
    """The residuals of a server's candidates."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "models"

    def save(self, run: int, candidate: str, lost: Floats) -> None:
        """Keep what the step to a candidate lost; raises DiskError."""
        write_atomically(self._path(candidate), save({str(run): lost}))

    def load(self, run: int, candidate: str, count: int) -> Floats | None:
        """What the step to a candidate lost in this run, or None where nothing is known of it."""
        try:
            lost = load(self._path(candidate).read_bytes()).get(str(run))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("'%s' is damaged; what it held is lost: %s", self._path(candidate), error)
            return None
        return lost if lost is not None and lost.shape == (count,) else None

    def _path(self, candidate: str) -> Path:
        return self._folder / f"{candidate}.residual"
