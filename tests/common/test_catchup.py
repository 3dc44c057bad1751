"""Chains of steps and changed tensors: the same backbone comes out, damaged bodies are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from common import backbone, codec
from common.catchup import MAX_STEPS, chain, changed, replace, steps_of
from common.codec import Bytes
from common.errors import ProtocolError
from common.step import Step
from common.surgery import prune
from common.trainable import trainable_set
from tests.common.test_step import keep_of
from tests.lab.network import SIDE, TINY

SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)


def model_of(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return backbone.build(SPEC)


def walk(count: int, kind: str = "bias") -> tuple[list[Bytes], VisionTransformer]:
    """Steps from ``model_of()`` and the backbone they lead to."""
    model, steps = model_of(), []
    for number in range(count):
        trained = trainable_set(model, kind, 2)
        values = np.random.default_rng(number).standard_normal(trained.layout.count)
        base = backbone.digest(model, SPEC)
        update = codec.encode(values.astype(np.float32) * 0.01, base, rank=trained.rank)
        steps.append(Step(update).to_bytes())
        model, _ = Step.from_bytes(steps[-1]).apply(model, SPEC)
    return steps, model


@pytest.mark.parametrize("kind", ["bias", "lora", "full"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_chain_leads_where_its_steps_lead(kind: str, count: int) -> None:
    steps, expected = walk(count, kind)
    model, spec = model_of(), SPEC
    for step in steps_of(chain(steps)):
        assert step.base == backbone.digest(model, spec)
        model, spec = step.apply(model, spec)
    assert backbone.digest(model, spec) == backbone.digest(expected, SPEC)


def test_changed_tensors_lead_there_too_and_nothing_else_is_sent() -> None:
    _, expected = walk(5)
    body = changed(model_of(), expected)
    assert body is not None
    assert body.size < 4.2 * trainable_set(expected, "bias").layout.count + 5000
    model = model_of()
    replace(model, body)
    assert backbone.digest(model, SPEC) == backbone.digest(expected, SPEC)


def test_tensors_cannot_stand_for_a_cut() -> None:
    smaller, _ = prune(model_of(), SPEC, keep_of(3))
    assert changed(model_of(), smaller) is None


@settings(deadline=None, max_examples=40)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    st.integers(0, 9),
)
def test_damaged_bodies_are_refused_or_harmless(
    tensors: bool, changes: list[tuple[int, int]], cut: int
) -> None:
    steps, model = walk(2)
    body = changed(model_of(), model) if tensors else chain(steps)
    assert body is not None
    body = body.copy()
    for place, value in changes:
        body[place % body.size] = value
    body = body[: body.size - cut]
    target = model_of()
    try:
        if tensors:
            replace(target, body)
        else:
            for step in steps_of(body):
                target, _ = step.apply(target, SPEC)
    except ProtocolError:
        return
    assert backbone.spec_of(target, SPEC) == SPEC


def test_a_chain_has_no_gaps_and_an_end() -> None:
    steps, _ = walk(1)
    with pytest.raises(ProtocolError, match="too long"):
        steps_of(chain(steps * (MAX_STEPS + 1)))
    with pytest.raises(ProtocolError, match="not a chain"):
        steps_of(np.frombuffer(b"nothing", np.uint8))


def test_tensors_of_another_backbone_are_refused_before_any_is_put_in() -> None:
    other = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY | {"embed_dim": 24})
    torch.manual_seed(0)
    first, second = backbone.build(other), backbone.build(other)
    body = changed(first, second)
    assert body is not None
    model = model_of()
    before = backbone.digest(model, SPEC)
    with pytest.raises(ProtocolError, match="has no fp32"):
        replace(model, body)
    assert backbone.digest(model, SPEC) == before
