"""Hands on what the watcher writes (client/watch.py): each line once, whoever is killed when.

Lines are numbered, and the number of the last one that was handed on is kept in one transaction
with the message that was made of it (common/outbox.py). Places in files are remembered in memory
only, so that nothing is read twice; to forget them costs time, and never a line.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from common.topics import Result

log = logging.getLogger(__name__)

MARK = "results"
MOST = 50
"""Handed on at a time: each is written to the disk for good."""
HEAD = 4096
"""Bytes that tell a file from the next with its inode: numbers, of which none comes again."""

Put = Callable[[Result, int], object]


class _File(NamedTuple):
    """Which file it is: the system gives the inode of one that is gone to the next."""

    inode: int
    head: bytes


class Numbered(NamedTuple):
    """A line; ``result`` is None where the photograph could not be read."""

    number: int
    result: Result | None


class Results:
    """The results of one watcher.

    Args:
        path: of results.jsonl.
        put: keeps a result together with its number, or raises.
        after: the number of the last one that was kept; 0: none was.
    """

    def __init__(self, path: Path, put: Put, after: int) -> None:
        self._path, self._put, self._after = path, put, after
        self._places: dict[_File, int] = {}

    def hand_on(self) -> bool:
        """Put what is new, as far as it goes in a short time; returns whether more waits.

        Raises:
            DiskError: the disk is full; what was not put is put the next time.
        """
        left = MOST
        with ExitStack() as stack:
            files = self._open(stack)
            self._places = {one: self._places.get(one, 0) for one in files}
            for which, file in files.items():
                left -= self._read(which, file, left)
                if left <= 0:
                    return True
        return False

    def _open(self, stack: ExitStack) -> dict[_File, IO[bytes]]:
        """The older file and the newer one; the newer may become the older meanwhile."""
        files: dict[_File, IO[bytes]] = {}
        for path in (self._path, self._path.with_name(f"{self._path.stem}.1{self._path.suffix}")):
            try:
                file = stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                continue
            files[_File(os.fstat(file.fileno()).st_ino, file.read(HEAD))] = file
        return dict(reversed(files.items()))

    def _read(self, which: _File, file: IO[bytes], most: int) -> int:
        """Put what is new in a file; returns how many were."""
        place = self._places[which]
        if os.fstat(file.fileno()).st_size == place:
            return 0
        file.seek(place)
        # lines outlive a power cut before what is made of them does: else they would come again
        os.fsync(file.fileno())
        count = 0
        for raw, line in _lines(file):
            if line is not None and line.number > self._after:
                if count == most:
                    break
                if line.result is not None:
                    self._put(line.result, line.number)
                    count += 1
                self._after = line.number
            place += len(raw)
            self._places[which] = place
        return count


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, Numbered | None]]:
    """Lines as they are and what they say; None: nothing that is of use. Not half a line."""
    for raw in file:
        line = _line(raw)
        if line is None and raw.strip() and not raw.endswith(b"\n"):
            return  # it is still being written
        yield raw, line


def _line(raw: bytes) -> Numbered | None:
    try:
        fields = json.loads(raw)
        number = int(fields["number"])
        if "error" in fields:
            return Numbered(number, None)
        best = fields["likely"][0]
        result = Result(
            taken=fields["state"][0] / 1e9,
            label=best["class"][:200],
            share=best["probability"],
            sure=fields["class"] is not None,
            version=fields["version"],
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # a ValidationError is a ValueError
    return Numbered(number, result)
