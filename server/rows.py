"""What the store yields: one frozen value per kind of row. Times are unix seconds, sizes bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import RejectReason
from common.messages import is_trial

Floats: TypeAlias = npt.NDArray[np.float32]
RoundKind: TypeAlias = Literal["align", "evaluate"]
RunState: TypeAlias = Literal["running", "done", "stopped", "failed"]

GUARD = "guard"
"""Label of the reports, on decide parts, that judge the last cut of a run."""


def on_the_way(label: str) -> bool:
    """Whether reports of this label are a means to the run's end, not what it came to."""
    return label == GUARD or is_trial(label)


@dataclass(frozen=True)
class RunRow:
    """One run; ``tau`` is the invariance scale, frozen at the first score round."""

    run: int
    config_json: str
    seed: int
    base: str
    mask: str
    mask_json: str
    message: str
    state: RunState
    detail: str
    tau: float | None
    started: float
    finished: float | None


@dataclass(frozen=True)
class FarmRow:
    """A farm of a run, as it introduced itself; no ``protocol`` where an older server wrote it."""

    node: int
    farm: str
    examples: int
    classes: int
    last_seen: float
    rejected: int
    protocol: int | None


@dataclass(frozen=True)
class RoundRow:
    """A round; ``attempt`` counts how often it was opened (1: never interrupted).

    ``scored`` (0 or 1) says whether farms were asked for scores.
    """

    round: int
    kind: RoundKind
    attempt: int
    base: str
    mask: str
    quorum: int
    deadline: float
    state: Literal["open", "committed"]
    started: float
    finished: float | None
    participants: int
    macs_ratio: float | None
    heads_kept_ratio: float | None
    mean_accuracy: float | None
    scored: int


@dataclass(frozen=True)
class SpooledReply:
    """Where a reply lies in which file, and its sha256."""

    path: Path
    start: int
    length: int
    digest: str

    def __str__(self) -> str:
        return f"{self.path} at {self.start}"


@dataclass(frozen=True)
class ReplyRow:
    """An accepted reply; its spooled body is gone once the round is committed.

    ``of_round`` is the round it answers, earlier than ``round`` when it came late.
    """

    node: int
    farm: str
    attempt: int
    examples: int
    accuracy: float
    f1: float
    loss: float
    dal: float
    seconds: float
    size_bytes: int
    path: str
    start: int
    length: int
    digest: str
    received: float
    round: int
    of_round: int
    steps: int
    train_seconds: float

    @property
    def spooled(self) -> SpooledReply:
        """Where its body lies."""
        return SpooledReply(Path(self.path), self.start, self.length, self.digest)


@dataclass(frozen=True)
class PauseRow:
    """A farm that is not asked any more, and why."""

    farm: str
    reason: str
    since: float


@dataclass(frozen=True)
class VerdictRow:
    """Whether the cut after round ``event`` was accepted, by the replies of round ``judged``.

    ``drop_ratio`` is the mean loss of decide accuracy over ``farms`` that evaluated the backbone
    both before the cut and after its recovery; ``mask`` is the mask that was judged.
    """

    event: int
    judged: int
    accepted: bool
    drop_ratio: float
    farms: int
    mask: str


@dataclass(frozen=True)
class TrialRow:
    """A cut that was tried after round ``event``, and whether it is the one that was made.

    ``rule`` says for people what tells it from the others; ``accuracy`` is the mean decide accuracy
    over ``farms`` that judged all of them, None where no farm did.
    """

    event: int
    rule: str
    farms: int
    accuracy: float | None
    made: bool


@dataclass(frozen=True)
class RejectionRow:
    """A reply in quarantine, or one that never came."""

    round: int
    node: int | None
    reason: RejectReason
    detail: str
    received: float


@dataclass(frozen=True)
class TrafficRow:
    """What travelled between the server and one farm in one round, seen from the farm.

    ``requests`` counts messages, ``attempt`` is that of the newest.
    """

    round: int
    kind: RoundKind
    node: int
    farm: str
    requests: int
    attempt: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class LinkRow:
    """What a farm's socket carried for one round, as the farm counted it.

    From its reply before to its reply in this round, so with the polls of the time between and the
    way up of the reply before; this reply's own way up is in the next row.
    """

    round: int
    kind: RoundKind
    farm: str
    sent: int
    received: int


@dataclass(frozen=True)
class ReportRow:
    """Test accuracy of one farm on ``base`` with a refitted classifier."""

    label: str
    node: int
    round: int
    farm: str
    base: str
    accuracy: float
    f1: float
    examples: int
    size_bytes: int
    seconds: float
    received: float


@dataclass(frozen=True)
class CandidateRow:
    """What a round ended with: a backbone, the one it came from, and what it costs."""

    digest: str
    parent: str
    mask: str
    spec_json: str
    macs: int
    params: int
    path: str


@dataclass(frozen=True, eq=False)
class ScoreRow:
    """Scores of one farm, or of the consensus (``farm`` None), over the units of ``mask``.

    ``heads`` is fp32 (sum of heads,), ``neurons`` fp32 (sum of neurons,) where they were kept.
    ``importance`` and ``mmd2``, fp32 (sum of heads,), are what a farm sent for its heads; of the
    consensus, ``importance`` is what farms agree on, and ``heads`` what the mask goes by.
    """

    farm: str | None
    mask: str
    heads: Floats
    neurons: Floats | None = None
    importance: Floats | None = None
    mmd2: Floats | None = None
