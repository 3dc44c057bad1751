"""Scores of heads and neurons, lowered where the other units can stand in for one.

Compensation (common/surgery.py) lets the units that stay say what the removed ones said, as far as
that can be predicted. What a cut costs is therefore not how much a unit matters, but how much it
matters that nobody else can say. Units of a block are removed in thought, the least missed first,
as the optimal brain surgeon does (Hassibi and Stork, 1993; in groups, Kurtic et al., "ZipLM",
2023): with H = G + eps diag G of the second moments G of what enters ``proj`` or ``fc2``, removing
unit u and letting all others compensate raises the squared error of the layer's output by

    rho_u = tr(W_u ([H^-1]_uu)^-1 W_u^T),   then   W -= W_u ([H^-1]_uu)^-1 [H^-1]_u,:

and the score becomes T_u * sqrt(rho_u / rho0_u), where rho0_u = tr(W_u G_uu W_u^T) is the error of
taking u out of the whole layer without compensation. The root, because T is first-order: it grows
with a unit's output, rho with its square.

Shapes: U units of width w in a block, A = U * w channels into its layer, O channels out of it.
"""

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.backbone import block_layers
from common.errors import ModelError
from common.scores import Floats, UnitScores
from common.surgery import RIDGE, Moments

STEPS = 48
"""A block's units go in at most so many steps; those of one step do not hear of each other."""
_TINY = 1e-30


@torch.no_grad()
def irreplaceable(
    scores: UnitScores, model: VisionTransformer, moments: Moments, ridge: float = RIDGE
) -> UnitScores:
    """What is left of each score once the other units of the block stand in.

    Args:
        scores: of the units of ``model``, not negative.
        model: the backbone to be cut.
        moments: of ``model``, on the images that the compensation will be fitted to; where they say
            nothing of neurons, none is to go, and the scores of neurons stay.
        ridge: eps, that of the compensation.

    Returns:
        Scores of the same shape, ascending within a block in the order of removal.

    Raises:
        ModelError: scores or moments are of another model.
    """
    layers = block_layers(model)
    heads = [
        _lowered(block.attn.proj, G, one, ridge)
        for block, G, one in zip(layers, moments.heads, scores.heads, strict=True)
    ]
    if not moments.neurons:
        return UnitScores(tuple(heads), scores.neurons)
    neurons = [
        _lowered(block.fc2, G, one, ridge)
        for block, G, one in zip(layers, moments.neurons, scores.neurons, strict=True)
    ]
    return UnitScores(tuple(heads), tuple(neurons))


def _lowered(layer: nn.Linear, G: Tensor, scores: Floats, ridge: float) -> Floats:
    """The scores (U,) of the units that enter a layer; there may be none."""
    if not len(scores) and not layer.in_features:
        return scores
    if not len(scores) or layer.in_features % len(scores) or len(G) != layer.in_features + 1:
        raise ModelError("scores or second moments are of another model; collect them again")
    bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    W_OA = torch.cat([layer.weight, bias[:, None]], 1).cpu().double()
    block = _Block(W_OA, G.double(), len(scores), ridge)
    importance_U = torch.from_numpy(scores.astype(np.float64))
    found = np.zeros(len(scores), dtype=np.float32)
    left, last = torch.arange(len(scores)), np.float32(0)
    portion = -(-len(scores) // STEPS)
    while len(left):
        lowered = importance_U[left] * block.factors(left)
        order = torch.argsort(lowered, stable=True)
        for at in order[:portion].tolist():
            # a unit may be missed less than one before it: the order of removal is what counts
            last = np.maximum(np.float32(lowered[at]), np.nextafter(last, np.float32(np.inf)))
            found[left[at]] = last
        gone, left = left[order[:portion]], left[order[portion:].sort().values]
        block.remove(gone)
    return found


class _Block:
    """One layer while its units are removed, one portion after the other, in float64.

    W is augmented by the bias, G by the constant 1.
    """

    def __init__(self, W_OA: Tensor, G: Tensor, units: int, ridge: float) -> None:
        self._W = W_OA
        self._width = (W_OA.shape[1] - 1) // units
        all_units = torch.arange(units)
        self._alone = self._error(self._squares(G, all_units), all_units)
        H = G.clone()
        diagonal = H.diagonal()
        # a channel that is always zero: any positive pivot
        diagonal += ridge * diagonal + torch.where(diagonal > 0, 0.0, 1.0)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))

    def _channels(self, units: Tensor) -> Tensor:
        """(n,) -> (n,w)."""
        return units[:, None] * self._width + torch.arange(self._width)

    def _squares(self, matrix: Tensor, units: Tensor) -> Tensor:
        """The units' own squares (n,w,w) on the diagonal of a matrix."""
        at = self._channels(units)
        return matrix[at[:, :, None], at[:, None, :]]

    def _error(self, squares: Tensor, units: Tensor) -> Tensor:
        """tr(W_u S_u W_u^T), (n,)."""
        W_Onw = self._W[:, self._channels(units)]
        return torch.einsum("onv,nvw,onw->n", W_Onw, squares, W_Onw)

    def factors(self, units: Tensor) -> Tensor:
        """Root of rho / rho0 (n,) for each of these, alone out of what is left; 1 if silent."""
        inverses = torch.linalg.inv(self._squares(self._inverse, units))
        alone = self._alone[units]
        ratio = self._error(inverses, units).clamp_min(0) / alone.clamp_min(_TINY)
        return torch.where(alone > _TINY, ratio, 1.0).sqrt()

    def remove(self, units: Tensor) -> None:
        """Take these out together, and let all that is left compensate."""
        gone = self._channels(units).flatten()
        rows = self._inverse[gone]
        taken = torch.linalg.solve(rows[:, gone], rows)
        self._W.addmm_(self._W[:, gone], taken, alpha=-1)
        self._inverse.addmm_(rows.T, taken, alpha=-1)
