"""The registry: versions of the model as signed manifests over shared tensors, and channels.

    registry/registry.db     versions, channels and what devices said (server/versions.py)
    registry/objects/        tensors by content, shared between versions (common/objects.py)
    signing/                 the network's keys (server/keys.py)

How a backbone becomes a version is in server/publish.py; nothing here needs torch.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from common.errors import ConfigError, RefusalError, StateError
from common.files import only_one
from common.manifest import Channel, Manifest, read_manifest
from common.objects import Objects, sha256_of
from server.keys import SigningKeys
from server.versions import ChannelRow, VersionRow, Versions

log = logging.getLogger(__name__)

STABLE = "stable"
CHANNEL_DAYS = 30.0
LOCK = "objects.lock"
"""Held by whoever adds or removes objects, or must see none come or go."""
KEPT = 5
"""Newest versions that stay, beside those that a channel names or may go back to."""


@dataclass(frozen=True)
class Collected:
    """What was removed."""

    versions: tuple[int, ...]
    objects: int
    bytes: int


class Registry:
    """The registry of a network. One process at a time changes objects; any number read."""

    def __init__(self, folder: Path, versions: Versions, keys: SigningKeys) -> None:
        self._folder, self._versions, self.keys = folder, versions, keys
        self.objects = Objects(folder / "objects")

    @classmethod
    def create(cls, state_dir: Path, network: str) -> Self:
        """Open the registry of a server; with new keys, where there was no registry before.

        Raises:
            StateError: there was one and its keys are gone, or it is damaged; names the file.
        """
        keys = state_dir / "signing"
        if not (state_dir / "registry").exists() and not keys.exists():
            SigningKeys.create(keys, network)
        return cls.open(state_dir)

    @classmethod
    def open(cls, state_dir: Path) -> Self:
        """Open the registry of a server.

        Raises:
            StateError: the network has no keys, or the database is damaged; names the file.
        """
        keys = SigningKeys.open(state_dir / "signing")
        folder = state_dir / "registry"
        return cls(folder, Versions.open(folder / "registry.db"), keys)

    def close(self) -> None:
        """Close the database."""
        self._versions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def network(self) -> str:
        """Name of the network."""
        return self.keys.keys.network

    @property
    def rows(self) -> Versions:
        """The tables, to read."""
        return self._versions

    # --- versions ----------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[Versions]:
        """The tables, while no other process adds or removes objects.

        Raises:
            StateError: one does.
        """
        with only_one(self._folder / LOCK):
            yield self._versions

    def row(self, counter: int) -> VersionRow:
        """A version that is there.

        Raises:
            ConfigError: there is none with this number, or it was removed.
        """
        row = self._versions.version(counter)
        if row is None:
            known = ", ".join(str(one.counter) for one in self._versions.versions()[-10:]) or "none"
            raise ConfigError(f"no version {counter}; the newest that are here: {known}")
        if row.removed is not None:
            raise ConfigError(f"version {counter} was removed; 'registry list' shows what is here")
        return row

    def manifest(self, counter: int) -> Manifest:
        """The manifest of a version.

        Raises:
            ConfigError: there is no such version.
            StateError: it was changed on disk.
        """
        try:
            return read_manifest(self.row(counter).document, self.keys.keys, datetime.now(UTC))[1]
        except RefusalError as error:
            raise StateError(f"version {counter}: {error}; restore the registry") from error

    # --- channels ----------------------------------------------------------------------------

    def promote(self, channel: str, counter: int, why: str = "promoted") -> ChannelRow:
        """Let a channel name a version; raises ConfigError where there is none."""
        going = self._versions.rollout(channel)
        beyond = going.counter if going is not None else 0

        def make(last: int) -> ChannelRow:
            document, named = self._sign(channel, counter, max(last, beyond))
            when = named.issued.timestamp(), named.expires.timestamp()
            return ChannelRow(channel, named.counter, counter, document, *when, why)

        return self._versions.name(channel, make)

    def document(self, channel: str, counter: int, last: int) -> tuple[str, int]:
        """A signed state of a channel after number ``last``, and its number; nothing is named."""
        document, named = self._sign(channel, counter, last)
        return document, named.counter

    def _sign(self, channel: str, counter: int, last: int) -> tuple[str, Channel]:
        now = datetime.now(UTC)
        named = Channel(
            network=self.network,
            name=channel,
            # time as well as a counter: a registry out of a backup is not behind its devices
            counter=max(last + 1, int(now.timestamp())),
            version=counter,
            manifest=self.row(counter).digest,
            issued=now,
            expires=now + timedelta(days=CHANNEL_DAYS),
        )
        return self.keys.sign("channel", named), named

    def named(self, channel: str) -> ChannelRow:
        """What a channel names now; raises ConfigError where there is no such channel."""
        row = self._versions.channel(channel)
        if row is None:
            known = ", ".join(one.name for one in self._versions.channels()) or "none"
            raise ConfigError(f"no channel '{channel}'; there are: {known}")
        return row

    def earlier(self, channel: str) -> int | None:
        """The version that a channel named before the one it names now, if it is still there."""
        now = self.named(channel).version
        here = {row.counter for row in self._versions.versions()}
        before = [row.version for row in self._versions.history(channel)]
        return next((one for one in reversed(before) if one != now and one in here), None)

    def roll_back(self, channel: str, to: int | None = None) -> ChannelRow:
        """Let a channel name an earlier version again, by default the one before.

        Raises:
            ConfigError: there is no such channel or version, or nothing to go back to.
        """
        now = self.named(channel).version
        target = self.earlier(channel) if to is None else to
        if target is None:
            raise ConfigError(f"channel '{channel}' never named another version than {now}")
        return self.promote(channel, target, why=f"rolled back from {now}")

    def renew(self) -> list[ChannelRow]:
        """Sign again what would expire before long, so that devices can tell it is not stale."""
        soon = datetime.now(UTC).timestamp() + CHANNEL_DAYS * 86_400 / 2
        return [
            self.promote(row.name, row.version, why="renewed")
            for row in self._versions.channels()
            if row.expires < soon
        ]

    def sign_again(self, why: str) -> None:
        """Let every channel name what it names, with a number above all that devices have seen."""
        for channel in self._versions.channels():
            self.promote(channel.name, channel.version, why=why)
        for row in self._versions.rollouts():
            if row.going:
                last = self.named(row.channel).counter
                document, counter = self.document(row.channel, row.version, last)
                self._versions.put_rollout(row.changed(document=document, counter=counter))

    def exchange_keys(self) -> None:
        """A new signing key; all that is there is signed by it as well."""
        now = datetime.now(UTC)
        kept = [(row, self.manifest(row.counter)) for row in self._versions.versions()]
        self.keys = self.keys.exchange(now)
        for row, manifest in kept:
            self._versions.replace_document(row.counter, self.keys.sign("manifest", manifest))
        for channel in self._versions.channels():
            self.promote(channel.name, channel.version, why="keys exchanged")

    def require_settled(self, channel: str) -> None:
        """Refuse to change a channel by hand while a version is on its way to it.

        Raises:
            ConfigError: one is.
        """
        going = self._versions.rollout(channel)
        if going is not None and going.going:
            raise ConfigError(
                f"version {going.version} is on its way to channel '{channel}'; see 'rollout "
                "status', and 'rollout abort' first"
            )

    # --- upkeep ------------------------------------------------------------------------------

    def collect(self, keep: int = KEPT) -> Collected:
        """Remove versions that no channel names or may go back to, and objects of no version.

        Args:
            keep: newest versions that stay in any case, at least 1.
        """
        with self.changing():
            rows = self._versions.versions()
            needed = {row.counter for row in rows[-keep:]}
            for channel in self._versions.channels():
                needed |= {channel.version, self.earlier(channel.name) or channel.version}
            for rollout in self._versions.rollouts():
                needed |= {rollout.version, rollout.previous} if rollout.going else set()
            self._versions.remove(
                [row.counter for row in rows if row.counter not in needed],
                datetime.now(UTC).timestamp(),
            )
            # asked again: a channel may have come to name one of them in between
            kept = {row.counter for row in self._versions.versions()}
            wanted = {digest for one in kept for digest in self.manifest(one).objects}
            freed = self.objects.keep_only(wanted)
        gone = tuple(row.counter for row in rows if row.counter not in kept)
        return Collected(gone, len(freed), sum(freed))

    def check(self) -> list[str]:
        """What is wrong: signatures that do not hold, objects absent or damaged; in words."""
        wrong = []
        seen: dict[str, str | None] = {}
        for row in self._versions.versions():
            try:
                manifest = self.manifest(row.counter)
            except StateError as error:
                wrong.append(str(error))
                continue
            for digest in manifest.objects:
                if digest not in seen:
                    seen[digest] = self._fault(digest)
                if seen[digest] is not None:
                    wrong.append(f"version {row.counter}: object {digest[:12]} {seen[digest]}")
        return wrong

    def _fault(self, digest: str) -> str | None:
        if not self.objects.has(digest):
            return "is missing"
        return None if sha256_of(self.objects.path(digest)) == digest else "is damaged"
