"""Cheaper attention: fewer tokens from block to block, or a cost that grows with their number only.

Both are named in a backbone's spec and have no parameters of their own, so its tensors stay as they
are. Which tokens go is common/tokens.py's. A token that stands for s patches is attended to as s
tokens are (proportional attention, Bolya et al., 2023): log(s) is added to its logits.

Linear attention. With phi(x) = elu(x) + 1 (Katharopoulos et al., 2020)

    o_i = phi(q_i) (sum_j s_j phi(k_j) v_j^T) / (phi(q_i) sum_j s_j phi(k_j))

Shapes: B images, N tokens, H heads of d channels, C the backbone's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ModelError
from common.silent import SilentAttention
from common.spec import ModelSpec
from common.tokens import Choice, dropped, merged, token_scores

Choose = Callable[[Tensor, Tensor, Tensor, Tensor | None], Choice]
"""From queries, keys and values, (B,H,N,d) each, and how many patches each token stands for."""


@dataclass
class Sizes:
    """How many patches each token of the images that pass stands for, (B,N); None: one each."""

    now: Tensor | None = None


class EfficientAttention(Attention):
    """timm's attention with its very layers; linear where asked for, and it chooses tokens.

    Args:
        attn: whose layers are taken over.
        linear: whether the cost is to grow with N and not with its square.
        sizes: of the tokens that come, shared by all blocks from the first that chooses.
        choose: which tokens stay; every forward leaves its ``choice`` behind. None: all of them.
    """

    def __init__(
        self, attn: Attention, *, linear: bool, sizes: Sizes, choose: Choose | None
    ) -> None:
        heads, width = attn.num_heads, attn.head_dim
        with torch.device("meta"):  # layers that are thrown away at once
            super().__init__(attn.qkv.in_features, heads, attn_head_dim=width)
        for name, layer in attn.named_children():
            setattr(self, name, layer)
        self.linear, self.sizes, self.choose = linear, sizes, choose
        self.choice: Choice | None = None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B,N,C) -> (B,N,C); raises ModelError where a mask is given."""
        if attn_mask is not None or is_causal:
            raise ModelError("efficient attention takes no mask")
        images, tokens, _ = x.shape
        shape = images, tokens, 3, self.num_heads, self.head_dim
        q_BHNd, k_BHNd, v_BHNd = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        q_BHNd, k_BHNd = self.q_norm(q_BHNd), self.k_norm(k_BHNd)
        size_BN = self.sizes.now
        if self.choose is not None:
            self.choice = self.choose(q_BHNd, k_BHNd, v_BHNd, size_BN)
        attend = linear_attention if self.linear else softmax_attention
        o_BHNd = attend(q_BHNd, k_BHNd, v_BHNd, size_BN)
        out: Tensor = self.proj(o_BHNd.transpose(1, 2).reshape(images, tokens, self.attn_dim))
        return out


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """(B,H,N,d) each, sizes (B,N) -> (B,H,N,d)."""
    bias = None if size is None else size.log()[:, None, None, :].to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
    """(B,H,N,d) each, sizes (B,N) -> (B,H,N,d); sums over tokens are taken in fp32."""
    dtype = v.dtype
    q, k, v = q.float(), k.float(), v.float()
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    if size is not None:
        k = k * size[:, None, :, None]
    # means, not sums: half precision afterwards never overflows
    state_BHdd = k.transpose(-2, -1) @ v / v.shape[-2]
    total_BHN1 = q @ k.mean(-2, keepdim=True).transpose(-2, -1)
    return (q @ state_BHdd / total_BHN1).to(dtype)


class _First:
    """A forward hook before the first block that chooses: images come with a token per patch."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self._sizes.now = None


class _Sampler:
    """A forward hook of a block: fewer tokens leave it."""

    def __init__(self, attn: EfficientAttention) -> None:
        self._attn = attn

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        choice, self._attn.choice = self._attn.choice, None
        assert choice is not None
        self._attn.sizes.now = choice.sizes
        return choice.of(output)


def install(model: VisionTransformer, spec: ModelSpec) -> None:
    """Give a fresh backbone the attention that its spec names.

    Raises:
        ModelError: more tokens are to stay than there are, or an attention is not plain.
    """
    left, sizes, fewer = int(model.patch_embed.num_patches), Sizes(), False
    for number, block in enumerate(model.blocks):
        keep = _kept(spec, number, int(model.patch_embed.num_patches))
        sampled, linear = keep < left, number in spec.linear_blocks
        if sampled and not fewer:
            block.register_forward_pre_hook(_First(sizes))
        fewer = fewer or sampled
        weighed = fewer and spec.merge_tokens
        if not (weighed or sampled or linear) or isinstance(block.attn, SilentAttention):
            continue
        assert isinstance(block.attn, Attention)
        choose = _chooser(model, spec, keep) if sampled else None
        seen = sizes if fewer else Sizes()  # before, there is a token per patch
        attn = EfficientAttention(block.attn, linear=linear, sizes=seen, choose=choose)
        block.attn = attn
        if sampled:
            block.register_forward_hook(_Sampler(attn))
            left = keep


def chooses_tokens(model: nn.Module) -> bool:
    """Whether which tokens go is decided image by image."""
    return any(
        isinstance(module, EfficientAttention) and module.choose is not None
        for module in model.modules()
    )


def _kept(spec: ModelSpec, block: int, patches: int) -> int:
    keep = spec.kept_tokens[block] if spec.kept_tokens else patches
    if keep > patches:
        raise ModelError(
            f"block {block} is to keep {keep} tokens; {spec.name} at {spec.image_size} px has "
            f"{patches}"
        )
    return keep


def _chooser(model: VisionTransformer, spec: ModelSpec, keep: int) -> Choose:
    prefix, class_token = int(model.num_prefix_tokens), model.cls_token is not None
    if spec.merge_tokens:
        return lambda _q, k, _v, size: merged(k, size, prefix, keep)
    return lambda q, k, v, _size: dropped(token_scores(q, k, v, class_token), prefix, keep)
