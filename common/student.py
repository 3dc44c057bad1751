"""A student: a convolutional network of timm that learns what a vision transformer knows.

What makes a student, and is shared, are its parameters. The running means and variances of batch
normalisation are no part of it: they describe the images of one place. They are never sent, never
averaged (as in FedBN, Li et al., 2021, but weights and biases of these layers are shared) and not
even kept: wherever a student is used they follow from its parameters and the images there, by one
forward pass (:func:`recalibrate`). So each farm has its own, which no other farm can change.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from common import distil
from common.backbone import read_tensors
from common.errors import DataError, ModelError
from common.heads import evaluation_mode
from common.spec import ModelSpec, StudentSpec
from common.tensors import header_of


class Student(nn.Module):
    """A timm network without its classifier: images (B,3,S,S) -> features (B,C).

    Args:
        name: of the architecture.
        weights: a safetensors file of it, or None: random.
        seed: of random weights.

    Raises:
        ModelError: timm does not know it, or the weights are not its own.
    """

    def __init__(self, name: str, weights: Path | None = None, seed: int = 0) -> None:
        super().__init__()
        if name not in timm.list_models():
            raise ModelError(f"timm has no '{name}'; take for example mobilenetv3_small_100")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = timm.create_model(name, pretrained=False, num_classes=0)
        if not hasattr(network, "head_hidden_size"):
            raise ModelError(_not_convolutional(name))
        self.network, self.name, self.width = network, name, int(network.head_hidden_size)
        self.map = torch.empty(0)
        if weights is not None:
            self._load(weights)

    def _load(self, path: Path) -> None:
        mine = self.network.state_dict()
        found = {name: one for name, one in read_tensors(path).items() if name in mine}
        try:
            self.network.load_state_dict(found)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:200]
            raise ModelError(f"'{path}' has not the weights of {self.name}: {first}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Features; where it looked, ``map`` (B,h,w), stays here until the next call."""
        network: Any = self.network
        found = network.forward_features(images)
        self.map = distil.energy(found)
        features: Tensor = network.forward_head(found, pre_logits=True)
        return features


def _not_convolutional(name: str) -> str:
    return (
        f"'{name}' is no convolutional network, whose feature maps could be compared; take for "
        "example mobilenetv3_small_100"
    )


def student_spec(student: Student, teacher: ModelSpec) -> StudentSpec:
    """The spec of a student that sees the images of its teacher.

    Raises:
        ModelError: it is no convolutional network, or not for images of that size.
    """
    size = teacher.image_size
    network: Any = student.network
    try:
        with torch.inference_mode(), evaluation_mode(student):
            found = network.forward_features(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"'{student.name}' takes no images of {size} px: {error}") from error
    if found.ndim != 4 or found.shape[1] != network.num_features:
        raise ModelError(_not_convolutional(student.name))
    return StudentSpec(
        name=student.name,
        image_size=size,
        width=student.width,
        mean=teacher.mean,
        std=teacher.std,
    )


def unpack_student(body: bytes) -> tuple[Student, StudentSpec]:
    """Inverse of ``backbone.pack``, its statistics unset; raises ModelError on anything else."""
    try:
        header, _ = header_of(body)
        spec = StudentSpec.model_validate_json(header["__metadata__"]["spec"])
        return _assembled(spec, load_bytes(body)), spec
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"a packed student cannot be read: {str(error)[:200]}") from error


def _assembled(spec: StudentSpec, tensors: Mapping[str, Tensor]) -> Student:
    student = Student(spec.name)
    parameters = dict(student.named_parameters())
    shapes = {name: tuple(one.shape) for name, one in parameters.items()}
    if spec.width != student.width or shapes != {n: tuple(t.shape) for n, t in tensors.items()}:
        raise ModelError(f"these tensors are not those of {spec.name}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name].float())
    return student.eval()


@torch.no_grad()
def recalibrate(student: Student, batches: Iterable[Tensor]) -> None:
    """Set the statistics of batch normalisation to those of these images, by the present weights.

    Each is the mean over batches of a batch's own, as in "precise" batch normalisation (Wu and
    Johnson, 2021). What they were before has no influence.

    Args:
        student: in evaluation mode afterwards.
        batches: (B,3,S,S), each of images of all kinds; one with a single image is left out,
            because it may have no variance.

    Raises:
        DataError: no batch has two images.
    """
    norms = [one for one in student.modules() if isinstance(one, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    student.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for images in batches:
            if len(images) > 1:
                student(images)
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        student.eval()
    if not seen:
        raise DataError("fewer than two images can be read: they say nothing of how they vary")


@lru_cache(maxsize=8)
def student_macs(spec: StudentSpec) -> int:
    """Multiply-accumulates of one forward pass of one image, convolutions and products only."""
    with torch.device("meta"):
        network: Any = timm.create_model(spec.name, pretrained=False, num_classes=0)
    image = torch.empty(1, 3, spec.image_size, spec.image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return int(counter.get_total_flops()) // 2
