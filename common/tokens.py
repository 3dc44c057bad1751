"""Which patch tokens go behind a block: they are dropped, or merged into the most similar.

Nothing is learnt by it, and how many stay is fixed for a block: shapes are known beforehand. Prefix
tokens (class token and registers) always stay. Shapes: B images, N tokens, H heads of d channels.

Dropping. The k patch tokens that matter most stay, in their order. A token's score is how much of
its value a query attends to, over all heads,

    s_j = mean_h softmax_j(q_h k_hj / sqrt(d)) * |v_hj|

with the class token's query, or the mean query where there is no class token (class attention as in
EViT, Liang et al., 2022; times the norm of values as in ATS, Fayyaz et al., 2022).

Merging (ToMe, Bolya et al., "Token Merging: Your ViT But Faster", 2023). Every second patch token
looks for the one among the others whose key, the mean over heads, has the largest cosine with its
own; the pairs that are most alike become one token, the mean of all patches it stands for. Where
more than half is to go, this is done again.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Choice(Protocol):
    """Which tokens of some images stay."""

    @property
    def sizes(self) -> Tensor | None:
        """How many patches each that stays stands for, (B,K); None: one each."""

    def of(self, x: Tensor) -> Tensor:
        """Tokens (B,N,C) -> those that stay, (B,K,C)."""


@dataclass(frozen=True)
class Dropped:
    """Prefix tokens, and patch tokens at ``kept`` (B,K)."""

    prefix: int
    kept: Tensor
    sizes: None = None

    def of(self, x: Tensor) -> Tensor:
        """The tokens that stay are what they were."""
        return torch.cat([x[:, : self.prefix], _gathered(x[:, self.prefix :], self.kept)], dim=1)


@dataclass(frozen=True)
class _Fold:
    """Of patch tokens 0, 2, ..., those at ``gone`` (B,R) are merged into ``into`` of 1, 3, ...

    Those at ``stay`` come first, the odd ones behind them; ``size`` (B,M) is how many patches each
    token stood for before, ``left`` (B,K) afterwards.
    """

    stay: Tensor
    gone: Tensor
    into: Tensor
    size: Tensor
    left: Tensor

    def of(self, patches: Tensor) -> Tensor:
        """(B,M,C) -> (B,K,C), in fp32."""
        summed = _folded(patches.float() * self.size[:, :, None], self.stay, self.gone, self.into)
        return summed / self.left[:, :, None]


@dataclass(frozen=True)
class Merged:
    """Prefix tokens, and patch tokens after some folds."""

    prefix: int
    folds: tuple[_Fold, ...]

    @property
    def sizes(self) -> Tensor:
        """Prefix tokens count once."""
        left = self.folds[-1].left
        return torch.cat([left.new_ones(left.shape[0], self.prefix), left], dim=1)

    def of(self, x: Tensor) -> Tensor:
        """Merged tokens are the means of what they stand for."""
        patches = x[:, self.prefix :]
        for fold in self.folds:
            patches = fold.of(patches)
        return torch.cat([x[:, : self.prefix], patches.to(x.dtype)], dim=1)


def token_scores(q: Tensor, k: Tensor, v: Tensor, class_token: bool) -> Tensor:
    """(B,H,N,d) each -> how much each token counts, (B,N), in fp32."""
    q, k, v = (one.detach().float() for one in (q, k, v))
    query_BH1d = q[:, :, :1] if class_token else q.mean(2, keepdim=True)
    attention_BHN = (query_BH1d @ k.transpose(-2, -1) / k.shape[-1] ** 0.5).softmax(-1).squeeze(2)
    scores: Tensor = (attention_BHN * torch.linalg.vector_norm(v, dim=-1)).mean(1)
    return scores


def dropped(scores: Tensor, prefix: int, keep: int) -> Dropped:
    """The ``keep`` patch tokens with the highest scores (B,N) stay."""
    return Dropped(prefix, scores[:, prefix:].topk(keep, dim=1).indices.sort(dim=1).values)


def merged(k: Tensor, size: Tensor | None, prefix: int, keep: int) -> Merged:
    """Merge the most similar patch tokens until ``keep`` are left.

    Args:
        k: keys, (B,H,N,d).
        size: how many patches each token stands for, (B,N); None: one each.
        prefix: tokens at the front that always stay.
        keep: patch tokens that are left, fewer than there are.
    """
    keys_BMd = k.detach().float().mean(1)[:, prefix:]
    size_BM = torch.ones_like(keys_BMd[:, :, 0]) if size is None else size[:, prefix:]
    folds = []
    for gone in halvings(keys_BMd.shape[1], keep):
        fold = _most_alike(keys_BMd, size_BM, gone)
        keys_BMd, size_BM = fold.of(keys_BMd), fold.left
        folds.append(fold)
    return Merged(prefix, tuple(folds))


def halvings(count: int, keep: int) -> list[int]:
    """How many of ``count`` tokens are merged each time until ``keep`` are left."""
    found = []
    while count > keep:
        found.append(min(count - keep, count // 2))
        count -= found[-1]
    return found


def _most_alike(keys: Tensor, size: Tensor, count: int) -> _Fold:
    """The fold of the ``count`` pairs whose keys (B,M,d) are most alike."""
    direction = functional.normalize(keys, dim=-1)
    likeness_BEO = direction[:, ::2] @ direction[:, 1::2].transpose(1, 2)
    best_BE, partner_BE = likeness_BEO.max(dim=2)
    order_BE = best_BE.topk(best_BE.shape[1], dim=1).indices
    gone, stay = order_BE[:, :count], order_BE[:, count:].sort(dim=1).values
    into = partner_BE.gather(1, gone)
    left = _folded(size[:, :, None], stay, gone, into)[:, :, 0]
    return _Fold(stay, gone, into, size, left)


def _folded(x: Tensor, stay: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """Sums (B,K,C) of what becomes one token of (B,M,C)."""
    even, odd = x[:, ::2], x[:, 1::2]
    where = into[:, :, None].expand(-1, -1, x.shape[2])
    return torch.cat([_gathered(even, stay), odd.scatter_add(1, where, _gathered(even, gone))], 1)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B,M,C) at index (B,K) -> (B,K,C)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
