"""Cheaper attention: fewer tokens from block to block, or a cost that grows with their number only.

Both are named in a backbone's spec and have no parameters of their own, so its tensors stay as they
are. Shapes: B images, N tokens, H heads of d channels, C the backbone's width, P prefix tokens
(class token and registers).

Token sampling. Behind a block the k patch tokens that matter most stay, in their order. A token's
score is how much of its value a query attends to, over all heads,

    s_j = mean_h softmax_j(q_h k_hj / sqrt(d)) * |v_hj|

with the class token's query, or the mean query where there is no class token (class attention as in
EViT, Liang et al., 2022; times the norm of values as in ATS, Fayyaz et al., 2022). k is fixed for a
block, so that shapes are known beforehand. Dropped tokens are gone, or fused into one: their mean,
weighed by their scores.

Linear attention. With phi(x) = elu(x) + 1 (Katharopoulos et al., 2020)

    o_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) sum_j phi(k_j))
"""

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ModelError
from common.silent import SilentAttention
from common.spec import ModelSpec


class EfficientAttention(Attention):
    """timm's attention with its very layers; linear where asked for, and it scores tokens.

    Args:
        attn: whose layers are taken over.
        linear: whether the cost is to grow with N and not with its square.
        scored: whether ``scores`` (B,N) is to be left behind by every forward.
        class_token: whether token 0 is one; else the mean query scores.
    """

    def __init__(self, attn: Attention, *, linear: bool, scored: bool, class_token: bool) -> None:
        heads, width = attn.num_heads, attn.head_dim
        with torch.device("meta"):  # layers that are thrown away at once
            super().__init__(attn.qkv.in_features, heads, attn_head_dim=width)
        for name, layer in attn.named_children():
            setattr(self, name, layer)
        self.linear, self.scored, self.class_token = linear, scored, class_token
        self.scores: Tensor | None = None

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
        if self.scored:
            self.scores = token_scores(q_BHNd, k_BHNd, v_BHNd, self.class_token)
        attend = linear_attention if self.linear else functional.scaled_dot_product_attention
        o_BHNd = attend(q_BHNd, k_BHNd, v_BHNd)
        out: Tensor = self.proj(o_BHNd.transpose(1, 2).reshape(images, tokens, self.attn_dim))
        return out


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B,H,N,d) each -> (B,H,N,d); sums over tokens are taken in fp32."""
    dtype = v.dtype
    q, k, v = q.float(), k.float(), v.float()
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    # means, not sums: half precision afterwards never overflows
    state_BHdd = k.transpose(-2, -1) @ v / v.shape[-2]
    total_BHN1 = q @ k.mean(-2, keepdim=True).transpose(-2, -1)
    return (q @ state_BHdd / total_BHN1).to(dtype)


def token_scores(q: Tensor, k: Tensor, v: Tensor, class_token: bool) -> Tensor:
    """(B,H,N,d) each -> how much each token counts, (B,N), in fp32; nothing is learnt by it."""
    q, k, v = (one.detach().float() for one in (q, k, v))
    query_BH1d = q[:, :, :1] if class_token else q.mean(2, keepdim=True)
    attention_BHN = (query_BH1d @ k.transpose(-2, -1) / k.shape[-1] ** 0.5).softmax(-1).squeeze(2)
    scores: Tensor = (attention_BHN * torch.linalg.vector_norm(v, dim=-1)).mean(1)
    return scores


def sampled(x: Tensor, scores: Tensor, prefix: int, keep: int, fuse: bool) -> Tensor:
    """The prefix, the ``keep`` other tokens with the highest scores, and perhaps one for the rest.

    Args:
        x: tokens, (B,N,C).
        scores: of them, (B,N).
        prefix: tokens at the front that always stay.
        keep: others that stay, fewer than there are.
        fuse: whether one more stands for those that are dropped.

    Returns:
        (B, prefix + keep [+ 1], C).
    """
    patches_BMC, scores_BM = x[:, prefix:], scores[:, prefix:]
    order_BM = scores_BM.topk(patches_BMC.shape[1], dim=1).indices
    kept_BK = order_BM[:, :keep].sort(dim=1).values
    parts = [x[:, :prefix], _gathered(patches_BMC, kept_BK)]
    if fuse:
        gone_BR = order_BM[:, keep:]
        weight_BR = scores_BM.gather(1, gone_BR).clamp_min(torch.finfo(torch.float32).tiny)
        weight_BR = weight_BR / weight_BR.sum(1, keepdim=True)
        rest_BRC = _gathered(patches_BMC, gone_BR)
        parts.append(weight_BR[:, None].to(rest_BRC.dtype) @ rest_BRC)
    return torch.cat(parts, dim=1)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B,M,C) at index (B,K) -> (B,K,C)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


class _Sampler:
    """A forward hook of a block: fewer tokens leave it."""

    def __init__(self, attn: EfficientAttention, prefix: int, keep: int, fuse: bool) -> None:
        self._attn, self._prefix, self._keep, self._fuse = attn, prefix, keep, fuse

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        scores, self._attn.scores = self._attn.scores, None
        assert scores is not None
        return sampled(output, scores, self._prefix, self._keep, self._fuse)


def install(model: VisionTransformer, spec: ModelSpec) -> None:
    """Give a fresh backbone the attention that its spec names.

    Raises:
        ModelError: more tokens are to stay than there are, or an attention is not plain.
    """
    patches, prefix = int(model.patch_embed.num_patches), int(model.num_prefix_tokens)
    left = patches
    for number, block in enumerate(model.blocks):
        keep = spec.kept_tokens[number] if spec.kept_tokens else patches
        if keep > patches:
            raise ModelError(
                f"block {number} is to keep {keep} tokens; {spec.name} at {spec.image_size} px has "
                f"{patches}"
            )
        scored, linear = keep < left, number in spec.linear_blocks
        if not (scored or linear) or isinstance(block.attn, SilentAttention):
            continue
        assert isinstance(block.attn, Attention)
        attn = EfficientAttention(
            block.attn, linear=linear, scored=scored, class_token=model.cls_token is not None
        )
        block.attn = attn
        if scored:
            block.register_forward_hook(_Sampler(attn, prefix, keep, spec.fuse_tokens))
            left = keep
