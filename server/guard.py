"""The accuracy guard: is the model after a cut still as good where the farms decide?

    drop = mean over farms of (accuracy before the cut - accuracy after its recovery)

paired: over farms that evaluated both, on their decide parts, with a classifier refitted to each.
A cut whose drop exceeds ``plan.max_drop_ratio`` is undone: the backbone of before is restored,
what was learnt since is thrown away with it, and its mask is not tried again in the run.
"""

import logging
from collections.abc import Mapping, Sequence

from server.rows import ReplyRow, VerdictRow

log = logging.getLogger(__name__)


def accuracies(replies: Sequence[ReplyRow]) -> dict[str, float]:
    """Accuracy of a round's base by farm; late replies judge an older one and are left out.

    By name: a farm that slept in between comes back as another node.
    """
    return {row.farm: row.accuracy for row in replies if row.of_round == row.round}


def judge(
    event: int,
    judged: int,
    mask: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    max_drop_ratio: float,
) -> VerdictRow:
    """The verdict on the cut after round ``event``.

    Args:
        event: the round that ended with the cut.
        judged: the round whose replies judge it.
        mask: digest of the mask that is judged.
        before: decide accuracy (ratio) of the backbone before the cut, by farm.
        after: of the backbone after its recovery, by node.
        max_drop_ratio: the largest mean loss that is accepted.

    Returns:
        Accepted also where no farm evaluated both: nothing speaks against it, and it is logged.
    """
    both = sorted(before.keys() & after.keys())
    drop = sum(before[farm] - after[farm] for farm in both) / len(both) if both else 0.0
    accepted = drop <= max_drop_ratio
    if not both:
        log.warning("no farm evaluated the model before and after round %d's cut", event)
    elif not accepted:
        log.warning(
            "the cut after round %d lost %.1f points over %d farms, more than %.1f: it is undone",
            *(event, 100 * drop, len(both), 100 * max_drop_ratio),
        )
    return VerdictRow(event, judged, accepted, drop, len(both), mask)
