"""The spool: replies on disk, read in slices, damage found before use."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common import codec
from common.errors import StateError
from common.messages import AlignReply
from server.spool import Spool

BASE = "aa" * 32


def reply(scored: bool = False, seed: int = 0) -> AlignReply:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(5000).astype(np.float32)
    scores: dict[str, Any] = {
        "head_importance": rng.random(6, dtype=np.float32),
        "head_mmd2": rng.standard_normal(6).astype(np.float32),
        "neuron_importance": rng.integers(0, 256, 40).astype(np.uint8),
    }
    return AlignReply(
        run=3,
        round=2,
        attempt=1,
        farm="rice",
        base=BASE,
        mask=BASE,
        examples=10,
        accuracy=0.5,
        f1=0.5,
        loss=1,
        dal=0,
        steps=1,
        train_seconds=1,
        seconds=1,
        update=codec.encode(values, BASE),
        **(scores if scored else {}),
    )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_update_comes_back_slice_by_slice(spool: Spool) -> None:
    sent = reply()
    reader = spool.open(spool.put(3, 2, 17, sent).path)
    assert reader.node == 17
    assert reader.update_bytes == sent.update.size
    assert reader.read(0, sent.update.size) == sent.update.tobytes()
    assert reader.read(100, 50) == sent.update[100:150].tobytes()
    assert reader.read(sent.update.size - 5, 50) == sent.update[-5:].tobytes()
    assert reader.read(sent.update.size + 5, 50) == b""
    part = codec.decode_slice(reader.read, codec.read_header(reader.read(0, 52)), 300, 900)
    np.testing.assert_array_equal(part, codec.decode(sent.update, base=BASE, count=5000)[300:900])


def test_scores_come_back_exactly(spool: Spool) -> None:
    sent = reply(scored=True)
    reader = spool.open(spool.put(3, 2, 17, sent).path)
    scores = reader.scores()
    assert reader.read(0, sent.update.size) == sent.update.tobytes()
    for name in ("head_importance", "head_mmd2", "neuron_importance"):
        found, expected = getattr(scores, name), getattr(sent, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_a_reply_without_scores_says_so(spool: Spool) -> None:
    reader = spool.open(spool.put(3, 2, 17, reply()).path)
    with pytest.raises(StateError, match="not of a score round"):
        reader.scores()


def test_a_round_may_have_more_replies_than_files_may_be_open(spool: Spool) -> None:
    before = psutil.Process().num_fds()
    readers = [spool.open(spool.put(3, 2, node, reply()).path) for node in range(20)]
    assert psutil.Process().num_fds() == before
    assert [reader.node for reader in readers] == list(range(20))


def test_the_same_reply_is_the_same_file(spool: Spool, tmp_path: Path) -> None:
    first, again = spool.put(3, 2, 17, reply(True)), spool.put(3, 2, 17, reply(True))
    assert first == again
    assert files_below(tmp_path) == [first.path]
    assert spool.put(3, 2, 18, reply(True)).digest != first.digest


@pytest.mark.parametrize("place", [0, 7, 9, 60, 2000, -1])
def test_a_damaged_file_is_named(spool: Spool, place: int) -> None:
    path = spool.put(3, 2, 17, reply(True)).path
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StateError, match=path.name):
        spool.open(path)


def test_a_cut_or_missing_file_is_named(spool: Spool) -> None:
    path = spool.put(3, 2, 17, reply()).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match=path.name):
        spool.open(path)
    path.unlink()
    with pytest.raises(StateError, match=path.name):
        spool.open(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{}", b"\x00" * 64])
def test_a_file_that_matches_its_name_but_is_no_reply_is_named(
    spool: Spool, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    path.write_bytes(data)
    with pytest.raises(StateError, match="not a spooled reply"):
        spool.open(path)


def test_a_committed_round_is_discarded_alone(spool: Spool, tmp_path: Path) -> None:
    spool.put(3, 1, 17, reply())
    kept = spool.put(3, 2, 17, reply())
    spool.discard_round(3, 1)
    assert files_below(tmp_path) == [kept.path]
    spool.discard_round(3, 2)
    spool.discard_round(3, 2)
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_sweep_leaves_only_what_is_known(spool: Spool, tmp_path: Path) -> None:
    kept = spool.put(3, 2, 17, reply())
    spool.put(3, 2, 18, reply())
    spool.put(2, 1, 17, reply())
    half = kept.path.with_name(f".{kept.path.name}.x1y2")
    half.write_bytes(b"half")
    assert spool.sweep([kept.path]) == 3
    assert files_below(tmp_path) == [kept.path]
    assert not (tmp_path / "spool" / "2").exists()
    assert spool.open(kept.path).node == 17
    assert Spool(tmp_path / "none").sweep([]) == 0
