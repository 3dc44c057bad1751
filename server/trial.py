"""Which of several cuts to make: farms try each on what they decide by.

Each draft of a cut (server/close.py) is judged by the accuracy, on farms' decide parts, of a
classifier refitted to it; over farms that judged all of them, the best mean wins, of equals the
first. Every draft costs a farm the download of one cut, and nothing is trained on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.messages import TRIAL
from server.plan import CutRule
from server.rows import TrialRow


def trial_label(digest: str) -> str:
    """Of the reports on a draft."""
    return f"{TRIAL}{digest[:12]}"


@dataclass(frozen=True)
class Tried:
    """A rule, with the decide accuracy of what it yields, by farm."""

    rule: CutRule
    judged: Mapping[str, float]


def weighed(event: int, tried: Sequence[Tried]) -> list[TrialRow]:
    """The outcome, in the order given: exactly one is to be made.

    Args:
        event: the round that the cut ends.
        tried: not empty.
    """
    judges = sorted(set.intersection(*(set(one.judged) for one in tried)))
    means = [float(np.mean([one.judged[farm] for farm in judges])) for one in tried if judges]
    best = int(np.argmax(means)) if judges else 0
    return [
        TrialRow(event, str(one.rule), len(judges), means[at] if judges else None, at == best)
        for at, one in enumerate(tried)
    ]


def outcome(rows: Sequence[TrialRow]) -> str:
    """One event's trials in a sentence."""
    made = next(row.rule for row in rows if row.made)
    if not rows[0].farms:
        return f"no farm judged all of {len(rows)} cuts; the first is made ({made})"
    said = ", ".join(f"{row.rule} {100 * (row.accuracy or 0):.1f} %" for row in rows)
    return f"{rows[0].farms} farms tried {said}: {made} is made"
