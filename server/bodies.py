"""Whole candidates among the objects that the hub hands over, for farms that can fetch from it.

    bodies/ab/abcd...   what a request would otherwise carry (common/objects.py)

An ordinary request carries kilobytes. Only a farm that holds nothing to build on needs the whole of
a candidate; from the hub it comes piece by piece, and a cut line costs one piece of it.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from common.errors import DiskError
from common.messages import Array
from common.objects import Objects

log = logging.getLogger(__name__)

KEPT = 2
"""Newest candidates; a farm that is slower is sent the whole in the next request."""


def bodies_of(state_dir: Path) -> Objects:
    """The folder of a server's bodies."""
    return Objects(state_dir / "bodies")


class Bodies:
    """The bodies that a run has placed there.

    Args:
        state_dir: of the server.
        body: makes the body of a candidate.
    """

    def __init__(self, state_dir: Path, body: Callable[[str], Array]) -> None:
        self._objects, self._body = bodies_of(state_dir), body
        self._placed: dict[str, tuple[str, int]] = {}

    def place(self, candidate: str) -> tuple[str, int] | None:
        """Name (sha256) and length of a candidate's body, which is there from now on.

        Returns:
            None where the disk has no room for it.
        """
        if candidate not in self._placed:
            body = self._body(candidate)
            try:
                name = self._objects.add(body.tobytes())
            except DiskError as error:
                log.error("%s; the hub does not hand over %s", error, candidate[:12])
                return None
            self._placed[candidate] = name, body.size
            for old in list(self._placed)[:-KEPT]:
                del self._placed[old]
            self._objects.keep_only([digest for digest, _ in self._placed.values()])
        return self._placed[candidate]
