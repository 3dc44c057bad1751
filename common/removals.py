"""Which heads a run has removed, as a file that an operator hands to a farm.

A farm knows how many heads its backbone has left, not which ones went, nor how all farms together
ranked them. ``fieldfed-server mask export`` writes that down and ``fieldfed-client needs`` reads
it. It decides nothing, so it is not signed. Blocks and heads count from 0, in the dense backbone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError, ProtocolError
from common.mask import Mask
from common.messages import Digest, Finite
from common.plan import Criterion
from common.signing import NetworkName

MAX_BYTES = 16_000_000
Place = Annotated[int, Field(ge=0, le=65536)]
MaskText = Annotated[str, Field(max_length=2_000_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RemovedHead(_Part):
    """A head that is gone, and what all farms together said of it when they scored it last.

    ``score`` is over that of the mean head, ``rank`` counts from 1 among ``heads``.
    """

    block: Place
    head: Place
    round: Place = Field(description="after which it was removed")
    score: Finite | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    heads: Place = 0


class Removals(_Part):
    """What a run has removed; ``backbones`` says which mask a candidate of it carries."""

    format: Literal[1] = 1
    network: NetworkName
    run: Place
    criterion: Criterion
    mask: Digest = Field(description="that the run has come to")
    masks: Annotated[dict[Digest, MaskText], Field(min_length=1, max_length=1000)]
    backbones: Annotated[dict[Digest, Digest], Field(max_length=20_000)]
    removed: Annotated[tuple[RemovedHead, ...], Field(max_length=65536)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for digest, text in self.masks.items():
            try:
                found = Mask.from_json(text)
            except ProtocolError as error:
                raise ValueError(str(error)) from error
            if found.digest != digest:
                raise ValueError(f"mask {digest[:12]} is another one")
        if not {self.mask, *self.backbones.values()} <= self.masks.keys():
            raise ValueError("it names a mask that is not in it")
        now, units = self.kept, [(one.block, one.head) for one in self.removed]
        gone = [
            (block, head)
            for block, count in enumerate(now.dense_heads)
            for head in range(count)
            if head not in now.heads[block]
        ]
        if sorted(units) != gone:
            raise ValueError("the heads that it lists are not those that its mask lacks")
        return self

    @property
    def kept(self) -> Mask:
        """What is left."""
        return Mask.from_json(self.masks[self.mask])

    def carried(self) -> Mapping[str, Mask]:
        """The masks of backbones that still have heads which are gone now."""
        now = self.kept.heads
        found = {digest: Mask.from_json(text) for digest, text in self.masks.items()}
        more = {digest: one for digest, one in found.items() if one.heads != now}
        return {name: more[mask] for name, mask in self.backbones.items() if mask in more}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``mask export`` wrote.

        Raises:
            ConfigError: the file cannot be read, or is something else; names it.
        """
        try:
            body = path.read_bytes()
            if len(body) > MAX_BYTES:
                raise ValueError(f"{len(body)} bytes are too many")
            return cls.model_validate_json(body)
        except (OSError, ValueError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConfigError(
                f"'{path}' is no list of removed heads: {first[:200]}; have the server's operator "
                "write it: fieldfed-server mask export"
            ) from error
