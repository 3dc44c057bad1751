"""What a run has removed, written down for farms (common/removals.py)."""

import json

from common.mask import Mask
from common.removals import Removals, RemovedHead
from server.facts import HeadScores
from server.headmap import head_map
from server.rows import RunRow
from server.store import Store


def removals(store: Store, run: RunRow) -> Removals:
    """The heads that a run has removed so far, and the backbones that had more."""
    texts = store.masks(run.run)
    masks = {digest: Mask.from_json(text) for digest, text in texts.items()}
    candidates = store.candidates(run.run)
    now = Mask.from_json(store.last_mask(run))
    after = {number: masks[row.mask] for number, row in candidates.items()}
    scores = [
        HeadScores(number, row.farm, masks[row.mask], row.heads)
        for number, rows in store.scores(run.run).items()
        for row in rows
    ]
    config = json.loads(run.config_json)["config"]
    return Removals(
        network=config["server"]["name"],
        run=run.run,
        criterion=config["plan"]["criterion"],
        mask=now.digest,
        masks=texts,
        backbones={run.base: run.mask} | {row.digest: row.mask for row in candidates.values()},
        removed=tuple(
            RemovedHead(
                block=one.block,
                head=one.head,
                round=one.gone or 0,
                score=one.score,
                rank=one.rank,
                heads=one.heads,
            )
            for row in head_map(now, scores, after)
            for one in row
            if not one.kept
        ),
    )
