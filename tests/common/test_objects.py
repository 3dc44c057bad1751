"""Objects by content: nothing is believed before its sha256 is right, nothing comes twice."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RefusalError, RefuseReason
from common.objects import PIECE_BYTES, Objects, is_digest


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_same_content_is_kept_once(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    assert objects.add(b"leaf") == objects.add(b"leaf") == digest(b"leaf")
    assert objects.lacking({digest(b"leaf"): 4}) == {}
    assert objects.load(digest(b"leaf"), 4) == b"leaf"
    assert objects.read(digest(b"leaf"), 1, 2) == b"ea"


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=1, max_size=300), st.data())
def test_an_object_comes_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("objects")
    name, wanted = digest(data), {digest(data): len(data)}
    while lacking := Objects(folder).lacking(wanted):  # a new process at every piece
        held = lacking[name]
        end = draw.draw(st.integers(held + 1, len(data)))
        assert Objects(folder).receive(name, held, data[held:end], len(data)) == end
    assert Objects(folder).load(name, len(data)) == data


def test_a_gap_a_repetition_and_too_much_are_refused(tmp_path: Path) -> None:
    objects, name = Objects(tmp_path), digest(b"leaves")
    objects.receive(name, 0, b"lea", 6)
    for offset, data in ((0, b"lea"), (4, b"es"), (3, b"vess")):
        with pytest.raises(RefusalError, match="but 3 are here"):
            objects.receive(name, offset, data, 6)
    objects.receive(name, 3, b"ves", 6)
    assert objects.has(name)


def test_other_bytes_than_announced_are_thrown_away(tmp_path: Path) -> None:
    objects, name = Objects(tmp_path), digest(b"leaves")
    with pytest.raises(RefusalError, match="thrown away") as caught:
        objects.receive(name, 0, b"thorns", 6)
    assert caught.value.reason is RefuseReason.DAMAGED
    assert objects.lacking({name: 6}) == {name: 0}


def test_damage_on_disk_is_found_and_fetched_again(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    name = objects.add(b"leaves")
    objects.path(name).write_bytes(b"leavez")
    with pytest.raises(RefusalError, match="was damaged on disk"):
        objects.load(name, 6)
    assert objects.lacking({name: 6}) == {name: 0}


def test_a_part_longer_than_its_object_begins_again(tmp_path: Path) -> None:
    objects, name = Objects(tmp_path), digest(b"leaves")
    objects.receive(name, 0, b"leave", 6)
    assert objects.lacking({name: 4}) == {name: 0}


def test_a_killed_process_costs_one_piece(tmp_path: Path) -> None:
    data = bytes(3 * PIECE_BYTES)
    objects, name, wanted = Objects(tmp_path), digest(data), {digest(data): len(data)}
    objects.receive(name, 0, data[: 2 * PIECE_BYTES + 5], len(data))
    again = Objects(tmp_path)
    again.resume(wanted)
    assert again.lacking(wanted) == {name: 2 * PIECE_BYTES}
    again.receive(name, 2 * PIECE_BYTES, data[2 * PIECE_BYTES :], len(data))
    assert again.has(name)


def test_a_part_that_is_whole_is_finished(tmp_path: Path) -> None:
    objects, name = Objects(tmp_path), digest(b"leaves")
    objects.receive(name, 0, b"leave", 6)
    (part,) = tmp_path.glob("??/*.part")
    part.write_bytes(b"leaves")  # killed before it got its name
    objects.resume({name: 6})
    assert objects.has(name)


def test_a_part_that_was_spoilt_at_its_end_goes_on_before_it(tmp_path: Path) -> None:
    data = b"x" * (2 * PIECE_BYTES)
    objects, name = Objects(tmp_path), digest(data)
    objects.receive(name, 0, data[:PIECE_BYTES], len(data))
    (part,) = tmp_path.glob("??/*.part")
    part.write_bytes(data[:PIECE_BYTES] + bytes(PIECE_BYTES))  # its length came to the disk
    objects.resume({name: len(data)})
    assert objects.lacking({name: len(data)}) == {name: PIECE_BYTES}


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=r"100000000\.0 MB are to be fetched") as caught:
        Objects(tmp_path).require_room(100_000_000_000_000)
    assert caught.value.reason is RefuseReason.TOO_LARGE


def test_what_nobody_wants_goes_whole_or_not(tmp_path: Path) -> None:
    objects, name = Objects(tmp_path), digest(b"leaves")
    kept, gone = objects.add(b"kept"), objects.add(b"gone!")
    objects.receive(name, 0, b"lea", 6)
    objects.path(name).with_name(".abc.tmp").write_bytes(b"x")
    assert objects.keep_only({kept, name}) == [5] or not objects.has(gone)
    assert objects.lacking({kept: 4, name: 6}) == {name: 3}
    assert not list(tmp_path.glob("??/.*"))
    assert objects.keep_only({kept}) == [3]


@pytest.mark.parametrize("text", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 63 + "/"])
def test_no_path_passes_for_a_digest(text: str) -> None:
    assert not is_digest(text)
    assert is_digest("0af" + "1" * 61)
