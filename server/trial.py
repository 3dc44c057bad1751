"""Which of several cuts to make: farms try each on what they decide by.

Each draft of a cut (server/close.py) is judged by the accuracy, on farms' decide parts, of a
classifier refitted to it; over farms that judged all of them, the best mean wins, of equals the
first. Every draft costs a farm the download of one cut, and nothing is trained on it.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from common.messages import TRIAL
from server.plan import CutRule

log = logging.getLogger(__name__)


def trial_label(digest: str) -> str:
    """Of the reports on a draft."""
    return f"{TRIAL}{digest[:12]}"


def best_rule(tried: Sequence[tuple[CutRule, Mapping[str, float]]]) -> CutRule:
    """The rule that is made use of.

    Args:
        tried: rules, with the decide accuracy of what they yield, by farm; not empty.
    """
    judges = set.intersection(*(set(judged) for _, judged in tried))
    if not judges:
        log.warning("no farm judged all of %d cuts; the first is made", len(tried))
        return tried[0][0]
    means = [float(np.mean([judged[farm] for farm in sorted(judges)])) for _, judged in tried]
    best = int(np.argmax(means))
    said = ", ".join(f"{rule} {mean:.4f}" for (rule, _), mean in zip(tried, means, strict=True))
    log.info("%d farms tried %s: %s is made", len(judges), said, tried[best][0])
    return tried[best][0]
