"""What a device believes of its network: the keys that count, and how far its channels have come.

    trust.json   the newest signed key set, the highest counter seen of each channel

It begins with the key set that the farm was given when it joined. Should the file be damaged, it
begins there again.
"""

import logging
from datetime import datetime
from pathlib import Path

from pydantic import Field, ValidationError

from common.errors import RefusalError, RefuseReason
from common.files import write_atomically
from common.manifest import Channel, ChannelName, Counter53, Manifest, read_channel, read_manifest
from common.signing import Document, KeySet, first_keys

log = logging.getLogger(__name__)


class _Seen(Document):
    keys: str
    counters: dict[ChannelName, Counter53] = Field(default_factory=dict)


class Trust:
    """The beliefs of one device.

    Args:
        path: of trust.json.
        given: the signed key set of the membership.
        now: the device's time.

    Raises:
        RefusalError: the key set of the membership counts no longer, or never did.
    """

    def __init__(self, path: Path, given: str, now: datetime) -> None:
        self._path = path
        self._seen, self.keys = self._read(given, now)

    def _read(self, given: str, now: datetime) -> tuple[_Seen, KeySet]:
        try:
            seen = _Seen.model_validate_json(self._path.read_bytes())
            return seen, first_keys(seen.keys, now)
        except FileNotFoundError:
            pass
        except (OSError, ValidationError, RefusalError) as error:
            log.warning(
                "'%s' is not used (%s); trust begins with the membership", self._path, error
            )
        return _Seen(keys=given), first_keys(given, now)

    def seen(self, channel: str) -> int:
        """The highest counter of a channel that was believed; 0: none."""
        return self._seen.counters.get(channel, 0)

    def accept(
        self, keys: str, channel: str, manifest: str, name: str, now: datetime
    ) -> tuple[str, Manifest]:
        """Believe an offer, all of it, or nothing: as :meth:`examine`, and it is remembered."""
        known, named, digest, version = self.examine(keys, channel, manifest, name, now)
        self._remember(keys, known, named)
        return digest, version

    def examine(
        self, keys: str, channel: str, manifest: str, name: str, now: datetime
    ) -> tuple[KeySet, Channel, str, Manifest]:
        """Whether an offer is to be believed.

        Args:
            keys: the signed key set that the server shows.
            channel: the signed channel.
            manifest: the signed manifest.
            name: of the channel that was asked for.
            now: the device's time.

        Returns:
            The keys and the channel that it came with, the manifest's digest and the manifest.

        Raises:
            RefusalError: says which of the three is not to be believed, and why.
        """
        known = self.keys.follow(keys, now)
        named = read_channel(channel, known, now)
        named.require(known.network, name, self.seen(name), now)
        digest, version = read_manifest(manifest, known, now)
        if digest != named.manifest or version.counter != named.version:
            raise RefusalError(
                f"channel '{name}' names version {named.version}, but version {version.counter} "
                "came with it",
                RefuseReason.TAMPERED,
            )
        version.require(known.network, now)
        return known, named, digest, version

    def _remember(self, keys: str, known: KeySet, named: Channel) -> None:
        counters = self._seen.counters | {named.name: named.counter}
        seen = _Seen(keys=keys, counters=counters)
        if seen != self._seen:
            write_atomically(self._path, seen.model_dump_json().encode())
        self._seen, self.keys = seen, known
