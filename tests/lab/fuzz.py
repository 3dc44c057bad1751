"""Mutated bytes for everything that decodes what came from another machine.

Every target may refuse its input with an error of ours. Anything else is a crash: another
exception, more memory than the target's bound, or more than ``SECONDS`` of this process's time.
"""

import copy
import functools
import json
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from common import backbone, codec
from common.anchors import Anchors, compute_anchors
from common.catchup import chain, changed, replace, steps_of
from common.codec import Bytes
from common.compress import compress, expand
from common.config import TrainConfig
from common.errors import FieldfedError
from common.mask import Keep
from common.messages import AlignRequest, from_parts, to_parts
from common.scores import decode_neurons, encode_neurons
from common.step import MAX_BYTES, Cut, Step, most_bytes
from common.surgery import prune
from common.trainable import trainable_set
from tests.lab.network import SIDE, TINY

SECONDS = 2.0
COUNT = 3001
SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
BASE = "ab" * 32
NEURONS = 300


@dataclass(frozen=True)
class Target:
    """A decoder: valid inputs to begin with, and the bytes that it may allocate for any input."""

    decode: Callable[[Bytes], object]
    corpus: tuple[bytes, ...]
    bound: int


@dataclass(frozen=True)
class Crash:
    """An input that a target did not survive, and how."""

    target: str
    data: bytes
    how: str


class TimeIsUpError(BaseException):
    """Not an Exception, so that no decoder can swallow it."""


def _values(count: int, kept: float = 1.0) -> codec.Floats:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(count).astype(np.float32)
    return np.where(rng.random(count) < kept, values, np.float32(0))


def _updates() -> tuple[bytes, ...]:
    return tuple(
        codec.encode(_values(COUNT, kept), BASE, bits=bits, block=64).tobytes()
        for bits in codec.BITS
        for kept in (1.0, 0.05)
    )


def _decode_update(data: Bytes) -> None:
    codec.check(data, base=None, count=COUNT)
    values = codec.decode(data, base=None, count=COUNT)
    assert np.isfinite(values).all()
    header = codec.read_header(data)
    part = codec.decode_slice(codec.reader_of(data), header, COUNT // 3, COUNT // 2)
    assert np.array_equal(part, values[COUNT // 3 : COUNT // 2])


def _slice_of_anything(data: Bytes) -> None:
    """As the aggregate reads a spooled reply: the length of the payload is not checked again."""
    header = codec.read_header(data)
    codec.check_header(header, base=None, count=COUNT)
    codec.decode_slice(codec.reader_of(data), header, 10, 500)


@functools.cache
def _model() -> VisionTransformer:
    torch.manual_seed(0)
    return backbone.build(SPEC)


def _copy() -> VisionTransformer:
    return copy.deepcopy(_model())


def _steps() -> tuple[bytes, ...]:
    update = codec.encode(_values(trainable_set(_model(), "bias").layout.count), BASE)
    keep = Keep(
        tuple(np.arange(0, count, 2) for count in SPEC.heads),
        tuple(np.arange(0, count, 3) for count in SPEC.neurons),
    )
    plain, _ = prune(_copy(), SPEC, keep)
    better, _ = prune(_copy(), SPEC, keep)
    with torch.no_grad():
        dict(better.named_parameters())["blocks.0.attn.proj.weight"].add_(0.5)
    cut = Cut.between(plain, better, keep, BASE)
    lora = trainable_set(_model(), "lora", 2)
    factors = codec.encode(_values(lora.layout.count), BASE, rank=2)
    whole = [Step(update), Step(update, cut), Step(factors)]
    packed = [step.to_bytes() for step in whole]
    # uncompressed too: what a frame holds is rarely valid once the frame is damaged
    return tuple(data.tobytes() for data in [*packed, *(expand(one, MAX_BYTES) for one in packed)])


def _tensors() -> bytes:
    other = _copy()
    with torch.no_grad():
        dict(other.named_parameters())["norm.bias"].add_(0.5)
    body = changed(_model(), other)
    assert body is not None
    return body.tobytes()


def _take_step(data: Bytes) -> None:
    step = Step.from_bytes(data, most_bytes(_model()))
    step.apply(_copy(), SPEC)


def _take_chain(data: Bytes) -> None:
    steps_of(data, most_bytes(_model()))


def _take_tensors(data: Bytes) -> None:
    replace(_worn(), data)


@functools.cache
def _worn() -> VisionTransformer:
    """A backbone that all damaged tensors are put into: a copy each time would take longest."""
    return _copy()


def _message() -> bytes:
    request = AlignRequest(
        run=1, round=2, attempt=1, seed=0, base=BASE, mask=BASE, train=TrainConfig(), folded=1
    )
    return to_parts(request)[0].encode()


def _anchors() -> bytes:
    return compute_anchors(_model(), [torch.rand(8, 3, SIDE, SIDE)], 0, False).to_bytes()


def _read_anchors(data: Bytes) -> None:
    Anchors.from_bytes(data.tobytes())


def _read_message(data: Bytes) -> None:
    from_parts(data.tobytes().decode(errors="replace"), {})


@functools.cache
def targets() -> dict[str, Target]:
    """Everything that is fuzzed, by name."""
    updates, steps = _updates(), _steps()
    raw = [np.frombuffer(step, np.uint8) for step in steps]
    frames = tuple(
        compress(np.frombuffer(bytes(range(200)) * n, np.uint8)).tobytes() for n in (1, 50)
    )
    neurons = encode_neurons(np.abs(_values(NEURONS))).tobytes()
    return {
        "update": Target(_decode_update, updates, 400_000),
        "spooled update": Target(_slice_of_anything, updates, 400_000),
        "frame": Target(lambda data: expand(data, 20_000), frames, 100_000),
        "step": Target(_take_step, steps, 20_000_000),
        "chain": Target(_take_chain, (chain(raw).tobytes(), chain(raw[:1]).tobytes()), 20_000_000),
        "tensors": Target(_take_tensors, (_tensors(),), 20_000_000),
        "neurons": Target(lambda data: decode_neurons(data, NEURONS), (neurons,), 100_000),
        "anchors": Target(
            lambda data: Anchors.from_bytes(data.tobytes()), (_anchors(),), 20_000_000
        ),
        "message": Target(_read_message, (_message(),), 1_000_000),
    }


# --- mutation ------------------------------------------------------------------------------------

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutated(data: bytes, rng: random.Random, others: tuple[bytes, ...]) -> bytes:
    """One to four changes of valid bytes, most of them near the beginning, where headers lie."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = len(found) if rng.random() < 0.5 else min(len(found), 200)
        place = rng.randrange(end) if end else 0
        kind = rng.randrange(7)
        if kind == 0 and found:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and found:
            found[place] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(_EXTREMES) % 256**width
            found[place : place + width] = value.to_bytes(width, "little")
        elif kind == 3:
            del found[place:]
        elif kind == 4:
            found[place:place] = rng.randbytes(rng.randint(1, 40))
        elif kind == 5:
            del found[place : place + rng.randint(1, 40)]
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            found[place:] = other[start:]
    return bytes(found)


# --- one input -----------------------------------------------------------------------------------


def attempt(name: str, data: bytes) -> Crash | None:
    """Decode one input under the bounds; None when it was decoded or refused."""
    target = targets()[name]
    array = np.frombuffer(data, np.uint8)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    how = None
    try:
        with _limited():
            target.decode(array)
    except FieldfedError:
        pass
    except TimeIsUpError:
        how = f"took more than {SECONDS} s of computing"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        how = f"{type(error).__name__}: {error}"[:300]
    peak = tracemalloc.get_traced_memory()[1] - before
    if how is None and peak > target.bound + 4 * len(data):
        how = f"allocated {peak} bytes for {len(data)}"
    return None if how is None else Crash(name, data, how)


@contextmanager
def _limited() -> Iterator[None]:
    def ring(_number: int, _frame: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, seed: int, inputs: int) -> Iterator[Crash | None]:
    """So many mutated inputs for one target, the same for the same seed."""
    target, rng = targets()[name], random.Random(f"{name}/{seed}")
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        for _ in range(inputs):
            yield attempt(name, mutated(rng.choice(target.corpus), rng, target.corpus))
    finally:
        if started:
            tracemalloc.stop()


def described(crash: Crash) -> str:
    """One line of JSON."""
    return json.dumps({"target": crash.target, "how": crash.how, "data": crash.data.hex()[:400]})
