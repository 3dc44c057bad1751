"""Physical removal of heads and neurons, and its compensation in closed form.

Removal slices rows of ``qkv`` and columns of ``proj`` for heads, rows of ``fc1`` and columns of
``fc2`` for neurons; the result equals the masked model. Compensation lets the units that stay
take over what the removed ones can be predicted to have said: with second moments G of the layer's
inputs, keep-set K and gone-set g,

    W' = W_K + W_g G[g,K] (G[K,K] + eps diag G[K,K])^-1

Inputs are augmented by a constant 1, always in K, so that the bias takes part. It is the minimiser
of E||W_g x_g - D x_K||^2 + eps ||D diag(G[K,K])^1/2||^2 over the change D: never worse than D = 0
on the data it is fitted to, and a strong ridge gives the plain cut, not zero. (The textbook form
W G[:,K] (G[K,K] + eps I)^-1 shrinks small directions away beside a ViT's massive activations.)

Shapes: R images times tokens, A channels into a layer, O channels out of it.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.backbone import block_layers, build, spec_of
from common.errors import DataError, ModelError
from common.heads import PreHook, evaluation_mode, registered
from common.layout import Floats, Layout
from common.mask import Keep
from common.precision import bfloat16
from common.spec import ModelSpec
from common.trainable import FACTOR

Method = Literal["none", "bias", "least_squares"]
RIDGE = 1e-2
"""Of 1e-6 to 1, flat up to 1e-1 on a ViT-S with 260 source images; the larger, the safer."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums of x x^T over all tokens, x augmented by 1; float64 on the CPU.

    ``heads[l]`` (H*d+1, H*d+1) for the inputs of ``attn.proj``, ``neurons[l]`` (M+1, M+1) for those
    of ``mlp.fc2``, empty where they were not asked for; the last entry of each is the number of
    tokens seen.
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


# --- removal --------------------------------------------------------------------------------------


def prune(
    model: VisionTransformer, spec: ModelSpec, keep: Keep
) -> tuple[VisionTransformer, ModelSpec]:
    """A new, smaller backbone in eval mode; ``model`` stays as it is.

    Weights that keep all their units are shared with ``model``: a cut of some heads leaves two
    thirds of a backbone where it was. Change one of the two in place only when the other is gone.

    Args:
        model: built from ``spec``; any dtype and device, which the result keeps.
        spec: the model's spec.
        keep: kept units in the model's coordinates.

    Raises:
        ModelError: ``spec`` is not the model's, or ``keep`` names units it does not have.
    """
    if spec_of(model, spec) != spec:
        raise ModelError("the spec does not describe the model that is to be cut")
    _require_within(keep, spec)
    smaller = spec.with_units(tuple(map(len, keep.heads)), tuple(map(len, keep.neurons)))
    cuts = _cuts(spec, keep)
    state = {}
    with torch.device("meta"):  # no random initialisation: fast, and no draw from the global RNG
        pruned = build(smaller)
    names = pruned.state_dict().keys()  # an attention that goes as a whole takes its norm along
    for name, tensor in model.state_dict().items():
        if name not in names:
            continue
        dim, index = cuts.get(name, (0, None))
        if index is not None and len(index) < tensor.shape[dim]:
            state[name] = tensor.index_select(dim, index.to(tensor.device))
        else:  # a bias is cloned: compensation changes it
            state[name] = tensor.clone() if tensor.ndim == 1 else tensor
    pruned.load_state_dict(state, assign=True)
    return pruned, smaller


def slice_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec, keep: Keep) -> dict[str, Tensor]:
    """What is left of values shaped like a backbone's parameters, by name, once it is cut.

    Raises:
        ModelError: ``keep`` names units that ``spec`` does not have.
    """
    _require_within(keep, spec)
    cuts = _cuts(spec, keep)
    return {
        name: tensor.index_select(*cuts[name]) if name in cuts else tensor
        for name, tensor in tensors.items()
    }


def slice_flat(flat: Floats, before: Layout, spec: ModelSpec, keep: Keep, after: Layout) -> Floats:
    """What is left of numbers laid out ``before`` a cut of ``spec``, laid out as ``after`` it.

    Raises:
        ModelError: ``keep`` names units that ``spec`` does not have, or a layout does not fit.
        ProtocolError: ``flat`` does not fit ``before``.
    """
    return after.flatten(slice_tensors(before.unflatten(flat), spec, keep))


def _require_within(keep: Keep, spec: ModelSpec) -> None:
    for kind, kept, counts, least in (
        ("heads", keep.heads, spec.heads, 0),
        ("neurons", keep.neurons, spec.neurons, 1),
    ):
        if len(kept) != len(counts):
            raise ModelError(f"{len(kept)} blocks of {kind} to keep, the model has {len(counts)}")
        for block, (index, count) in enumerate(zip(kept, counts, strict=True)):
            ascending = len(index) >= least and bool((np.diff(index) > 0).all())
            if not ascending or (len(index) and (index[0] < 0 or index[-1] >= count)):
                raise ModelError(
                    f"{kind} to keep in block {block} must be ascending, at least {least}, "
                    f"below {count}; use the mask of this very model"
                )


def _channels(heads: Tensor, width: int) -> Tensor:
    """Indices (h,) of heads -> indices (h*width,) of their channels."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _cuts(spec: ModelSpec, keep: Keep) -> dict[str, tuple[int, Tensor]]:
    """Parameter name -> the dimension to cut and the indices that stay."""
    cuts: dict[str, tuple[int, Tensor]] = {}
    for block in range(spec.depth):
        prefix = f"blocks.{block}"
        inner = _channels(torch.from_numpy(keep.heads[block]), spec.head_width)
        dense_inner = spec.heads[block] * spec.head_width
        qkv = torch.cat([inner + part * dense_inner for part in range(3)])
        neurons = torch.from_numpy(keep.neurons[block])
        cuts |= {
            f"{prefix}.attn.qkv.weight": (0, qkv),
            f"{prefix}.attn.qkv.{FACTOR}": (0, qkv),
            f"{prefix}.attn.qkv.bias": (0, qkv),
            f"{prefix}.attn.proj.weight": (1, inner),
            f"{prefix}.attn.proj.{FACTOR}": (1, inner),
            f"{prefix}.mlp.fc1.weight": (0, neurons),
            f"{prefix}.mlp.fc1.{FACTOR}": (0, neurons),
            f"{prefix}.mlp.fc1.bias": (0, neurons),
            f"{prefix}.mlp.fc2.weight": (1, neurons),
            f"{prefix}.mlp.fc2.{FACTOR}": (1, neurons),
        }
    return cuts


# --- moments --------------------------------------------------------------------------------------


@torch.no_grad()
def collect_moments(
    model: VisionTransformer,
    batches: Iterable[Tensor],
    neurons: bool = True,
    autocast: bool = False,
) -> Moments:
    """Second moments of what enters ``proj`` and ``fc2``, over all tokens of all images.

    Args:
        model: the backbone to be cut; its train/eval mode is left as found.
        batches: image batches (B,3,S,S).
        neurons: of ``fc2`` too, which is as much work as the forward pass.
        autocast: run the forward pass in bfloat16; products and sums are as exact as without.

    Raises:
        DataError: no images, or activations that are not finite.
    """
    device = next(model.parameters()).device
    blocks = list(block_layers(model))
    layers = [block.attn.proj for block in blocks]
    layers += [block.fc2 for block in blocks] if neurons else []
    sums = [
        torch.zeros((layer.in_features + 1,) * 2, dtype=torch.float64, device=device)
        for layer in layers
    ]
    hooks = [(layer, _accumulator(total)) for layer, total in zip(layers, sums, strict=True)]
    with evaluation_mode(model), registered(hooks):
        for images in batches:
            with bfloat16(device, autocast):
                model(images.to(device))
    for total in sums:
        for start, end in _strips(len(total)):
            total[end:, start:end] = total[start:end, end:].T
    if sums[0][-1, -1] == 0:
        raise DataError("compensation needs images; check the source folder")
    if not all(torch.isfinite(total).all() for total in sums):
        raise DataError("activations are not finite on the source images; check the weights")
    moments = [total.cpu() for total in sums]
    return Moments(tuple(moments[: len(blocks)]), tuple(moments[len(blocks) :]))


def _accumulator(total: Tensor) -> PreHook:
    """Add x^T x of a batch to a float64 sum, on and right of its diagonal strips.

    Products are in the model's own precision, at least fp32: rounding stays far below the ridge,
    and fp64 would take twice as long.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x_RA = args[0].flatten(0, -2)
        x_RA = x_RA.float() if x_RA.dtype == torch.bfloat16 else x_RA
        x_RA = torch.cat([x_RA, x_RA.new_ones((len(x_RA), 1))], 1)
        with torch.autocast(x_RA.device.type, enabled=False):
            for start, end in _strips(len(total)):
                total[start:end, start:].add_(x_RA[:, start:end].T @ x_RA[:, start:])

    return hook


def _strips(side: int, count: int = 4) -> list[tuple[int, int]]:
    """Rows of a symmetric matrix in strips: what is left of their diagonal is not computed."""
    edges = [side * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))


# --- compensation ---------------------------------------------------------------------------------


@torch.no_grad()
def prune_compensated(
    model: VisionTransformer,
    spec: ModelSpec,
    keep: Keep,
    moments: Moments | None,
    method: Method = "least_squares",
    ridge: float = RIDGE,
) -> tuple[VisionTransformer, ModelSpec]:
    """:func:`prune`, then let the kept units take over what the removed ones said.

    Args:
        model: as for :func:`prune`.
        spec: likewise.
        keep: likewise.
        moments: of ``model`` on images the caller owns, of neurons only where some go; may be None
            for ``none``.
        method: ``least_squares``; ``bias`` folds only the mean; ``none`` is the plain cut.
        ridge: eps, relative to the diagonal of the second moments; above 0.

    Raises:
        ModelError: as for :func:`prune`; moments missing or of another model; ridge not above 0.
    """
    pruned, smaller = prune(model, spec, keep)
    if method == "none":
        return pruned, smaller
    _require_moments(moments, spec, keep, method, ridge)
    assert moments is not None
    for block, (old, new) in enumerate(zip(block_layers(model), block_layers(pruned), strict=True)):
        inner = _channels(torch.from_numpy(keep.heads[block]), spec.head_width)
        _compensate(old.attn.proj, new.attn.proj, inner, moments.heads[block], method, ridge)
        if moments.neurons:
            neurons = torch.from_numpy(keep.neurons[block])
            _compensate(old.fc2, new.fc2, neurons, moments.neurons[block], method, ridge)
    return pruned, smaller


def _require_moments(
    moments: Moments | None, spec: ModelSpec, keep: Keep, method: str, ridge: float
) -> None:
    if method not in ("bias", "least_squares"):
        raise ModelError(f"unknown compensation '{method}'; known: none, bias, least_squares")
    if moments is None:
        raise ModelError(f"compensation '{method}' needs second moments; collect them first")
    if not ridge > 0:
        raise ModelError(f"the ridge of a compensation must be above 0, not {ridge}")
    sides = [len(g) - 1 for g in (*moments.heads, *moments.neurons)]
    no_neuron_goes = [len(kept) for kept in keep.neurons] == list(spec.neurons)
    neurons = () if no_neuron_goes and not moments.neurons else spec.neurons
    if sides != [*(heads * spec.head_width for heads in spec.heads), *neurons]:
        raise ModelError("the second moments are of another model; collect them again")


def _compensate(
    old: nn.Linear, new: nn.Linear, kept: Tensor, G: Tensor, method: str, ridge: float
) -> None:
    """Write W' and b' into the already cut layer ``new``."""
    gone_mask = torch.ones(old.in_features, dtype=torch.bool)
    gone_mask[kept] = False
    gone = gone_mask.nonzero().flatten()
    constant = torch.tensor([old.in_features])
    if len(gone) == 0 or (method == "bias" and new.bias is None):
        return
    columns = constant if method == "bias" else kept
    if method == "least_squares" and new.bias is not None:
        columns = torch.cat([kept, constant])
    epsilon = 0.0 if method == "bias" else ridge
    W_Og = old.weight.detach().cpu().double()[:, gone]
    change_OK = _take_over(W_Og, G, gone, columns, epsilon).to(new.weight.device)
    if new.bias is not None:
        new.bias.copy_(new.bias.double() + change_OK[:, -1])
        change_OK = change_OK[:, :-1]
    if method == "least_squares":
        new.weight.copy_(new.weight.double() + change_OK)


def _take_over(W_Og: Tensor, G: Tensor, gone: Tensor, columns: Tensor, epsilon: float) -> Tensor:
    """W_g G[g,K] (G[K,K] + eps diag G[K,K])^-1, (O,K), in float64."""
    return solve_ridge(G[columns][:, columns].clone(), G[columns][:, gone] @ W_Og.T, epsilon)


def solve_ridge(G_KK: Tensor, right_KO: Tensor, epsilon: float) -> Tensor:
    """D (O,K) of D (G + eps diag G) = right^T.

    Args:
        G_KK: second moments, float64; changed.
        right_KO: products with what is to be said, float64.
        epsilon: relative to the diagonal, >= 0.
    """
    diagonal = G_KK.diagonal()
    # A channel that is always zero leaves an empty row: any positive pivot gives it weight zero.
    diagonal += epsilon * diagonal + torch.where(diagonal > 0, 0.0, 1.0)
    factor, failed = torch.linalg.cholesky_ex(G_KK)
    if failed:
        solution: Tensor = torch.linalg.lstsq(G_KK, right_KO, driver="gelsd").solution
        return solution.T
    return torch.cholesky_solve(right_KO, factor).T
