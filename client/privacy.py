"""What leaves a farm when its reply has to be private: noise with the farm's own secret key.

    privacy.key     32 random bytes in the farm's state folder; whoever reads them can subtract the
                    noise of every reply, so they are this user's alone and never sent
    privacy.json    mu^2 of all that was ever sent, to whatever server and in whatever run

With the key lost, replies get other noise from then on; nothing else depends on it. The record is
written before the work begins, so no crash makes it too small.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from client.scores import FarmScores
from common.accountant import epsilon, mu_squared
from common.config import FarmSection, PrivacyConfig
from common.errors import ConfigError, StateError
from common.files import write_atomically
from common.messages import AlignRequest
from common.privacy import KEY_BYTES, Floats, length, privatise, privatise_scores

log = logging.getLogger(__name__)

KEY_FILE, RECORD_FILE, LOCK_FILE = "privacy.key", "privacy.json", "privacy.lock"
DELTA = PrivacyConfig().delta
"""Of a farm's own limit: one that a server may choose would be none."""


@dataclass(frozen=True)
class Curtain:
    """Between one farm's work on one request and its reply."""

    config: PrivacyConfig
    key: bytes
    what: str

    @classmethod
    def of(cls, request: AlignRequest, state: Path, farm: FarmSection) -> "Curtain | None":
        """What the request asks for, put on the farm's record; None when it asks for no privacy.

        Args:
            request: to be answered.
            state: folder with the farm's key, which is made when there is none, and its record.
            farm: its own conditions, ``min_noise`` and ``max_epsilon``.

        Raises:
            ConfigError: less noise is asked for, or more was spent, than the farm allows, or what
                can carry none.
            StateError: the key or the record cannot be read or written.
        """
        config = request.privacy or PrivacyConfig()
        _insist(config, request.criterion is not None, farm.min_noise)
        _keep_moments(request, farm)
        what = _identity(request)
        if request.privacy is not None or farm.max_epsilon is not None:
            cost = mu_squared(config, updates=1, scores=int(request.criterion is not None))
            _charge(state, what, cost, farm.max_epsilon)
        return None if request.privacy is None else cls(config, farm_key(state), what)

    def update(self, delta: Floats) -> Floats:
        """The fresh change of a round, fp32 (n,), cut and hidden; raises QualityError."""
        clip = self.config.clip
        if clip is not None:  # the length stays in the farm's own log
            log.info("the update has length %.4g, it is cut to %.4g", length(delta), clip)
        return privatise(
            delta, clip=clip, noise=self.config.noise, key=self.key, what=f"update {self.what}"
        )

    def scores(self, scores: FarmScores) -> FarmScores:
        """Scores hidden in noise; shifts are then kept back (0). Raises QualityError."""
        if self.config.score_noise == 0:
            return scores
        return replace(
            scores,
            head_importance=self._shares(scores.head_importance, "heads"),
            neuron_importance=self._shares(scores.neuron_importance, "neurons"),
            head_mmd2=0 * scores.head_mmd2,
        )

    def _shares(self, shares: Floats, kind: str) -> Floats:
        return privatise_scores(
            shares,
            clip=self.config.score_clip,
            noise=self.config.score_noise,
            key=self.key,
            what=f"{kind} {self.what}",
        )


def _identity(request: AlignRequest) -> str:
    """All that decides what the farm answers; asked the same again, it sends the same noise."""
    return request.model_dump_json(exclude=set(request.WAYS))


def _keep_moments(request: AlignRequest, farm: FarmSection) -> None:
    """Raises ConfigError where moments, which carry no noise, would leave a farm that has terms."""
    conditions = request.privacy is not None or farm.min_noise > 0 or farm.max_epsilon is not None
    if request.moments is not None and conditions:
        raise ConfigError(
            "the server asks for second moments, which carry no noise, and this farm's answers "
            "have to; the server's operator sets plan.moments = 'source'"
        )


def _insist(config: PrivacyConfig, scored: bool, least: float) -> None:
    asked = {"noise": config.noise} | ({"score_noise": config.score_noise} if scored else {})
    for name, noise in asked.items():
        if noise < least:
            raise ConfigError(
                f"this farm sends nothing with less noise than {least:g} (its min_noise), asked is "
                f"privacy.{name} = {noise:g}; raise it, or run without this farm"
            )


def farm_key(folder: Path) -> bytes:
    """The farm's secret key, made on first use.

    Raises:
        StateError: it cannot be read or written.
    """
    path = folder / KEY_FILE
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = b""
    except OSError as error:
        raise StateError(f"cannot read '{path}': {error.strerror or error}") from error
    if len(key) != KEY_BYTES:
        if key:
            log.warning("the key of this farm's noise is damaged; another one takes its place")
        key = secrets.token_bytes(KEY_BYTES)
        write_atomically(path, key)
    return key


def spent(folder: Path) -> float:
    """mu^2 of all that this farm has sent under privacy or under a limit of its own.

    Raises:
        StateError: the record is damaged; it is not taken for an empty one.
    """
    return _record(folder)[0]


def _record(folder: Path) -> tuple[float, str]:
    """What was spent, and the digest of the last thing it was spent on."""
    path = folder / RECORD_FILE
    try:
        values = json.loads(path.read_text())
        total, last = float(values["mu_squared"]), str(values["last"])
    except FileNotFoundError:
        return 0.0, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        total, last, why = math.nan, "", repr(error)
    else:
        why = f"mu_squared is {total}"
    if not total >= 0:
        raise StateError(f"the record of spent privacy '{path}' is damaged ({why}); restore it")
    return total, last


def _charge(folder: Path, what: str, cost: float, limit: float | None) -> None:
    """Put a reply on record before it is worked on; the same one again costs nothing."""
    with _one_at_a_time(folder):
        before, last = _record(folder)
        digest = hashlib.sha256(what.encode()).hexdigest()
        if digest == last:
            return
        total = epsilon(before + cost, DELTA)
        if limit is not None and total > limit:
            raise ConfigError(
                f"this farm allows epsilon {limit:g} at delta {DELTA:g} in all (its max_epsilon); "
                f"this reply would bring it to {total:.4g}"
            )
        log.info("with this reply the farm has spent epsilon %.4g at delta %g", total, DELTA)
        record = {"mu_squared": before + cost, "last": digest}
        write_atomically(folder / RECORD_FILE, json.dumps(record).encode())


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two requests at once must not both read the record before either writes it."""
    try:
        file = (folder / LOCK_FILE).open("ab")
    except OSError as error:
        raise StateError(f"cannot write '{folder / LOCK_FILE}': {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed
        yield
