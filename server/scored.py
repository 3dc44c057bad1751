"""What farms scored in a round, from their replies to what goes on record."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.mask import Mask
from common.scores import UnitScores
from server.spool import ReplyReader, ReplyScores
from server.store import ReplyRow, ScoreRow


def replied_scores(
    replies: Sequence[ReplyRow], readers: Sequence[ReplyReader]
) -> dict[int, ReplyScores]:
    """What farms sent by node; a late reply scored an older backbone."""
    return {
        row.node: reader.scores()
        for row, reader in zip(replies, readers, strict=True)
        if row.of_round == row.round
    }


def score_rows(
    agreed: UnitScores | None,
    farms: Mapping[int, UnitScores],
    sent: Mapping[int, ReplyScores],
    replies: Sequence[ReplyRow],
    mask: Mask,
) -> list[ScoreRow]:
    """What goes on record of a score round: of the consensus first, then of each farm."""
    if agreed is None:
        return []
    names = {row.node: row.farm for row in replies}
    together = agreed.flat_heads()
    rows = [ScoreRow(farm=None, mask=mask.digest, heads=together, importance=together)]
    for node, scores in farms.items():
        rows.append(
            ScoreRow(
                farm=names[node],
                mask=mask.digest,
                heads=scores.flat_heads(),
                importance=sent[node].head_importance,
                mmd2=sent[node].head_mmd2,
            )
        )
    return rows


def gone_by(row: ScoreRow, counted: UnitScores) -> ScoreRow:
    """In the row of the consensus, the scores that the mask goes by."""
    return row if row.farm is not None else replace(row, heads=counted.flat_heads())
