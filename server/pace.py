"""How many steps a farm may take, so that a slow device arrives with the others.

    seconds of a farm = overhead + steps * seconds per step

both learned from its last reply. The target is the median farm's time for all of its steps; a
farm that would need more than ``SLACK`` times that gets the steps that fit.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from common.config import TrainConfig
from server.rows import FarmRow, ReplyRow

SLACK = 1.25


def whole_round(
    farms: Sequence[FarmRow], nodes: Sequence[int], train: TrainConfig
) -> dict[int, int]:
    """Steps of a whole round, for those farms that are among the nodes."""
    images = {row.node: row.examples for row in farms}
    return {node: train.epochs * -(-images[node] // train.batch_size) for node in nodes}


def step_budgets(replies: Sequence[ReplyRow], full: Mapping[int, int]) -> dict[int, int]:
    """Steps for farms that would be late; the others are not limited.

    Args:
        replies: the newest reply of each farm.
        full: steps of a whole round by node, >= 1.

    Returns:
        At least 1 each, by node.
    """
    known = {row.node: row for row in replies if row.steps > 0 and row.node in full}
    if len(known) < 2:
        return {}
    overhead = {node: max(0.0, row.seconds - row.train_seconds) for node, row in known.items()}
    pace = {node: row.train_seconds / row.steps for node, row in known.items()}
    whole = {node: overhead[node] + full[node] * pace[node] for node in known}
    target = SLACK * median(whole.values())
    return {
        node: max(1, min(full[node], int((target - overhead[node]) / pace[node])))
        for node in known
        if whole[node] > target and pace[node] > 0
    }
