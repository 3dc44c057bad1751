"""Layer by layer, let a pruned backbone say of some images what a fuller one says of them.

Compensation at a cut (common/surgery.py) knows the images of those who were asked, and each layer
by itself. Here the images may be anybody's: a farm's that had no say. Blocks are gone through from
the first to the last, attention before MLP. With x what enters the last layer of a branch in the
pruned backbone, W and b that layer, and e how far the residual stream behind the branch is from
the fuller backbone's, over the branch's scale:

    D = argmin E||e - D [x; 1]||^2 + eps ||D diag(E[x x^T; 1])^1/2||^2,    [W b] <- [W b] + D

So a layer makes up for what those before it left, too, as in channel pruning of whole networks
(He et al., ICCV 2017). There is no training, and there are no labels. Shapes: B images, N tokens,
R both, A channels into a layer, C the width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from common.backbone import block_layers
from common.errors import DataError, ModelError
from common.heads import evaluation_mode
from common.spec import ModelSpec
from common.surgery import solve_ridge

RIDGE = 1.0
"""Between 0.01 and 1 it made no difference that could be told on 48 to 192 images of three species;
the larger, the closer to what all farms share."""


@torch.no_grad()
def reconstruct(
    model: VisionTransformer,
    spec: ModelSpec,
    fuller: VisionTransformer,
    fuller_spec: ModelSpec,
    batches: Iterable[Tensor],
    ridge: float = RIDGE,
) -> None:
    """Fit the last layers of all branches of ``model``, in place, to what ``fuller`` says.

    The residual streams of all images are in memory: of 200 at 112 px and a ViT-S, 40 MB.

    Args:
        model: pruned; in float32 on the CPU.
        spec: of the model.
        fuller: of the same architecture, with more heads and neurons; left as it is.
        fuller_spec: of that.
        batches: images (B,3,S,S), normalised.
        ridge: eps, relative to the second moments; above 0.

    Raises:
        ModelError: the two are not of one architecture and image size, or drop tokens on the way.
        DataError: no image.
    """
    _require_alike(spec, fuller_spec)
    with evaluation_mode(model), evaluation_mode(fuller):
        streams = [_Streams(_entering(model, one), _entering(fuller, one)) for one in batches]
        if not streams:
            raise DataError("a backbone can be fitted anew to images only; there are none")
        for ours, theirs in zip(_branches(model), _branches(fuller), strict=True):
            change = _change(ours, theirs, streams, ridge)
            if change is not None:
                _add(ours.last, change)
            for one in streams:
                one.ours = ours(one.ours)


@dataclass
class _Streams:
    """The residual streams (B,N,C) of a batch in both backbones, up to some branch."""

    ours: Tensor
    theirs: Tensor


@dataclass(frozen=True, eq=False)
class _Branch:
    """An attention or an MLP, with its norm, its last layer and its scale (C,), if any."""

    norm: nn.Module
    body: nn.Module
    last: nn.Linear
    scale: nn.Module

    def __call__(self, stream: Tensor) -> Tensor:
        """The residual stream behind the branch, from that before it."""
        said: Tensor = self.scale(self.body(self.norm(stream)))
        return stream + said

    def watched(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and what the last layer multiplies, (R,A), its constant among it."""
        seen: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
        try:
            after = self(stream)
        finally:
            handle.remove()
        x_RA = seen[0].flatten(0, -2)
        if self.last.bias is None:
            return after, x_RA
        return after, torch.cat([x_RA, x_RA.new_ones((len(x_RA), 1))], 1)

    @property
    def gamma(self) -> Tensor:
        """The scale as numbers; () where there is none."""
        found = getattr(self.scale, "gamma", None)
        return torch.ones(()) if found is None else found


def _branches(model: VisionTransformer) -> Iterator[_Branch]:
    for block, layers in zip(model.blocks, block_layers(model), strict=True):
        if not isinstance(block, Block):
            raise ModelError(f"a {type(block).__name__} adds up in a way that is not known here")
        yield _Branch(block.norm1, layers.attn, layers.attn.proj, block.ls1)
        yield _Branch(block.norm2, layers.mlp, layers.fc2, block.ls2)


def _change(ours: _Branch, theirs: _Branch, streams: list[_Streams], ridge: float) -> Tensor | None:
    """D (C,A); None where no unit is left. ``streams`` go on in the fuller backbone."""
    last = ours.last
    inner = last.in_features + (last.bias is not None)
    G = torch.zeros((inner, inner), dtype=torch.float64)
    right = torch.zeros((inner, last.out_features), dtype=torch.float64)
    for one in streams:
        one.theirs = theirs(one.theirs)
        if last.in_features == 0:
            continue
        after, x_RA = ours.watched(one.ours)
        # a channel that the scale silences can make up for nothing
        left_RC = torch.where(ours.gamma == 0, 0.0, (one.theirs - after) / ours.gamma)
        G += x_RA.T @ x_RA
        right += x_RA.T @ left_RC.flatten(0, -2)
    return None if last.in_features == 0 else solve_ridge(G, right, ridge)


def _add(layer: nn.Linear, change: Tensor) -> None:
    """Into numbers of its own: a cut shares with what was cut the layers that it left whole."""
    layer.weight.data = layer.weight + change[:, : layer.in_features].to(layer.weight)
    if layer.bias is not None:
        layer.bias.data = layer.bias + change[:, -1].to(layer.bias)


def _entering(model: VisionTransformer, images: Tensor) -> Tensor:
    """What enters the first block, (B,N,C)."""
    seen: list[Tensor] = []
    first = model.blocks[0]
    handle = first.register_forward_pre_hook(lambda _block, args: seen.append(args[0]))
    try:
        model.forward_features(images)
    finally:
        handle.remove()
    return seen[0]


def _require_alike(spec: ModelSpec, fuller: ModelSpec) -> None:
    same = (spec.name, spec.image_size, spec.options, spec.width)
    if same != (fuller.name, fuller.image_size, fuller.options, fuller.width):
        raise ModelError(
            f"{fuller.name} at {fuller.image_size} px cannot tell {spec.name} at "
            f"{spec.image_size} px what it should say: take a backbone of the same network"
        )
    if spec.kept_tokens or fuller.kept_tokens:
        raise ModelError(f"{spec.name} drops tokens on the way: it cannot be fitted token by token")
