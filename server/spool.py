"""Valid replies on disk until their round commits, so that memory stays bounded.

    RUN/ROUND.replies    the replies of a round one behind the other, each a safetensors file:
                         the coded update and, in score rounds, the scores

Where a reply lies, and its sha256, is on record: a damaged one is found before it is used. The
update is read slice by slice straight from its place in the file; nothing ever loads it whole.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from common.errors import StateError
from common.files import append
from common.messages import AlignReply, Array
from common.tensors import header_of
from server.rows import SpooledReply

_SUFFIX = ".replies"
_SCORES = ("head_importance", "head_mmd2", "neuron_importance")


@dataclass(frozen=True, eq=False)
class ReplyScores:
    """Scores as a farm sent them, flat over blocks.

    ``head_importance`` and ``head_mmd2`` are fp32 (sum of heads,), ``neuron_importance`` is
    uint8 (sum of neurons,).
    """

    head_importance: npt.NDArray[np.float32]
    head_mmd2: npt.NDArray[np.float32]
    neuron_importance: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Place:
    dtype: str
    offset: int
    length: int


_Places: TypeAlias = dict[str, _Place]


class Origin(NamedTuple):
    """Who sent a reply."""

    node: int
    farm: str


class ReplyReader:
    """An undamaged reply; ``read`` yields bytes of the coded update, ``scores`` the small arrays.

    The file is open only while it is read: a round may have more replies than a process may have
    open files.
    """

    def __init__(self, spooled: SpooledReply, origin: Origin, places: _Places) -> None:
        self.spooled, self.node, self.farm = spooled, *origin
        self._places = places

    @property
    def update_bytes(self) -> int:
        """Length of the coded update."""
        return self._places["update"].length

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the coded update from ``offset``; fewer at its end."""
        return self._bytes("update", offset, length)

    def scores(self) -> ReplyScores:
        """The scores; raises StateError when the reply came without."""
        missing = [name for name in _SCORES if name not in self._places]
        if missing:
            raise StateError(f"'{self.spooled}' holds no {missing[0]}: it is not of a score round")
        arrays = {name: self.array(name) for name in _SCORES}
        return ReplyScores(**arrays)

    def array(self, name: str) -> Array:
        """One array of the reply, fp32 or uint8; raises KeyError when it came without."""
        place = self._places[name]
        dtype = np.dtype("<f4") if place.dtype == "F32" else np.dtype(np.uint8)
        values = np.frombuffer(self._bytes(name, 0, place.length), dtype)
        return values.astype(dtype.newbyteorder("="))

    def optional(self, name: str) -> Array | None:
        """The same, or None where it came without."""
        return self.array(name) if name in self._places else None

    def _bytes(self, name: str, offset: int, length: int) -> bytes:
        place = self._places[name]
        length = max(0, min(length, place.length - offset))
        with _opened(self.spooled) as file:
            file.seek(self.spooled.start + place.offset + offset)
            return file.read(length)


class Spool:
    """The folder of spooled replies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, run: int, number: int, node: int, reply: AlignReply) -> SpooledReply:
        """Append a reply to the others of its round.

        Raises:
            DiskError: the disk is full or cannot be written.
        """
        arrays = {name: value for name, value in reply if isinstance(value, np.ndarray)}
        # one key: safetensors writes several metadata keys in no particular order
        about = json.dumps({"run": run, "round": number, "node": node, "farm": reply.farm})
        data = save(arrays, metadata={"reply": about})
        path = self._file(run, number)
        # a reply that a power cut damages does not match its digest: its farm is asked again, and
        # answers from its own disk; waiting for ours would cost every round a second
        start = append(path, data)
        return SpooledReply(path, start, len(data), hashlib.sha256(data).hexdigest())

    def open(self, spooled: SpooledReply) -> ReplyReader:
        """A reply whose contents agree with its digest.

        Raises:
            StateError: the file is missing or damaged; names it.
        """
        with _opened(spooled) as file:
            file.seek(spooled.start)
            data = file.read(spooled.length)
        if hashlib.sha256(data).hexdigest() != spooled.digest:
            raise StateError(
                f"spooled reply '{spooled}' is damaged: its contents do not match its digest; "
                "check the disk; the farm has to send this reply again"
            )
        try:
            return ReplyReader(spooled, *_places(data))
        except (KeyError, ValueError, TypeError) as error:
            raise StateError(f"'{spooled}' is not a spooled reply: {error}") from error

    def discard_round(self, run: int, number: int) -> None:
        """Remove the replies of a round; call it once the round is committed."""
        with contextlib.suppress(OSError):  # what cannot be removed is swept at the next start
            self._file(run, number).unlink(missing_ok=True)
            self._file(run, number).parent.rmdir()  # other rounds may be there

    def sweep(self, known: Iterable[Path]) -> int:
        """Remove the files in which no known reply lies.

        Call it at start, before anything is put. Returns how many files were removed.
        """
        keep = {path.resolve() for path in known}
        orphans = [
            path
            for path in self._folder.rglob("*")
            if path.is_file() and path.resolve() not in keep
        ]
        for path in orphans:
            path.unlink(missing_ok=True)
        for folder in sorted(self._folder.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):  # a file, or not empty
                folder.rmdir()
        return len(orphans)

    def _file(self, run: int, number: int) -> Path:
        return self._folder / str(run) / f"{number}{_SUFFIX}"


@contextlib.contextmanager
def _opened(spooled: SpooledReply) -> Iterator[BufferedReader]:
    try:
        with spooled.path.open("rb") as file:
            yield file
    except OSError as error:
        raise StateError(f"spooled reply '{spooled}' cannot be read: {error.strerror}") from error


def _places(data: bytes) -> tuple[Origin, _Places]:
    """Where the tensors lie; a header's offsets count from its end."""
    header, start = header_of(data)
    about = json.loads(header.pop("__metadata__")["reply"])
    origin = Origin(int(about["node"]), str(about["farm"]))
    places = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        places[name] = _Place(entry["dtype"], start + begin, end - begin)
    if "update" not in places:
        raise ValueError("it holds no update")
    return origin, places
