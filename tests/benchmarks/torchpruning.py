"""The mask that Torch-Pruning would choose: its Taylor importance, its groups, its removal.

Torch-Pruning (Fang et al., "DepGraph", 2023) is fed with the mean of the farms' gradients of the
cross-entropy. It removes whole heads and MLP neurons, and leaves the embedding width alone; heads
and neurons are each ranked over all blocks (Fang et al., "Isomorphic Pruning", 2024). Its pruning
ratio is searched until our own count of MACs meets the budget.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch_pruning.pruner.algorithms.base_pruner import BasePruner

from common.backbone import block_layers, macs
from common.budget import Budget
from common.costs import unit_costs
from common.mask import Mask
from common.spec import ModelSpec
from common.surgery import prune

SEARCHES = 12


def choose(
    model: VisionTransformer, gradients: Mapping[str, Tensor], dense: ModelSpec, budget: Budget
) -> Mask:
    """The largest mask of Torch-Pruning that meets a budget of MACs.

    Args:
        model: dense, left as it is.
        gradients: by parameter name.
        dense: the model's spec.
        budget: ``macs_kept``; all else is for Torch-Pruning to decide.
    """
    assert budget.macs_kept is not None
    total, _, _ = unit_costs(dense)
    low, high = 0.0, 1.0  # of the pruning ratio: too little goes, enough goes
    best: Mask | None = None
    for _ in range(SEARCHES):
        ratio = (low + high) / 2
        mask = _mask(model, gradients, dense, ratio)
        if macs(mask.apply_to(dense)) <= budget.macs_kept * total:
            best, high = mask, ratio
        else:
            low = ratio
    assert best is not None
    return best


def _mask(
    model: VisionTransformer, gradients: Mapping[str, Tensor], dense: ModelSpec, ratio: float
) -> Mask:
    """What Torch-Pruning keeps at a pruning ratio of heads and neurons alike."""
    cut = copy.deepcopy(model)
    for name, weight in cut.named_parameters():
        weight.requires_grad_(True)
        weight.grad = gradients[name].clone()
    layers = block_layers(cut)
    heads = [set(range(count)) for count in dense.heads]
    neurons = [set(range(count)) for count in dense.neurons]
    widths = [block.attn.head_dim for block in layers]
    inputs = {block.attn.proj: number for number, block in enumerate(layers)}
    hidden = {block.fc1: number for number, block in enumerate(layers)}
    pruner = _pruner(cut, layers, dense, ratio)
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            layer, kind = dependency.target.module, dependency.handler
            if layer in inputs and kind == tp.prune_linear_in_channels:
                heads[inputs[layer]] -= {index // widths[inputs[layer]] for index in indices}
            if layer in hidden and kind == tp.prune_linear_out_channels:
                neurons[hidden[layer]] -= set(indices)
        group.prune()
    mask = Mask(
        tuple(tuple(sorted(kept)) for kept in heads),
        tuple(tuple(sorted(kept)) for kept in neurons),
        dense.heads,
        dense.neurons,
    )
    _require_same(cut, model, dense, mask)
    return mask


def _pruner(cut: VisionTransformer, layers: Any, dense: ModelSpec, ratio: float) -> Any:
    embedding = [cut.patch_embed, *(block.attn.proj for block in layers)]
    return BasePruner(
        cut,
        torch.zeros(1, 3, dense.image_size, dense.image_size),
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads={block.attn.qkv: block.attn.num_heads for block in layers},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[*embedding, *(block.fc2 for block in layers)],
    )


def _require_same(
    cut: VisionTransformer, model: VisionTransformer, dense: ModelSpec, mask: Mask
) -> None:
    """Its removal and ours leave the same weights."""
    ours, _ = prune(model, dense, mask.keep_in(Mask.dense(dense)))
    theirs = cut.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
