"""The masks that a run has stood on, as far as it went."""

from dataclasses import dataclass

from common.mask import Mask
from server.rows import RunRow
from server.store import Store


@dataclass(frozen=True)
class Masks:
    """``by_digest`` all of them, the oldest first; ``after`` the one that a round ended with."""

    by_digest: dict[str, Mask]
    after: dict[int, Mask]


def masks_of(store: Store, run: RunRow) -> Masks:
    """Those of a run."""
    masks = {digest: Mask.from_json(text) for digest, text in store.masks(run.run).items()}
    after = {number: masks[row.mask] for number, row in store.candidates(run.run).items()}
    return Masks(masks, after)
