"""Which farm is behind a node of Flower's, by the certificate that it has shown at the door.

    STATE/nodes.json   by the key that a SuperNode signs its requests with: its farm and its node

A SuperNode makes such a key when it starts, and SuperLink knows its node by it. Whoever registers a
key owns it: no other farm may use it. The door writes down which node SuperLink gave to it, and the
server takes no other name from that node than the one in the certificate.
"""

import hashlib
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import DiskError
from common.files import write_atomically

log = logging.getLogger(__name__)

PER_FARM = 8
"""Keys of a farm that are remembered; older ones are of SuperNodes that have long ended."""
NAME = "nodes.json"


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    farm: str
    node: int | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: dict[str, _Node] = Field(default_factory=dict)


class Nodes:
    """Of one server; written by the door alone."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / NAME
        self._keys = _read(self._path).keys

    def claim(self, key: str, farm: str) -> bool:
        """A farm registers a key; False: it is another farm's."""
        name = _name(key)
        known = self._keys.get(name)
        if known is None:
            own = [one for one, node in self._keys.items() if node.farm == farm]
            for old in own[: max(0, len(own) - PER_FARM + 1)]:
                del self._keys[old]
            self._keys[name] = _Node(farm=farm)
        return known is None or known.farm == farm

    def owner(self, key: str) -> str | None:
        """The farm that has registered a key."""
        known = self._keys.get(_name(key))
        return None if known is None else known.farm

    def tell(self, key: str, node: int) -> None:
        """SuperLink has said which node this key is; written down, if the disk lets it."""
        name = _name(key)
        known = self._keys.get(name)
        if known is None or known.node == node:
            return
        self._keys[name] = _Node(farm=known.farm, node=node)
        try:
            file = _File(keys=dict(self._keys))  # others claim keys meanwhile
            write_atomically(self._path, file.model_dump_json().encode())
        except DiskError as error:
            log.error("which farm is behind a node is not written down: %s", error)


def certified_farm(state_dir: Path, node: int) -> str | None:
    """The farm behind a node (also as 64 bits with a sign); None: it did not come by the door."""
    for known in _read(state_dir / NAME).keys.values():
        if known.node is not None and known.node == node % 2**64:
            return known.farm
    return None


def activated(body: bytes) -> int | None:
    """The node in SuperLink's answer to an activation: protobuf, field 1, a varint."""
    if body[:1] != b"\x08":
        return None
    node = 0
    for place, byte in enumerate(body[1:11]):
        node |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return node % 2**64
    return None


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _File()
    except (OSError, ValidationError) as error:
        log.error("'%s' cannot be read: %s; SuperNodes have to register again", path, error)
        return _File()
