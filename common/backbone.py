"""The shared vision transformer: build it from a spec, load and save it, count what it costs.

Only plain timm transformers are taken (ViT, DeiT, DINOv2): blocks with one ``attn`` of type
``timm.layers.Attention`` and one ``mlp`` with ``fc1``/``fc2``. No model code is copied or patched.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from common.efficient import install
from common.errors import ModelError
from common.files import write_atomically
from common.silent import SilentAttention
from common.spec import ModelSpec, Spec, saved_spec
from common.tensors import header_of
from common.tokens import halvings

log = logging.getLogger(__name__)

_T = TypeVar("_T")


def dense_spec(name: str, image_size: int, options: dict[str, int] | None = None) -> ModelSpec:
    """The spec of an unpruned timm architecture at a square image size.

    Raises:
        ModelError: the name is unknown to timm, or it is not a plain vision transformer.
    """
    pairs = tuple(sorted((options or {}).items()))
    with torch.device("meta"):
        model = _create(name, image_size, pairs)
    _require_plain(model, name)
    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return ModelSpec(
        name=name,
        image_size=image_size,
        options=pairs,
        heads=tuple(layers.attn.num_heads for layers in block_layers(model)),
        neurons=tuple(layers.fc1.out_features for layers in block_layers(model)),
        head_width=block_layers(model)[0].attn.head_dim,
        width=model.num_features,
        mean=config["mean"],
        std=config["std"],
    )


def build(spec: ModelSpec) -> VisionTransformer:
    """A randomly initialised backbone without classifier: (B,3,S,S) -> (B,width)."""
    model = _create(spec.name, spec.image_size, spec.options)
    _require_plain(model, spec.name)
    if len(model.blocks) != spec.depth:
        raise ModelError(f"{spec.name} has {len(model.blocks)} blocks, its spec says {spec.depth}")
    units = zip(model.blocks, block_layers(model), spec.heads, spec.neurons, strict=True)
    for block, layers, heads, neurons in units:
        _shrink(layers, heads, neurons)
        if heads == 0:
            block.attn, block.norm1 = SilentAttention(layers.attn), nn.Identity()
    install(model, spec)
    return model.eval()


def _create(name: str, image_size: int, options: tuple[tuple[str, int], ...]) -> VisionTransformer:
    if name.split(".")[0] not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name[:9]}*")[:4]) or "vit_small_patch14_dinov2"
        raise ModelError(f"unknown backbone '{name}'; timm knows for example {close}")
    arguments: dict[str, Any] = {"num_classes": 0, "img_size": image_size, **dict(options)}
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(
            f"backbone '{name}' cannot be built at {image_size} px: {error}"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"backbone '{name}' is not a plain vision transformer (ViT, DeiT, DINOv2)")
    return model


class BlockLayers(NamedTuple):
    """The layers of one block that heads and neurons live in."""

    attn: Attention
    mlp: Mlp

    @property
    def fc1(self) -> nn.Linear:
        """Rows are neurons."""
        assert isinstance(self.mlp.fc1, nn.Linear)
        return self.mlp.fc1

    @property
    def fc2(self) -> nn.Linear:
        """Columns are neurons."""
        assert isinstance(self.mlp.fc2, nn.Linear)
        return self.mlp.fc2


def block_layers(model: VisionTransformer) -> list[BlockLayers]:
    """The attention and MLP of every block, in order, typed."""
    found = []
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        assert isinstance(attn, Attention)
        assert isinstance(mlp, Mlp)
        found.append(BlockLayers(attn, mlp))
    return found


def _require_plain(model: VisionTransformer, name: str) -> None:
    if type(model.patch_embed) is not PatchEmbed or model.attn_pool is not None:
        raise ModelError(
            f"backbone '{name}' has a convolutional stem or an attention pool, which are not "
            "shared or counted here; take a plain ViT such as vit_small_patch14_dinov2"
        )
    for block in model.blocks:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        plain_attn = isinstance(attn, Attention) and type(attn.norm) is nn.Identity
        plain_mlp = isinstance(mlp, Mlp) and type(mlp.norm) is nn.Identity
        if not plain_attn or not plain_mlp or getattr(attn, "gate", None) is not None:
            raise ModelError(
                f"backbone '{name}' has blocks whose heads or neurons cannot be removed; "
                "take a plain ViT, DeiT or DINOv2 such as vit_small_patch14_dinov2"
            )


def _shrink(layers: BlockLayers, heads: int, neurons: int) -> None:
    """Give a fresh block fewer units; its weights are loaded afterwards."""
    attn, mlp = layers
    if heads not in (attn.num_heads, 0):
        inner = heads * attn.head_dim
        attn.qkv = nn.Linear(attn.qkv.in_features, 3 * inner, attn.qkv.bias is not None)
        attn.proj = nn.Linear(inner, attn.proj.out_features, attn.proj.bias is not None)
        attn.num_heads, attn.attn_dim = heads, inner
    if neurons != layers.fc1.out_features:
        mlp.fc1 = nn.Linear(layers.fc1.in_features, neurons, layers.fc1.bias is not None)
        mlp.fc2 = nn.Linear(neurons, layers.fc2.out_features, layers.fc2.bias is not None)


def spec_of(model: VisionTransformer, like: ModelSpec) -> ModelSpec:
    """The spec of a model that was cut from ``like``."""
    return like.with_units(
        tuple(layers.attn.num_heads for layers in block_layers(model)),
        tuple(layers.fc1.out_features for layers in block_layers(model)),
    )


# --- weights -----------------------------------------------------------------------------------


def load_pretrained(spec: ModelSpec, weights: str | None) -> VisionTransformer:
    """A dense backbone with weights from a safetensors file, a timm hub name, or at random.

    Args:
        spec: the dense architecture.
        weights: path of a ``.safetensors`` file; ``"hub"`` or ``"hub:NAME"``; ``None`` for random.

    Raises:
        ModelError: no such file, the hub cannot be reached, or tensors that do not match.
    """
    model = build(spec)
    if weights is None:
        log.info("backbone %s at %d px: random weights", spec.name, spec.image_size)
        return model
    if weights == "hub" or weights.startswith("hub:"):
        state = _from_hub(weights.partition(":")[2] or spec.name)
    else:
        state = read_tensors(Path(weights))
    state = {k: v.float() for k, v in state.items() if not k.startswith(("head.", "head_dist."))}
    try:
        state = checkpoint_filter_fn(state, model)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()
        detail = " ".join(line.strip() for line in first[:3])[:300]
        raise ModelError(
            f"weights '{weights}' do not match {spec.name} at {spec.image_size} px: {detail}"
        ) from error
    log.info("backbone %s at %d px: weights from %s", spec.name, spec.image_size, weights)
    return model


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # the hub client raises its own, undocumented kinds
        raise ModelError(
            f"weights of '{name}' could not be fetched from the model hub "
            f"({type(error).__name__}); give a safetensors file instead"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ModelError: the file is missing or is not a complete safetensors file.
    """
    if not path.is_file():
        raise ModelError(f"no weights at '{path}'; give the path of a .safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"'{path}' is not a complete safetensors file: {error}") from error


def pack(model: nn.Module, spec: Spec) -> bytes:
    """Spec and parameters as safetensors bytes; a tensor exact in fp16 takes half the room.

    Put together in one copy: the library's own ``save`` makes three of a backbone.
    """
    stored = stored_tensors(model)
    header: dict[str, Any] = {"__metadata__": {"spec": spec.to_json()}}
    parts: list[memoryview] = []
    end = 0
    # the wider numbers first, so that each lies on a multiple of its size
    for name, tensor in sorted(stored.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, end = end, end + tensor.nbytes
        dtype = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [begin, end]}
        parts.append(tensor.numpy().reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a network as they are kept: fp16 where that is exact, else fp32.

    Those without a number, of an attention that is gone, are left out. A backbone has nothing else;
    a student also has statistics of images, which are nobody's to share (common/student.py).
    """
    return {n: _stored(one.detach()) for n, one in model.named_parameters() if one.numel()}


def _stored(tensor: Tensor) -> Tensor:
    tensor = tensor.float().contiguous()
    start = tensor.flatten()[:64]  # most that are not exact show it here
    if not torch.equal(start.half().float(), start):
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def unpack(body: bytes) -> tuple[VisionTransformer, ModelSpec]:
    """Inverse of :func:`pack`; raises ModelError on anything else."""
    try:
        header, _ = header_of(body)
        spec = ModelSpec.from_json(header["__metadata__"]["spec"])
        return assemble(spec, load_bytes(body)), spec
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"a packed backbone cannot be read: {str(error)[:200]}") from error


def assemble(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> VisionTransformer:
    """A backbone of its tensors by name.

    Raises:
        RuntimeError, ValueError: these are not the tensors of this spec.
        ModelError: the spec cannot be built here.
    """
    with torch.device("meta"):  # no random initialisation, which takes longer than reading
        model = build(spec)
    state = {name: torch.empty(one.shape) for name, one in empty_tensors(model)}
    state |= {name: one.float() for name, one in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model


def empty_tensors(model: VisionTransformer) -> list[tuple[str, Tensor]]:
    """Those without a number, by name: nothing is kept of them."""
    return [(name, one) for name, one in model.state_dict().items() if not one.numel()]


def save_backbone(path: Path, model: VisionTransformer, spec: ModelSpec) -> None:
    """Write :func:`pack` to a file, atomically."""
    write_atomically(path, pack(model, spec))


def load_backbone(path: Path) -> tuple[VisionTransformer, ModelSpec]:
    """Read what :func:`save_backbone` wrote; raises ModelError naming the file."""
    return read_packed(path, unpack)


def read_packed(path: Path, unpacked: Callable[[bytes], _T]) -> _T:
    """What lies in a file; raises ModelError naming it."""
    if not path.is_file():
        raise ModelError(f"no model at '{path}'")
    try:
        return unpacked(path.read_bytes())
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from error


def read_spec(path: Path) -> ModelSpec:
    """Only the spec of a saved backbone, without its tensors; raises ModelError."""
    return saved_spec(path)


def digest(model: nn.Module, spec: Spec) -> str:
    """sha256 over the spec and every parameter as fp32, by name: the identity of a candidate."""
    sha = hashlib.sha256(spec.to_json().encode())
    for name, tensor in sorted(model.named_parameters()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().contiguous().numpy().data)
    return sha.hexdigest()


# --- what it costs -------------------------------------------------------------


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=64)
def _patches(name: str, image_size: int, options: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """(patches, tokens with prefix, weights of the patch projection) of an architecture."""
    with torch.device("meta"):
        model = _create(name, image_size, options)
    count = int(model.patch_embed.num_patches)
    weights = int(model.patch_embed.proj.weight.numel())
    return count, count + int(model.num_prefix_tokens), weights


def patches(spec: ModelSpec) -> int:
    """Patch tokens per image."""
    return _patches(spec.name, spec.image_size, spec.options)[0]


def tokens(spec: ModelSpec) -> int:
    """Tokens per image: patches, class token and registers."""
    return _patches(spec.name, spec.image_size, spec.options)[1]


def tokens_by_block(spec: ModelSpec) -> tuple[int, ...]:
    """Tokens that enter each block."""
    most, whole, _ = _patches(spec.name, spec.image_size, spec.options)
    leaving = spec.kept_tokens[:-1] or (most,) * (spec.depth - 1)
    return whole, *(whole - most + keep for keep in leaving)


def macs(spec: ModelSpec) -> int:
    """Multiply-accumulates of one forward pass of one image, matrix products only.

    Per block with H heads of width d, M neurons, width C and N tokens: qkv and proj 4*N*C*H*d,
    scores and values 2*N*N*H*d, or 2*N*d*H*d where they are linear, MLP 2*N*C*M; where tokens are
    dropped, one more query N*H*d, and where M of them are merged, M/2*M/2*d for each time.
    """
    count, whole, weights = _patches(spec.name, spec.image_size, spec.options)
    total, entering = count * weights, tokens_by_block(spec)
    for block, n in enumerate(entering):
        linear = block in spec.linear_blocks
        total += spec.heads[block] * head_macs(spec, n, linear)
        total += spec.neurons[block] * neuron_macs(spec, n)
        if block + 1 < spec.depth and entering[block + 1] < n:
            total += _choosing_macs(spec, block, whole - count, (n, entering[block + 1]))
    return total


def _choosing_macs(spec: ModelSpec, block: int, prefix: int, tokens: tuple[int, int]) -> int:
    """What it costs to choose which of the tokens that come leave a block."""
    if not spec.merge_tokens:
        return tokens[0] * spec.heads[block] * spec.head_width
    found, patches = 0, tokens[0] - prefix
    for gone in halvings(patches, tokens[1] - prefix):
        found += (patches // 2) * (patches - patches // 2) * spec.head_width
        patches -= gone
    return found


def head_macs(spec: ModelSpec, token_count: int, linear: bool = False) -> int:
    """Multiply-accumulates that one head costs."""
    d = spec.head_width
    seen = d if linear else token_count
    return 4 * token_count * spec.width * d + 2 * token_count * seen * d


def neuron_macs(spec: ModelSpec, token_count: int) -> int:
    """Multiply-accumulates that one MLP neuron costs."""
    return 2 * token_count * spec.width
