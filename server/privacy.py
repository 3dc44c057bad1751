"""What privacy a run has cost its farms: counted from the record, needing no torch.

A farm has spent a round when it was asked: its reply may have been lost or come too late, yet it
was sent. Asked again in the same round it sends the same reply, so a round counts once however
often it was opened. The unit and the mathematics are in common/accountant.py.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.accountant import epsilon, mu_squared
from common.config import PrivacyConfig
from common.errors import ConfigError
from server.rows import RunRow
from server.store import Store
from server.story import epsilon_text

OUTSIDE = "accuracies, numbers of images and classes, and times are sent as they are"


@dataclass(frozen=True)
class Spent:
    """What one farm has sent: updates, replies with scores, and the mu^2 of all of it."""

    farm: str
    updates: int
    scores: int
    mu_squared: float

    def epsilon(self, delta: float) -> float:
        """At that delta; infinite where something was sent without noise."""
        return epsilon(self.mu_squared, delta)


def privacy_of(run: RunRow) -> PrivacyConfig | None:
    """The privacy that a run was started with."""
    values = json.loads(run.config_json).get("config", {}).get("privacy")
    return None if values is None else PrivacyConfig.model_validate(values)


def spent(store: Store, run: int, config: PrivacyConfig) -> list[Spent]:
    """What every farm that was asked has spent in a run, by name."""
    asked = _rounds_asked(store, run)
    return _count(asked, _scored(store, run), config)


def over_budget(
    store: Store,
    run: int,
    config: PrivacyConfig | None,
    farms: Iterable[str],
    number: int,
    scored: bool,
) -> str:
    """Why a run ends before round ``number``, in which it would ask ``farms``; "": it need not.

    Raises:
        ConfigError: not even the first round is within the budget.
    """
    if config is None or config.max_epsilon is None:
        return ""
    asked = _rounds_asked(store, run)
    planned = {farm: asked.get(farm, frozenset()) | {number} for farm in farms}
    most = worst(_count(planned, _scored(store, run) | ({number} if scored else set()), config))
    if most is None or most.epsilon(config.delta) <= config.max_epsilon:
        return ""
    reason = (
        f"round {number} would bring farm {most.farm} to "
        f"epsilon {epsilon_text(finite(most.epsilon(config.delta)))}, over the budget of "
        f"{config.max_epsilon:g} (privacy.max_epsilon)"
    )
    if number == 1:
        raise ConfigError(f"{reason}; allow more, or add more noise")
    return f"ended after round {number - 1}: {reason}"


def worst(farms: Sequence[Spent]) -> Spent | None:
    """The farm that has spent most; the first by name among equals."""
    return max(farms, key=lambda row: row.mu_squared, default=None)


def combined(store: Store, runs: Sequence[int]) -> tuple[Spent, float] | None:
    """The farm that has spent most over all ``runs`` together, and the delta of the last.

    None when the last run asked for no privacy; a run without any makes epsilon infinite.
    """
    last = privacy_of(store.run(runs[-1]))
    if last is None:
        return None
    totals: dict[str, Spent] = {}
    for run in runs:
        for row in spent(store, run, privacy_of(store.run(run)) or PrivacyConfig()):
            have = totals.get(row.farm, Spent(row.farm, 0, 0, 0.0))
            totals[row.farm] = Spent(
                row.farm,
                have.updates + row.updates,
                have.scores + row.scores,
                have.mu_squared + row.mu_squared,
            )
    most = worst([totals[farm] for farm in sorted(totals)])
    return None if most is None else (most, last.delta)


def snapshot(store: Store, run: RunRow) -> dict[str, Any] | None:
    """For status: epsilon by farm, the worst, and what it covers; epsilon None: no bound."""
    config = privacy_of(run)
    if config is None:
        return None
    farms = spent(store, run.run, config)
    most = worst(farms)
    return {
        "delta": config.delta,
        "epsilon": 0.0 if most is None else finite(most.epsilon(config.delta)),
        "worst": None if most is None else most.farm,
        "max_epsilon": config.max_epsilon,
        "farms": {
            row.farm: {
                "epsilon": finite(row.epsilon(config.delta)),
                "updates": row.updates,
                "scores": row.scores,
            }
            for row in farms
        },
        "outside": OUTSIDE,
    }


def describe(values: Mapping[str, Any]) -> str:
    """The snapshot as a line of text."""
    bound, at = f"epsilon {epsilon_text(values['epsilon'])}", f"delta {values['delta']:g}"
    whose = f"farm {values['worst']}: " if values["worst"] else ""
    limit = values["max_epsilon"]
    budget = "" if limit is None else f", budget {limit:g}"
    return f"privacy: {whose}{bound} at {at}{budget}; {values['outside']}"


def finite(value: float) -> float | None:
    """None for infinity, which JSON does not know."""
    return value if math.isfinite(value) else None


def _rounds_asked(store: Store, run: int) -> dict[str, frozenset[int]]:
    asked: dict[str, frozenset[int]] = {}
    for row in store.traffic(run):
        if row.kind == "align" and row.requests:
            asked[row.farm] = asked.get(row.farm, frozenset()) | {row.round}
    return asked


def _scored(store: Store, run: int) -> set[int]:
    return {row.round for row in store.rounds(run) if row.kind == "align" and row.scored}


def _count(
    asked: Mapping[str, Collection[int]], scored: Collection[int], config: PrivacyConfig
) -> list[Spent]:
    rows = []
    for farm, rounds in sorted(asked.items()):
        scores = sum(number in scored for number in rounds)
        cost = mu_squared(config, len(rounds), scores)
        rows.append(Spent(farm, len(rounds), scores, cost))
    return rows
