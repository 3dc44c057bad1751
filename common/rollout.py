"""Which patches of an image its features are made of.

Attention rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020), with
attention weighed by what it carries (Kobayashi et al., "Attention is Not Only a Weight: Analyzing
Transformers with Vector Norms", 2020). In block l, token i takes from token j the share

    A[i,j] = sum_h g_h a_h[i,j] |W_h v_hj|,   rows divided by their sum

with a_h the attention of head h, v_hj its value, W_h its columns of the projection (and the
layer's scale), g_h its gate. Half of a token stays what it was, by the residual connection:

    R <- (A + I) / 2 R,   and where tokens are dropped or merged R is, as they are

From the identity R becomes (tokens that are left, tokens of the image); the map is the class
token's row, or the mean of all rows where patches are averaged, over the patches, of sum 1.
Nothing is learnt by it, the order of heads does not matter, and a head that is masked counts as
much as one that is gone: not at all. It is what was passed on, not a proof of what was decisive.

Shapes: B images, H heads of d channels, N tokens, C the backbone's width, (h, w) patches.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.backbone import block_layers
from common.efficient import EfficientAttention
from common.heads import evaluation_mode

TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def patch_shares(model: VisionTransformer, images: Tensor) -> Tensor:
    """How much of an image's features each patch makes up, (B,h,w), of sum 1 for an image.

    Args:
        model: a backbone, pruned, with linear attention or with fewer tokens perhaps.
        images: (B,3,S,S), normalised.
    """
    prefix = int(model.num_prefix_tokens)
    flow = _Flow()
    with ExitStack() as stack, evaluation_mode(model):
        for block, layers in zip(model.blocks, block_layers(model), strict=True):
            seen = _Seen(layers.attn, getattr(block, "ls1", None))
            hooks = (
                layers.attn.qkv.register_forward_hook(seen.keep_qkv),
                layers.attn.proj.register_forward_pre_hook(seen.keep_heads),
                layers.attn.register_forward_hook(partial(flow.follow, seen)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        model(images)
    assert flow.shares is not None
    rows_BN = flow.shares[:, 0] if model.global_pool == "token" else flow.shares[:, prefix:].mean(1)
    patches_BM = rows_BN[:, prefix:]
    grid = tuple(model.patch_embed.grid_size)
    shares: Tensor = patches_BM / patches_BM.sum(1, keepdim=True)
    return shares.reshape(-1, *grid)


class _Seen:
    """What a block's attention has just read, and what its heads have said of it."""

    def __init__(self, attn: Any, scale: nn.Module | None) -> None:
        self._attn, self._scale = attn, getattr(scale, "gamma", None)
        self._qkv_BNA = self._heads_BNA = torch.empty(0)

    def keep_qkv(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self._qkv_BNA = output.float()

    def keep_heads(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._heads_BNA = inputs[0].float()

    def taken(self) -> Tensor:
        """A, (B,N,N): rows of sum 1."""
        attn = self._attn
        images, tokens, _ = self._heads_BNA.shape
        if not attn.num_heads:  # nothing is taken from anywhere
            return self._heads_BNA.new_zeros(images, tokens, tokens)
        shape = images, tokens, 3, attn.num_heads, attn.head_dim
        q, k, v_BHNd = self._qkv_BNA.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        efficient = attn if isinstance(attn, EfficientAttention) else None
        weigh = _linear if efficient and efficient.linear else _softmax
        weight_BHNN = weigh(attn.q_norm(q), attn.k_norm(k))
        if efficient and efficient.sizes.now is not None:
            weight_BHNN = weight_BHNN * efficient.sizes.now[:, None, None, :]
        attention_BHNN = weight_BHNN / weight_BHNN.sum(-1, keepdim=True)
        weight_CHd = attn.proj.weight.float().unflatten(1, (attn.num_heads, attn.head_dim))
        if self._scale is not None:
            weight_CHd = weight_CHd * self._scale.float()[:, None, None]
        size_BHN = torch.einsum("bhnd,chd->bhnc", v_BHNd, weight_CHd).norm(dim=-1)
        size_BHN = size_BHN * self._gates(attention_BHNN @ v_BHNd)[:, :, None]
        taken_BNN = (attention_BHNN * size_BHN[:, :, None]).sum(1)
        shares: Tensor = taken_BNN / taken_BNN.sum(2, keepdim=True).clamp_min(TINY)
        return shares

    def _gates(self, plain: Tensor) -> Tensor:
        """What was left of the heads behind gates, (B,H), by what they say without, (B,H,N,d)."""
        heads = plain.shape[1]
        said_BNHd = self._heads_BNA.reshape(*self._heads_BNA.shape[:2], heads, -1)
        plain_BH = torch.linalg.vector_norm(plain, dim=(2, 3))
        gates: Tensor = torch.linalg.vector_norm(said_BNHd, dim=(1, 3)) / plain_BH.clamp_min(TINY)
        return gates


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    weight_BHNN: Tensor = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return weight_BHNN


def _linear(q: Tensor, k: Tensor) -> Tensor:
    weight_BHNN: Tensor = (functional.elu(q) + 1) @ (functional.elu(k) + 1).transpose(-2, -1)
    return weight_BHNN


class _Flow:
    """R, block after block."""

    def __init__(self) -> None:
        self.shares: Tensor | None = None

    def follow(self, seen: _Seen, attn: Any, _inputs: tuple[Any, ...], _output: Tensor) -> None:
        taken_BNN = seen.taken()
        if self.shares is None:
            self.shares = torch.eye(taken_BNN.shape[1]).expand_as(taken_BNN)
        self.shares = (taken_BNN @ self.shares + self.shares) / 2
        choice = getattr(attn, "choice", None)
        if choice is not None:  # fewer tokens leave the block once its attention is done
            self.shares = choice.of(self.shares)
