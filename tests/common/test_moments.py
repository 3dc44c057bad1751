"""Second moments on their way: what comes back is what was sent, and nonsense is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.backbone import build, dense_spec, tokens
from common.errors import ProtocolError, RejectReason
from common.mask import Mask
from common.messages import Extent
from common.moments import check, pack, together, unpack
from common.surgery import Moments, collect_moments, prune_compensated

SPEC = dense_spec("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 24, "num_heads": 3})
SIDES = 25, 97


def moments(seed: int, images: int = 6, neurons: bool = True) -> Moments:
    torch.manual_seed(1)
    model = build(SPEC)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        drawn = torch.randn(images, 3, 32, 32, generator=generator)
        return collect_moments(model, [drawn], neurons)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 20))
def test_what_comes_back_is_what_was_sent(seed: int, images: int) -> None:
    sent, weight = moments(seed, images), float(images * tokens(SPEC))
    back = unpack(pack(sent, "all"), SPEC, "all", weight)
    for before, after in zip(
        (*sent.heads, *sent.neurons), (*back.heads, *back.neurons), strict=True
    ):
        assert torch.equal(after, after.T)
        scale = before.diagonal().sqrt()
        error = (after - before).abs() / (scale[:, None] * scale).clamp_min(1e-30)
        assert float(error.max()) <= 2**-11 + 1e-5  # rounding of a correlation to fp16
        torch.testing.assert_close(after.diagonal(), before.diagonal(), rtol=1e-6, atol=1e-9)


def test_of_heads_alone_nothing_is_said_of_neurons() -> None:
    body = pack(moments(0), "heads")
    assert np.array_equal(body, pack(moments(0, neurons=False), "heads"))
    assert len(body) == SPEC.depth * (4 * 25 + 25 * 24)
    back = unpack(body, SPEC, "heads", 10.0)
    assert (len(back.heads), back.neurons) == (2, ())
    assert [float(one[-1, -1]) for one in back.heads] == [10.0, 10.0]


def test_sums_of_two_farms_are_those_of_all_their_images() -> None:
    one, two = moments(0, 4), moments(1, 9)
    again = unpack(pack(one, "heads"), SPEC, "heads", 4.0 * tokens(SPEC))
    found = together(together(together(None, one), two), again)
    for layer in range(SPEC.depth):
        expected = 2 * one.heads[layer] + two.heads[layer]
        assert float((found.heads[layer] - expected).abs().max() / expected.abs().max()) < 1e-3
        assert torch.equal(found.neurons[layer], one.neurons[layer] + two.neurons[layer])


def test_a_cut_is_made_up_for_as_with_the_moments_themselves() -> None:
    torch.manual_seed(1)
    model, sent = build(SPEC), moments(3, 20)
    back = unpack(pack(sent, "all"), SPEC, "all", float(20 * tokens(SPEC)))
    mask = Mask(((0, 2), (1,)), tuple(tuple(range(0, 96, 2)) for _ in range(2)), (3, 3), (96, 96))
    keep = mask.keep_in(Mask.dense(SPEC))
    images = torch.randn(8, 3, 32, 32)
    with torch.inference_mode():
        cuts = [prune_compensated(model, SPEC, keep, one)[0](images) for one in (sent, back)]
        plain = prune_compensated(model, SPEC, keep, None, "none")[0](images)
        whole = model(images)
    assert float((cuts[0] - cuts[1]).norm()) < 0.05 * float((plain - whole).norm())


@pytest.mark.parametrize("extent", ["heads", "all"])
def test_nonsense_is_refused(extent: Extent) -> None:
    body = pack(moments(0), extent)
    check(body, SPEC, extent)
    wrong: list[tuple[np.ndarray, RejectReason]] = [
        (body[:-1], RejectReason.SHAPE),
        (np.concatenate([body, body]), RejectReason.SHAPE),
    ]
    for at, value, reason in (
        (0, np.float32(np.nan), RejectReason.NOT_FINITE),
        (0, np.float32(-1), RejectReason.SHAPE),
        (4 * 24, np.float32(2), RejectReason.SHAPE),  # the constant is 1
        (4 * 25, np.float16(np.inf), RejectReason.NOT_FINITE),
        (4 * 25, np.float16(1.5), RejectReason.SHAPE),
    ):
        changed = body.copy()
        raw = np.frombuffer(value.tobytes(), np.uint8)
        changed[at : at + len(raw)] = raw
        wrong.append((changed, reason))
    for one, reason in wrong:
        with pytest.raises(ProtocolError) as caught:
            check(one, SPEC, extent)
        assert caught.value.reason == reason


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=3000))
def test_no_bytes_do_harm(data: bytes) -> None:
    body = np.frombuffer(data, np.uint8)
    try:
        found = unpack(body, SPEC, "heads", 1.0)
    except ProtocolError:
        return
    assert all(bool(torch.isfinite(one).all()) for one in found.heads)
