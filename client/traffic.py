"""Bytes at the farm's socket, counted over the farm's life and kept in ``STATE/traffic.json``.

The relay (client/relay.py) counts and writes; whoever puts a reply together reads.
"""

import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.files import write_atomically

log = logging.getLogger(__name__)

FILE = "traffic.json"
LIMIT = 2**50
"""More bytes than any farm's link carries in its life (an exbibyte's thousandth)."""


class Counters(BaseModel):
    """TCP payload in bytes: what the farm sent to the server, and what it received."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sent: int = Field(default=0, ge=0, lt=LIMIT)
    received: int = Field(default=0, ge=0, lt=LIMIT)


def read(state_dir: Path) -> Counters | None:
    """The counters on disk, about a second old while messages move; None where nobody counts."""
    try:
        return Counters.model_validate_json((state_dir / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("'%s' cannot be read: %s", state_dir / FILE, error)
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
    found = read(state_dir)
    return {} if found is None else {"link_sent": found.sent, "link_received": found.received}
