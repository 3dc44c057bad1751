"""Bytes from another machine are decoded or refused: a short run of ``make fuzz``."""

import numpy as np
import pytest

from tests.lab import fuzz
from tests.lab.fuzz import Target, described, targets

SLOW = {"step": 100, "tensors": 100, "chain": 500}


@pytest.mark.parametrize("name", sorted(targets()))
def test_mutated_bytes_are_decoded_or_refused(name: str) -> None:
    crashes = [crash for crash in fuzz.fuzz(name, 1, SLOW.get(name, 1500)) if crash is not None]
    assert not crashes, described(crashes[0])


@pytest.mark.parametrize("name", sorted(targets()))
def test_what_fuzzing_begins_with_is_valid(name: str) -> None:
    for data in targets()[name].corpus:
        targets()[name].decode(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("fault", ["raises", "hangs", "takes memory"])
def test_a_decoder_that_fails_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        if fault == "raises":
            raise IndexError("out of range")
        if fault == "takes memory":
            bytearray(10_000_000)
        while fault == "hangs":
            pass

    bad = Target(decode, (b"anything",), 1000)
    monkeypatch.setattr(fuzz, "targets", lambda: {"bad": bad})
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    crashes = list(fuzz.fuzz("bad", 1, 3))
    assert all(crash is not None for crash in crashes)
    assert crashes[0] is not None
    words = {"raises": "IndexError", "hangs": "took more", "takes memory": "allocated"}
    assert words[fault] in crashes[0].how
