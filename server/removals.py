"""What a run has removed, written down for farms (common/removals.py)."""

import json

from common.mask import Mask
from common.removals import Removals, RemovedHead
from server.facts import HeadScores
from server.headmap import head_map
from server.masks import masks_of
from server.rows import RunRow
from server.store import Store


def removals(store: Store, run: RunRow) -> Removals:
    """The heads that a run has removed so far, and the backbones that had more."""
    masks, candidates = masks_of(store, run), store.candidates(run.run)
    now = Mask.from_json(store.last_mask(run))
    scores = [
        HeadScores(number, row.farm, masks.by_digest[row.mask], row.heads)
        for number, rows in store.scores(run.run).items()
        for row in rows
    ]
    config = json.loads(run.config_json)["config"]
    return Removals(
        network=config["server"]["name"],
        run=run.run,
        criterion=config["plan"]["criterion"],
        mask=now.digest,
        masks=store.masks(run.run),
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
            for row in head_map(now, scores, masks.after)
            for one in row
            if not one.kept
        ),
    )


def newest_whole(store: Store, run: RunRow) -> str:
    """The digest of the newest backbone from which the cuts of this run have taken nothing."""
    of_now = [row.digest for row in store.candidates(run.run).values() if row.mask == run.mask]
    return [run.base, *of_now][-1]
