"""Steps from one candidate to the next: the same model comes out at both ends, and nothing else."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from timm.models.vision_transformer import VisionTransformer

from common import backbone, codec
from common.compress import expand
from common.errors import ProtocolError
from common.mask import Keep
from common.spec import ModelSpec
from common.step import MAX_BYTES, Cut, Step
from common.surgery import collect_moments, prune, prune_compensated
from common.trainable import TRAINABLE_SETS, trainable_set
from tests.lab.network import SIDE, TINY

BASE = "ab" * 32
SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)


def model_of(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return backbone.build(SPEC)


def keep_of(seed: int) -> Keep:
    rng = np.random.default_rng(seed)

    def some(counts: tuple[int, ...]) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
        return tuple(
            np.sort(rng.choice(count, rng.integers(1, count + 1), replace=False))
            for count in counts
        )

    return Keep(some(SPEC.heads), some(SPEC.neurons))


@functools.cache
def cut_step(seed: int, trainable: str = "bias") -> tuple[Step, str, ModelSpec]:
    """A step with a compensated cut, as the server makes it, and the digest it leads to."""
    model, keep = model_of(seed), keep_of(seed)
    trained = trainable_set(model, trainable, 4)
    count = trained.layout.count
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    update = codec.encode(values * np.float32(0.01), BASE, rank=trained.rank)
    trained.add(model, codec.decode(update, base=BASE, count=count))
    moments = collect_moments(model, [torch.rand(4, 3, SIDE, SIDE)])
    compensated, _ = prune_compensated(model, SPEC, keep, moments)
    pruned, spec = prune(model, SPEC, keep)
    cut = Cut.between(pruned, compensated, keep, BASE)
    cut.compensate(pruned)
    for name, tensor in compensated.state_dict().items():  # 8 bits are near enough
        torch.testing.assert_close(pruned.state_dict()[name], tensor, rtol=0.02, atol=0.02)
    return Step(update, cut), backbone.digest(pruned, spec), spec


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 1000), st.sampled_from(TRAINABLE_SETS))
def test_a_step_with_a_cut_leads_to_the_same_candidate_at_the_other_end(
    seed: int, trainable: str
) -> None:
    step, digest, spec = cut_step(seed, trainable)
    received = Step.from_bytes(step.to_bytes())
    assert received.base == BASE
    model, found = received.apply(model_of(seed), SPEC)
    assert found == spec
    assert backbone.digest(model, found) == digest


def test_an_ordinary_step_is_its_update() -> None:
    model = model_of(0)
    layout = trainable_set(model, "bias").layout
    update = codec.encode(np.ones(layout.count, np.float32), BASE)
    step = Step.from_bytes(Step(update).to_bytes())
    assert step.update.tobytes() == update.tobytes()
    assert step.to_bytes().size < update.size  # equal numbers compress well
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved, spec = step.apply(model, SPEC)
    assert spec == SPEC
    for name, tensor in moved.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + float(name in layout.names))


def test_a_cut_without_compensation_carries_no_change() -> None:
    model, keep = model_of(1), keep_of(1)
    plain, _ = prune(model, SPEC, keep)
    cut = Cut.between(plain, plain, keep, BASE)
    assert cut.names == ()
    assert cut.change.size == codec.HEADER_BYTES


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4), st.integers(0, 9)
)
def test_damaged_steps_are_refused_and_break_nothing(
    changes: list[tuple[int, int]], cut_off: int
) -> None:
    data = cut_step(3)[0].to_bytes().copy()
    for place, value in changes:
        data[place % data.size] = value
    data = data[: data.size - cut_off]
    try:
        model, spec = Step.from_bytes(data).apply(model_of(3), SPEC)
    except ProtocolError:
        return
    assert backbone.spec_of(model, spec) == spec
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("harm", ["indices", "names", "counts", "update", "no bytes"])
def test_a_step_that_does_not_fit_is_refused(harm: str) -> None:
    step = cut_step(3)[0]
    assert step.cut is not None
    arrays = load(expand(step.to_bytes(), MAX_BYTES).tobytes())
    heads = [len(kept) for kept in step.cut.keep.heads]
    names = list(step.cut.names)
    if harm == "indices":
        arrays["heads"] = arrays["heads"] + 100
    if harm == "names":
        names[0] = "blocks.0.attn.nothing"
    if harm == "counts":
        heads[0] += 1
    if harm == "update":
        arrays["update"] = arrays["update"][:-1]
    neurons = [len(kept) for kept in step.cut.keep.neurons]
    about = f'{{"heads": {heads}, "neurons": {neurons}, "names": {names}}}'.replace("'", '"')
    data = b"" if harm == "no bytes" else save(arrays, metadata={"cut": about})
    with pytest.raises(ProtocolError):
        Step.from_bytes(np.frombuffer(data, np.uint8)).apply(model_of(3), SPEC)
