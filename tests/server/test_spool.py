"""The spool: replies on disk, read in slices, damage found before use."""

import hashlib
import re
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common import codec
from common.errors import DiskError, StateError
from common.messages import AlignReply
from server.rows import SpooledReply
from server.spool import Spool
from tests.lab.replies import align_reply

BASE = "aa" * 32


def reply(scored: bool = False, seed: int = 0) -> AlignReply:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(5000).astype(np.float32)
    scores: dict[str, Any] = {
        "head_importance": rng.random(6, dtype=np.float32),
        "head_mmd2": rng.standard_normal(6).astype(np.float32),
        "neuron_importance": rng.integers(0, 256, 40).astype(np.uint8),
    }
    update = codec.encode(values, BASE)
    return align_reply(update, run=3, round=2, farm="rice", **(scores if scored else {}))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_update_comes_back_slice_by_slice(spool: Spool) -> None:
    sent = reply()
    reader = spool.open(spool.put(3, 2, 17, sent))
    assert reader.node == 17
    assert reader.update_bytes == sent.update.size
    assert reader.read(0, sent.update.size) == sent.update.tobytes()
    assert reader.read(100, 50) == sent.update[100:150].tobytes()
    assert reader.read(sent.update.size - 5, 50) == sent.update[-5:].tobytes()
    assert reader.read(sent.update.size + 5, 50) == b""
    part = codec.decode_slice(
        reader.read, codec.read_header(reader.read(0, codec.HEADER_BYTES)), 300, 900
    )
    np.testing.assert_array_equal(part, codec.decode(sent.update, base=BASE, count=5000)[300:900])


def test_scores_come_back_exactly(spool: Spool) -> None:
    sent = reply(scored=True)
    reader = spool.open(spool.put(3, 2, 17, sent))
    scores = reader.scores()
    assert reader.read(0, sent.update.size) == sent.update.tobytes()
    for name in ("head_importance", "head_mmd2", "neuron_importance"):
        found, expected = getattr(scores, name), getattr(sent, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_a_reply_without_scores_says_so(spool: Spool) -> None:
    reader = spool.open(spool.put(3, 2, 17, reply()))
    with pytest.raises(StateError, match="not of a score round"):
        reader.scores()


def test_a_round_may_have_more_replies_than_files_may_be_open(spool: Spool, tmp_path: Path) -> None:
    readers = [spool.open(spool.put(3, 2, node, reply())) for node in range(20)]
    # by name: what other tests of this process left open may be closed at any time
    opened = [Path(file.path) for file in psutil.Process().open_files()]
    assert not [path for path in opened if path.is_relative_to(tmp_path)]
    assert [reader.node for reader in readers] == list(range(20))


def test_a_round_is_one_file_and_each_reply_has_its_place(spool: Spool, tmp_path: Path) -> None:
    sent = [reply(scored=bool(seed % 2), seed=seed) for seed in range(4)]
    kept = [spool.put(3, 2, 10 + seed, sent[seed]) for seed in range(4)]
    assert files_below(tmp_path) == [kept[0].path]
    for seed in (2, 0, 3, 1):
        reader = spool.open(kept[seed])
        assert reader.node == 10 + seed
        assert reader.read(0, 10**6) == sent[seed].update.tobytes()
        assert reader.read(7, 5) == sent[seed].update[7:12].tobytes()


@pytest.mark.parametrize("place", [0, 7, 9, 60, 2000, -1])
def test_a_damaged_reply_is_named_and_the_others_stand(spool: Spool, place: int) -> None:
    first, spooled, last = (spool.put(3, 2, node, reply(True)) for node in (1, 17, 2))
    data = bytearray(spooled.path.read_bytes())
    data[spooled.start + place % spooled.length] ^= 0xFF
    spooled.path.write_bytes(data)
    with pytest.raises(StateError, match=re.escape(f"{spooled.path.name} at {spooled.start}")):
        spool.open(spooled)
    assert [spool.open(kept).node for kept in (first, last)] == [1, 2]


def test_a_cut_or_missing_file_is_named(spool: Spool) -> None:
    spooled = spool.put(3, 2, 17, reply())
    spooled.path.write_bytes(spooled.path.read_bytes()[:-1])
    with pytest.raises(StateError, match=spooled.path.name):
        spool.open(spooled)
    spooled.path.unlink()
    with pytest.raises(StateError, match=spooled.path.name):
        spool.open(spooled)


def test_what_a_crash_left_half_written_harms_nobody(spool: Spool) -> None:
    first = spool.put(3, 2, 17, reply())
    with first.path.open("ab") as file:
        file.write(b"half a reply")
    second = spool.put(3, 2, 18, reply())
    assert [spool.open(kept).node for kept in (first, second)] == [17, 18]


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{}", b"\x00" * 64])
def test_what_matches_its_digest_but_is_no_reply_is_named(
    spool: Spool, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "2.replies"
    path.write_bytes(data)
    with pytest.raises(StateError, match="not a spooled reply"):
        spool.open(SpooledReply(path, 0, len(data), hashlib.sha256(data).hexdigest()))


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
    spool.put(3, 1, 18, reply())
    spool.put(2, 1, 17, reply())
    assert spool.sweep([kept.path]) == 2
    assert files_below(tmp_path) == [kept.path]
    assert not (tmp_path / "spool" / "2").exists()
    assert spool.open(kept).node == 17
    assert Spool(tmp_path / "none").sweep([]) == 0


def test_a_reply_that_does_not_fit_leaves_the_others(spool: Spool) -> None:
    kept = spool.put(3, 2, 17, reply())
    size = kept.path.stat().st_size
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, hard))
    try:
        with pytest.raises(DiskError, match=r"2\.replies"):
            spool.put(3, 2, 18, reply())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert kept.path.stat().st_size == size
    assert spool.open(kept).node == 17
