"""Farms on one machine take turns at the heavy work, so that they do not fight for its cores.

A farm that waits has everything else behind it already: its process, its imports, its request.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import StateError
from common.files import lock

POLL_SECONDS = 0.1


@contextlib.contextmanager
def turn(folder: Path | None, places: int) -> Iterator[None]:
    """Wait for one of ``places`` places at work; the system frees it however the process ends.

    Args:
        folder: that the farms of this machine share; None: nobody to wait for.
        places: farms at work at once.

    Raises:
        StateError: the folder cannot be written.
    """
    if folder is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = [stack.enter_context((folder / str(n)).open("ab")) for n in range(places)]
        except OSError as error:
            raise StateError(
                f"[farm] turns: '{folder}' cannot be used: {error.strerror}"
            ) from error
        while not any(lock(file) for file in files):
            time.sleep(POLL_SECONDS)
        yield
