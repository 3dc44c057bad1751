"""A device of a farm, put together: who it is, what it believes, what it serves with."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from client.hub import HubClient
from client.identity import FarmIdentity
from client.labels import labels_of
from client.ledger import FILE, Ledger
from client.serving import Serving
from client.trust import Trust
from client.updater import Updater
from common.config import FarmConfig
from common.errors import ConfigError
from common.files import write_atomically
from common.images import FarmFolder, open_folder
from common.membership import Membership
from common.settings import load_settings


class Device:
    """The device of a farm's folder; the network is needed for a part of it only."""

    def __init__(self, config: FarmConfig, state_dir: Path) -> None:
        self.farm, self._state = config.farm, state_dir
        self.serving = Serving(state_dir / "serving")
        self.labels = labels_of(config, state_dir)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The device of a farm's folder; raises ConfigError where its settings are none."""
        return cls(load_settings(FarmConfig, folder / "farm.toml"), folder / "state")

    @property
    def identity(self) -> FarmIdentity:
        """The farm's key and certificate; the key is made when it is first asked for."""
        return FarmIdentity.create(self._state / "identity", self.farm.name)

    def join(self, membership: Membership) -> None:
        """Become a member of a network.

        Raises:
            ProtocolError: the certificate is not for this farm's key, or of another authority.
            RefusalError: the signing keys have not signed themselves.
        """
        Trust(self._state / "trust.json", membership.keys, datetime.now(UTC))
        self.identity.accept(membership.certificate.encode(), membership.authority.encode())
        write_atomically(self._state / "membership.json", membership.model_dump_json().encode())

    def membership(self) -> Membership:
        """What the farm was given when it joined; raises ConfigError when it has not."""
        path = self._state / "membership.json"
        if not path.is_file():
            raise ConfigError(
                f"farm {self.farm.name} is no member of a network yet; ask for it with: "
                "fieldfed-client request"
            )
        return Membership.load(path)

    def hub(self, sleep: Callable[[float], None] = time.sleep) -> HubClient:
        """A connection to the network's hub.

        Raises:
            ConfigError: the farm is no member yet, or its network has no hub.
            StateError: its certificate has expired.
        """
        membership = self.membership()
        if membership.hub is None:
            raise ConfigError(f"network {membership.network} had no hub when this farm joined it")
        ledger = Ledger.open(self._state / FILE)
        return HubClient(membership.hub, self.identity.credentials(), sleep=sleep, ledger=ledger)

    def updater(self) -> Updater:
        """Raises ConfigError when the farm is no member, RefusalError as Trust does."""
        now = datetime.now(UTC)
        return Updater(
            device=self.farm.device or self.farm.name,
            channel=self.farm.channel,
            folder=self.images,
            serving=self.serving,
            trust=Trust(self._state / "trust.json", self.membership().keys, now),
            labels=self.labels,
        )

    def images(self) -> FarmFolder:
        """The farm's images; raises DataError."""
        cache = self._state / "images.json"
        return open_folder(
            self.farm.data, per_class=self.farm.per_class, seed=self.farm.seed, cache=cache
        )
