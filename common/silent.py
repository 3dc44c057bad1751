"""An attention that has lost all of its heads: what is left of it is a constant.

A block whose heads are all masked still adds the bias of its projection, and compensation puts into
that bias what the heads said on average. So the block keeps this bias and its scale, and nothing
else: no norm before it, no queries, keys or values, and no multiply-accumulates. Its weights exist
with no rows or no columns, so that whatever goes through blocks alike (taps, gates, moments, cuts,
trained sets) finds none there instead of something else; what is stored leaves them out.
"""

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from common.errors import ModelError


class SilentAttention(Attention):
    """Takes the place of an attention: (B,N,C) -> (B,N,C), the same for every token.

    Args:
        attn: whose place it takes.
    """

    def __init__(self, attn: Attention) -> None:
        width = attn.qkv.in_features
        with torch.device("meta"):  # layers that are thrown away at once
            super().__init__(width, 1, attn_head_dim=attn.head_dim)
        self.num_heads = self.attn_dim = 0
        self.qkv = _linear(width, 0, attn.qkv.bias is not None)
        self.proj = _linear(0, attn.proj.out_features, attn.proj.bias is not None)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The constant; in an ONNX graph (1,1,C), for a product without columns has no form.

        Raises:
            ModelError: a mask is given.
        """
        if attn_mask is not None or is_causal:
            raise ModelError("an attention without heads takes no mask")
        bias: Tensor | None = self.proj.bias
        if torch.onnx.is_in_onnx_export():
            return x.new_zeros(1, 1, self.proj.out_features) if bias is None else bias[None, None]
        out: Tensor = self.proj(x.new_zeros((*x.shape[:2], 0)))  # so that hooks are called
        return out


def _linear(inside: int, outside: int, bias: bool) -> nn.Linear:
    """A layer without numbers but for its bias; torch warns of drawing none."""
    with torch.device("meta"):
        linear = nn.Linear(max(inside, 1), max(outside, 1), bias)
    linear.in_features, linear.out_features = inside, outside
    linear.weight = nn.Parameter(torch.empty(outside, inside))
    if bias:
        linear.bias = nn.Parameter(torch.zeros(outside))
    return linear
