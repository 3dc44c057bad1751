"""Error feedback: over the rounds nothing is lost, whatever coding leaves out or the link loses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.residual import carried, encode
from client.state import FarmState
from common import backbone, codec
from common.codec import Floats
from common.compress import expand
from common.config import TrainConfig
from common.mask import Keep
from common.messages import AlignReply, AlignRequest
from common.surgery import prune, slice_tensors
from common.trainable import TrainableSet, trainable_set
from tests.lab.network import SIDE, TINY
from tests.lab.replies import align_reply

SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
LIMIT = 100_000_000


def model_set(train: TrainConfig) -> TrainableSet:
    with torch.device("meta"):
        return trainable_set(backbone.build(SPEC), train.trainable, train.rank)


def request(number: int, train: TrainConfig, folded: int | None, mask: str = "a") -> AlignRequest:
    values = {"run": 1, "round": number, "attempt": 1, "seed": 0, "base": f"{number:064x}"}
    return AlignRequest(**values, mask=mask * 64, train=train, folded=folded)  # type: ignore[arg-type]


def answer(state: FarmState, asked: AlignRequest, delta: Floats, trained: TrainableSet) -> Floats:
    """What the farm does with a delta; returns what the server decodes."""
    rest = carried(state, asked, trained)
    values = delta if rest is None else delta + rest
    coded = encode(values, asked.train, asked.base, trained.rank, seed=asked.round)
    reply = align_reply(coded.update, **asked.identity())
    state.save_reply(asked, "align", reply, coded.lost)
    return codec.decode(expand(coded.update, LIMIT), base=asked.base, count=delta.size)


def delta_of(number: int, count: int) -> Floats:
    return np.random.default_rng(number).standard_normal(count).astype(np.float32)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(codec.BITS),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_what_counted_and_what_is_left_is_all_that_was_learned(
    tmp_path_factory: pytest.TempPathFactory, bits: codec.Bits, top: float, counted: list[bool]
) -> None:
    train = TrainConfig(update_bits=bits, top=top)
    trained, state = model_set(train), FarmState(tmp_path_factory.mktemp("farm"))
    count = trained.layout.count
    learned = np.zeros(count)
    arrived = np.zeros(count)
    folded: int | None = None
    for number, counts in enumerate(counted, start=1):
        delta = delta_of(number, count)
        learned += delta
        sent = answer(state, request(number, train, folded), delta, trained)
        if counts:
            arrived += sent
            folded = number
    rest = carried(state, request(len(counted) + 1, train, folded), trained)
    total = arrived if rest is None else arrived + rest
    np.testing.assert_allclose(total, learned, atol=1e-4)


def test_top_one_percent_says_everything_in_the_end(tmp_path: Path) -> None:
    """The same delta again and again: its mean arrives, although each update is nearly empty."""
    train = TrainConfig(top=0.01)
    trained, state = model_set(train), FarmState(tmp_path)
    delta = delta_of(0, trained.layout.count)
    rounds = 400
    total = np.zeros(delta.size)
    for number in range(1, rounds + 1):
        total += answer(state, request(number, train, number - 1), delta, trained)
    error = np.linalg.norm(total / rounds - delta) / np.linalg.norm(delta)
    assert error < 0.3


@pytest.mark.parametrize("change", ["off", "run", "repeat", "size", "damaged"])
def test_there_is_nothing_to_carry(tmp_path: Path, change: str) -> None:
    train = TrainConfig(update_bits=2)
    trained, state = model_set(train), FarmState(tmp_path)
    answer(state, request(1, train, None), delta_of(1, trained.layout.count), trained)
    asked = request(2, train, 1)
    assert carried(state, asked, trained) is not None
    if change == "off":
        quiet = train.model_copy(update={"error_feedback": False})
        asked = asked.model_copy(update={"train": quiet})
    if change == "run":
        asked = asked.model_copy(update={"run": 2})
    if change == "repeat":  # the server started over: the round that it asks is the one on disk
        asked = request(1, train, None)
    if change == "size":
        trained = model_set(TrainConfig(trainable="attention"))
    if change == "damaged":
        for path in (tmp_path / "replies").iterdir():
            path.write_bytes(path.read_bytes()[:-100])
    assert carried(state, asked, trained) is None


def test_an_older_reply_never_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    train = TrainConfig(update_bits=2)
    trained, state = model_set(train), FarmState(tmp_path)
    for number in (1, 2):
        delta = delta_of(number, trained.layout.count)
        answer(state, request(number, train, number - 1), delta, trained)
    newest = max((tmp_path / "replies").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:50])
    assert carried(state, request(3, train, 2), trained) is None


@pytest.mark.parametrize("kind", ["bias", "lora"])
def test_a_cut_takes_its_part_of_the_residual_away(tmp_path: Path, kind: str) -> None:
    train = TrainConfig.model_validate({"trainable": kind, "rank": 2, "update_bits": 4})
    trained, state = model_set(train), FarmState(tmp_path)
    answer(state, request(1, train, None), delta_of(1, trained.layout.count), trained)
    before = carried(state, request(2, train, 1), trained)
    assert before is not None
    keep = Keep(
        tuple(np.array([1, 3]) for _ in SPEC.heads),
        tuple(np.arange(1, count, 2) for count in SPEC.neurons),
    )
    smaller, _ = prune(backbone.build(SPEC), SPEC, keep)
    cut = trainable_set(smaller, train.trainable, train.rank)
    asked = request(2, train, 1, mask="b")
    assert carried(state, asked, cut) is None  # this farm has not seen the cut
    state.save_cut("b" * 64, SPEC, keep, "a" * 64)
    after = carried(state, asked, cut)
    assert after is not None
    expected = slice_tensors(trained.layout.unflatten(before), SPEC, keep)
    np.testing.assert_array_equal(after, cut.layout.flatten(expected))


def test_reports_do_not_push_out_what_is_carried(tmp_path: Path) -> None:
    train = TrainConfig(update_bits=4)
    trained, state = model_set(train), FarmState(tmp_path)
    asked = request(1, train, None)
    answer(state, asked, delta_of(1, trained.layout.count), trained)
    reply = state.load_reply(asked, "align")
    assert isinstance(reply, AlignReply)
    for number in range(10):
        state.save_reply(asked, f"report{number}", reply)
    assert carried(state, request(2, train, 1), trained) is not None
    assert len(list((tmp_path / "replies").iterdir())) < 6


def test_only_the_same_work_is_answered_from_disk(tmp_path: Path) -> None:
    """A server restored from a backup uses numbers again, perhaps with other settings."""
    train = TrainConfig(update_bits=4)
    state, asked = FarmState(tmp_path), request(1, train, None)
    answer(state, asked, np.ones(model_set(train).layout.count, np.float32), model_set(train))
    same = {"attempt": 3, "body_kind": "full", "steps": 4, "folded": 0}
    assert isinstance(state.load_reply(asked.model_copy(update=same), "align"), AlignReply)
    for other in ({"seed": 1}, {"train": TrainConfig(update_bits=8)}, {"criterion": "taylor"}):
        assert state.load_reply(asked.model_copy(update=other), "align") is None
