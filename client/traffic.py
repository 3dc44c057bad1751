"""Bytes at the farm's socket, counted over the farm's life and kept in ``STATE/traffic.json``.

The relay (client/relay.py) counts and writes; whoever puts a reply together reads. What came from
the hub for a round is kept beside it, as bytes of objects: that line is not the relay's.
"""

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.files import write_atomically

log = logging.getLogger(__name__)

FILE, HUB_FILE = "traffic.json", "traffic-hub.json"
LIMIT = 2**50
"""More bytes than any farm's link carries in its life (an exbibyte's thousandth)."""


class Counters(BaseModel):
    """TCP payload in bytes: what the farm sent to the server, and what it received."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sent: int = Field(default=0, ge=0, lt=LIMIT)
    received: int = Field(default=0, ge=0, lt=LIMIT)


def read(state_dir: Path) -> Counters | None:
    """The counters on disk, about a second old while messages move; None where nobody counts."""
    return _read(state_dir / FILE)


def _read(path: Path) -> Counters | None:
    try:
        return Counters.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("'%s' cannot be read: %s", path, error)
        return None


def resume(state_dir: Path) -> Counters:
    """Where counting goes on; from 0 when the file is absent or damaged."""
    found = read(state_dir)
    if found is None:
        log.info("no counters in '%s': bytes are counted from 0", state_dir / FILE)
    return found or Counters()


def keep(state_dir: Path, counters: Counters) -> None:
    """Write the counters, atomically and fsynced.

    Raises:
        DiskError: the disk is full or the folder cannot be written.
    """
    write_atomically(state_dir / FILE, counters.model_dump_json().encode())


def fields(state_dir: Path) -> dict[str, int]:
    """The fields ``link_sent`` and ``link_received`` of a reply; none where nobody counts."""
    found, hub = read(state_dir), _read(state_dir / HUB_FILE) or Counters()
    if found is None:
        return {}
    return {"link_sent": found.sent, "link_received": found.received + hub.received}


def fetched(state_dir: Path, count: int) -> None:
    """Add what came from the hub.

    Raises:
        DiskError: the disk is full or the folder cannot be written.
    """
    before = _read(state_dir / HUB_FILE) or Counters()
    counters = Counters(received=before.received + count)
    write_atomically(state_dir / HUB_FILE, counters.model_dump_json().encode())
