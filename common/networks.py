"""What a network of farms can share: a backbone, or a student that learns from one."""

from pathlib import Path
from typing import TypeAlias

from timm.models.vision_transformer import VisionTransformer

from common import backbone
from common.errors import ModelError
from common.spec import ModelSpec, Spec, StudentSpec, spec_of_text
from common.student import Student, student_macs, unpack_student
from common.tensors import header_of

Network: TypeAlias = VisionTransformer | Student


def unpack(body: bytes) -> tuple[Network, Spec]:
    """Inverse of ``backbone.pack`` for either kind; raises ModelError on anything else."""
    try:
        spec = spec_of_text(header_of(body)[0]["__metadata__"]["spec"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"a packed network cannot be read: {str(error)[:200]}") from error
    return unpack_student(body) if isinstance(spec, StudentSpec) else backbone.unpack(body)


def load(path: Path) -> tuple[Network, Spec]:
    """Read a packed network from a file; raises ModelError naming it."""
    return backbone.read_packed(path, unpack)


def macs(spec: Spec) -> int:
    """Multiply-accumulates of one forward pass of one image, products only."""
    return backbone.macs(spec) if isinstance(spec, ModelSpec) else student_macs(spec)
