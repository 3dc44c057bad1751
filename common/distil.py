"""What a student learns from a teacher beside the labels: soft answers, and where to look.

    L = CE(student, label) + alpha T^2 KL(teacher || student, softened by T)
        + beta |map(teacher) - map(student)|^2

Soft answers are those of Hinton et al. (2015). Maps are compared as in attention transfer
(Zagoruyko and Komodakis, 2017), each divided by its length, the teacher's brought to the student's
grid. A vision transformer's map is how much the class token attends to each patch, the mean over
the heads of its last block; any other network's is the energy of its last feature map, the sum of
squares over channels. Shapes: B images, K classes, H heads, N tokens, (h, w) a grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from common.backbone import block_layers
from common.errors import ModelError
from common.spec import ModelSpec

_TINY = 1e-12


def soft_answers(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits (B,K), the mean over images, a scalar."""
    log_student = functional.log_softmax(student / temperature, 1)
    log_teacher = functional.log_softmax(teacher / temperature, 1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def token_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of (..., C), over the teacher's own spread around its mean, a scalar.

    0: the same; 1: no better than the teacher's mean.
    """
    s_RC, t_RC = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    spread = (t_RC - t_RC.mean(0)).square().sum().clamp_min(_TINY)
    return (s_RC - t_RC).square().sum() / spread


def map_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of maps (B,h,w) and (B,h',w') of length 1, the mean over images, a scalar.

    The teacher's is resized to (h,w); it lies between 0 and 4.
    """
    grid = student.shape[1:]
    if teacher.shape[1:] != grid:
        resized = functional.interpolate(
            teacher[:, None], size=tuple(grid), mode="bilinear", antialias=True
        )
        teacher = resized[:, 0]
    units = [functional.normalize(one.flatten(1), dim=1) for one in (student, teacher)]
    return (units[0] - units[1]).square().sum(1).mean()


def energy(features: Tensor) -> Tensor:
    """The map of a feature map (B,C,h,w): sum of squares over channels, (B,h,w)."""
    if features.ndim != 4:
        raise ModelError(f"a feature map has four dimensions, not {features.ndim}")
    return features.square().sum(1)


@contextmanager
def attention_map(model: VisionTransformer, spec: ModelSpec) -> Iterator[list[Tensor]]:
    """Watch where a vision transformer looks: after each forward the only item is (B,h,w).

    Raises:
        ModelError: it has no class token, or its last block does not see all tokens.
    """
    if model.cls_token is None or spec.kept_tokens:
        raise ModelError(f"{spec.name} without all of its tokens, or a class token, has no map")
    # the last that looks anywhere: an attention may be gone as a whole
    attn = [layers.attn for layers in block_layers(model) if layers.attn.num_heads][-1]
    prefix, grid = int(model.num_prefix_tokens), tuple(model.patch_embed.grid_size)
    seen: dict[str, Tensor] = {}
    maps: list[Tensor] = [torch.empty(0)]

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output.float()

        return hook

    def look(_module: nn.Module, _inputs: tuple[Any, ...], _output: Tensor) -> None:
        query_BH1d, k_BHNd = seen.pop("q")[:, :, :1], seen.pop("k")
        scale = k_BHNd.shape[-1] ** -0.5
        weight_BHN = (query_BH1d @ k_BHNd.transpose(-2, -1) * scale).softmax(-1)[:, :, 0]
        maps[0] = weight_BHN[:, :, prefix:].mean(1).unflatten(1, grid)

    hooks = [
        attn.q_norm.register_forward_hook(keep("q")),
        attn.k_norm.register_forward_hook(keep("k")),
        attn.register_forward_hook(look),
    ]
    try:
        yield maps
    finally:
        for one in hooks:
            one.remove()
