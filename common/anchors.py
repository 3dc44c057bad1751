"""Anchors: what each attention head produces on the source species, and the distance to it (DAL).

Random Fourier features (Rahimi & Recht, 2007) phi(z) = sqrt(2/D) cos(W z / sigma + b) turn the
maximum mean discrepancy (Gretton et al., 2012) between two sets into a distance of two means. So
the server sends one mean per head, ``psi``, and never an image; a farm compares its own batches:

    mmd2 = || mean_B phi - psi ||^2 - tr(var phi) / B - spread / n_source

with unbiased variances: zero in expectation when both distributions are equal. W and b are drawn
from a seed, sigma per head is the median distance between source images.

Shapes: B images, U heads of all blocks in block order, d channels of a head, D features.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.backbone import block_layers
from common.errors import ConfigError, DataError, ProtocolError, RejectReason
from common.heads import evaluation_mode, tap_heads
from common.precision import bfloat16
from common.tensors import header_of

FEATURES = 64
SIGMA_POOL = 2048
"""Images held back (18 kB each for a ViT-S) until sigma is known."""
SIGMA_SAMPLE = 256
"""Images of the pool whose pairwise distances give the median."""
SIGMA_FLOOR = 1e-6
MAX_BYTES = 64 * 2**20
Kind = Literal["mmd", "coral"]


class _Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    seed: int = Field(ge=0, lt=2**63)
    count: int = Field(ge=2, le=10**9)
    heads: list[Annotated[int, Field(ge=0, le=65536)]] = Field(min_length=1, max_length=1024)


@dataclass(frozen=True, eq=False)
class Anchors:
    """The source species as every head sees it; float32 tensors on the CPU.

    ``heads`` counts the heads of each block (their sum is U), ``count`` the source images,
    ``sigma`` (U,) is the kernel width, ``psi`` (U,D) the mean feature and ``spread`` (U,) its
    unbiased tr(var phi). ``mean`` (U,d) and ``covariance`` (U,d,d) of z serve the CORAL variant.
    """

    seed: int
    count: int
    heads: tuple[int, ...]
    sigma: Tensor
    psi: Tensor
    spread: Tensor
    mean: Tensor | None = None
    covariance: Tensor | None = None

    def select(self, keep_heads: Sequence[npt.NDArray[np.int64]]) -> "Anchors":
        """The anchors of the kept heads; one index array per block, as in ``Keep.heads``."""
        offsets = np.cumsum((0, *self.heads[:-1]))
        flat = [kept + offset for kept, offset in zip(keep_heads, offsets, strict=True)]
        index = torch.from_numpy(np.concatenate(flat))
        chosen: dict[str, Any] = {name: tensor[index] for name, tensor in self._tensors().items()}
        return replace(self, heads=tuple(len(kept) for kept in keep_heads), **chosen)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("sigma", "psi", "spread", "mean", "covariance")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_bytes(self) -> bytes:
        """Safetensors with the seed, image count and head counts as JSON metadata."""
        about = _Metadata(seed=self.seed, count=self.count, heads=list(self.heads))
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        return save(tensors, metadata={"anchors": about.model_dump_json()})

    @classmethod
    def from_bytes(cls, body: bytes) -> "Anchors":
        """Inverse of :meth:`to_bytes`.

        Raises:
            ProtocolError: not safetensors, too large, or a value is missing or out of range.
        """
        if len(body) > MAX_BYTES:
            raise ProtocolError(
                f"anchors of {len(body)} bytes, at most {MAX_BYTES} are taken",
                RejectReason.OVERSIZED,
            )
        try:
            tensors = load(body)
            header, _ = header_of(body)
            about = _Metadata.model_validate_json(header["__metadata__"]["anchors"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProtocolError(f"anchors cannot be read: {str(error)[:200]}") from error
        _require_valid(tensors, sum(about.heads))
        fields: dict[str, Any] = {k: v.clone() for k, v in tensors.items()}
        return cls(seed=about.seed, count=about.count, heads=tuple(about.heads), **fields)


def _require_valid(tensors: dict[str, Tensor], units: int) -> None:
    """Names, types, shapes and ranges; |phi|^2 <= 2 bounds both psi and spread."""
    mean = tensors.get("mean")
    width = mean.shape[-1] if mean is not None and mean.ndim == 2 else 0
    shapes = {"sigma": (units,), "psi": (units, FEATURES), "spread": (units,)}
    if "mean" in tensors or "covariance" in tensors:
        shapes |= {"mean": (units, width), "covariance": (units, width, width)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ProtocolError(
            f"anchors hold {found}, expected {shapes} for {units} heads", RejectReason.SHAPE
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ProtocolError(f"anchors: '{name}' is {tensor.dtype}, expected float32")
        if not torch.isfinite(tensor).all():
            raise ProtocolError(f"anchors: '{name}' is not finite", RejectReason.NOT_FINITE)
    psi_bound = math.sqrt(2 / FEATURES) * 1.0001
    sigma, psi, spread = tensors["sigma"], tensors["psi"], tensors["spread"]
    if (sigma <= 0).any() or (psi.abs() > psi_bound).any():
        raise ProtocolError("anchors: 'sigma' must be positive and 'psi' a mean of cosines")
    if (spread < 0).any() or (spread > 4).any():
        raise ProtocolError("anchors: 'spread' must lie between 0 and 4")


# --- features and their statistics ---------------------------------------------------------------


def fourier_features(z: Tensor, sigma: Tensor, seed: int) -> Tensor:
    """phi: (B,U,d) -> (B,U,D), differentiable; all heads share W (D,d) and b (D,).

    Drawn on the CPU from the seed alone, so that server and farms agree on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    W_Dd = torch.randn((FEATURES, z.shape[-1]), generator=generator)
    b_D = torch.rand(FEATURES, generator=generator) * (2 * math.pi)
    angles = (z / sigma.to(z)[:, None]) @ W_Dd.to(z).T + b_D.to(z)
    return torch.cos(angles) * math.sqrt(2 / FEATURES)


class Statistics:
    """Streaming count, mean (U,D) and unbiased tr(var) (U,) of features, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Take in a batch (B,U,D)."""
        x_BUD = x.detach().double()
        self.count += len(x_BUD)
        self._sum = self._sum.to(x_BUD) + x_BUD.sum(0)
        self._squares = self._squares.to(x_BUD) + x_BUD.square().sum((0, 2))

    @property
    def mean(self) -> Tensor:
        """(U,D)."""
        return self._sum / self.count

    @property
    def spread(self) -> Tensor:
        """tr(var), (U,), not negative; needs two samples."""
        squared = self.count * self.mean.square().sum(-1)
        return ((self._squares - squared) / (self.count - 1)).clamp(min=0)


class _Covariance:
    """Streaming mean (U,d) and unbiased covariance (U,d,d), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(())
        self._products = torch.zeros(())

    def add(self, z: Tensor) -> None:
        z_BUd = z.double()
        self.count += len(z_BUd)
        self._sum = self._sum.to(z_BUd) + z_BUd.sum(0)
        self._products = self._products.to(z_BUd) + torch.einsum("bui,buj->uij", z_BUd, z_BUd)

    def result(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self.count
        outer = self.count * mean[:, :, None] * mean[:, None, :]
        return mean, (self._products - outer) / (self.count - 1)


def median_sigma(z: Tensor, seed: int) -> Tensor:
    """Median distance between images, per head: (B,U,d) -> (U,); at most SIGMA_SAMPLE images."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(z), generator=generator)[:SIGMA_SAMPLE]
    z_UBd = z[order.to(z.device)].transpose(0, 1)
    medians = [torch.pdist(head.contiguous()).median() for head in z_UBd]
    return torch.stack(medians).clamp(min=SIGMA_FLOOR).float()


class _Collector:
    """Statistics of z (B,U,d); holds the first images back until sigma is known."""

    def __init__(self, seed: int, coral: bool) -> None:
        self.seed = seed
        self.count = 0
        self.statistics = Statistics()
        self.covariance = _Covariance() if coral else None
        self.sigma: Tensor | None = None
        self._pool: list[Tensor] = []

    def add(self, z: Tensor) -> None:
        self.count += len(z)
        if self.covariance is not None:
            self.covariance.add(z)
        self._pool.append(z)
        if self.sigma is not None or self.count >= SIGMA_POOL:
            self.flush()

    def flush(self) -> Tensor:
        """Take in what is held back; returns sigma (U,)."""
        if self.sigma is None:
            self.sigma = median_sigma(torch.cat(self._pool), self.seed)
        for z in self._pool:
            self.statistics.add(fourier_features(z, self.sigma, self.seed))
        self._pool.clear()
        return self.sigma


@torch.no_grad()
def compute_anchors(
    model: VisionTransformer,
    batches: Iterable[Tensor],
    seed: int,
    coral: bool = False,
    autocast: bool = False,
) -> Anchors:
    """Anchors of ``model`` on source images.

    Args:
        model: the backbone; its train/eval mode is left as found.
        batches: image batches (B,3,S,S), shuffled: sigma is read off the first SIGMA_POOL images.
        seed: of W, b and the sample that gives sigma; 0 <= seed < 2**63.
        coral: also keep mean and covariance, for the CORAL variant (1.2 MB for a ViT-S).
        autocast: run the forward pass in bfloat16, as farms do that train in it.

    Raises:
        DataError: fewer than two images, or the backbone's outputs are not finite.
    """
    device = next(model.parameters()).device
    collector = _Collector(seed, coral)
    with evaluation_mode(model), tap_heads(model) as taps:
        for images in batches:
            with bfloat16(device, autocast):
                model(images.to(device))
            collector.add(torch.cat(taps, 1))
    if collector.count < 2:
        raise DataError("anchors need at least two source images; add images to the source folder")
    tensors = {"sigma": collector.flush()}
    tensors |= {"psi": collector.statistics.mean, "spread": collector.statistics.spread}
    if collector.covariance is not None:
        tensors["mean"], tensors["covariance"] = collector.covariance.result()
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DataError("the backbone's heads are not finite on the source images; check weights")
    heads = tuple(layers.attn.num_heads for layers in block_layers(model))
    fields: dict[str, Any] = {name: tensor.float().cpu() for name, tensor in tensors.items()}
    return Anchors(seed=seed, count=collector.count, heads=heads, **fields)


# --- distances -----------------------------------------------------------------------------------


def _joined(z: Sequence[Tensor], anchors: Anchors) -> Tensor:
    """(B,H_l,d) per block -> (B,U,d), at least fp32; refuses what the anchors do not describe."""
    heads = tuple(block.shape[1] for block in z)
    if heads != anchors.heads:
        raise ProtocolError(
            f"anchors describe {anchors.heads} heads per block, the backbone has {heads}; "
            "take the anchors of the same candidate",
            RejectReason.FOREIGN_MASK,
        )
    z_BUd = torch.cat(list(z), 1)
    return z_BUd.float() if z_BUd.dtype in (torch.float16, torch.bfloat16) else z_BUd


def _require_pair(images: int) -> None:
    if images < 2:
        raise DataError("the distance to the source needs at least two images; raise the batch")


def tap_features(z: Sequence[Tensor], anchors: Anchors) -> Tensor:
    """Features (B,U,D) of taps, with the sigma, W and b of ``anchors``.

    Raises:
        ProtocolError: the anchors describe other heads.
    """
    return fourier_features(_joined(z, anchors), anchors.sigma, anchors.seed)


def head_mmd2(z: Sequence[Tensor], anchors: Anchors) -> Tensor:
    """Unbiased squared MMD of a batch to the source, per head.

    Args:
        z: per block (B,H_l,d), as :func:`common.heads.tap_heads` gives it, B >= 2.
        anchors: of the same backbone.

    Returns:
        (U,), differentiable in z; may be slightly negative where the distributions agree.

    Raises:
        DataError: a batch of one image.
        ProtocolError: the anchors describe other heads.
    """
    phi_BUD = tap_features(z, anchors)
    _require_pair(len(phi_BUD))
    spread_U = phi_BUD.var(0).sum(-1)
    return _mmd2(phi_BUD.mean(0), spread_U, len(phi_BUD), anchors)


def pooled_mmd2(statistics: Statistics, anchors: Anchors) -> Tensor:
    """The same over many batches at once, from the statistics of their features: (U,) float64.

    Raises:
        DataError: fewer than two images.
    """
    _require_pair(statistics.count)
    return _mmd2(statistics.mean, statistics.spread, statistics.count, anchors)


def _mmd2(mean: Tensor, spread: Tensor, count: int, anchors: Anchors) -> Tensor:
    distance = (mean - anchors.psi.to(mean)).square().sum(-1)
    return distance - spread / count - anchors.spread.to(mean) / anchors.count


def head_coral(z: Sequence[Tensor], anchors: Anchors) -> Tensor:
    """First and second moment distance per head, (U,); after Deep CORAL (Sun & Saenko, 2016).

    ||C_B - C||_F^2 / (4 d^2) + ||mean_B - mean||^2 / d, on z / sigma so that heads compare.

    Raises:
        ConfigError: the anchors were computed without ``coral=True``.
    """
    if anchors.mean is None or anchors.covariance is None:
        raise ConfigError("anchors carry no covariance; the server must compute them for coral")
    z_BUd = _joined(z, anchors)
    _require_pair(len(z_BUd))
    sigma_U = anchors.sigma.to(z_BUd)
    mean_Ud = z_BUd.mean(0)
    centred = z_BUd - mean_Ud
    C_Udd = torch.einsum("bui,buj->uij", centred, centred) / (len(z_BUd) - 1)
    width = z_BUd.shape[-1]
    second = (C_Udd - anchors.covariance.to(z_BUd)).square().sum((1, 2)) / sigma_U**4
    first = (mean_Ud - anchors.mean.to(z_BUd)).square().sum(-1) / sigma_U**2
    return second / (4 * width**2) + first / width


def domain_alignment_loss(
    z: Sequence[Tensor], anchors: Anchors, kind: Kind = "mmd", weights: Tensor | None = None
) -> Tensor:
    """DAL: weighted mean over heads of their distance to the source, a scalar.

    Args:
        z: per block (B,H_l,d).
        anchors: of the same backbone.
        kind: ``mmd`` (:func:`head_mmd2`) or ``coral`` (:func:`head_coral`).
        weights: (U,), not negative, with a positive sum; all equal when absent.

    Raises:
        ConfigError: an unknown kind, or ``coral`` with anchors that lack covariances.
        DataError: a batch of one image.
        ProtocolError: the anchors describe other heads.
    """
    if kind not in ("mmd", "coral"):
        raise ConfigError(f"unknown domain alignment '{kind}'; known: mmd, coral")
    distance_U = head_mmd2(z, anchors) if kind == "mmd" else head_coral(z, anchors)
    if weights is None:
        return distance_U.mean()
    weights = weights.to(distance_U)
    return (weights * distance_U).sum() / weights.sum()
