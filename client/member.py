"""A farm as a member of a network: what it was given when it joined, and its way to the hub."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from client.hub import HubClient
from client.identity import FarmIdentity
from client.joining import take_in
from client.ledger import FILE, Ledger
from client.served import Served
from client.trust import Trust
from common.config import FarmConfig
from common.errors import ConfigError
from common.membership import Membership
from common.settings import load_settings


class Member:
    """The farm of a folder; needs no torch."""

    def __init__(self, config: FarmConfig, state_dir: Path) -> None:
        self.farm, self._state = config.farm, state_dir
        self.served = Served(state_dir / "serving")

    @classmethod
    def of(cls, folder: Path) -> Self:
        """That of a farm's folder; raises ConfigError where its settings are none."""
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
        take_in(self.identity, self._state, membership)

    @property
    def joined(self) -> bool:
        """Whether the farm is a member of a network."""
        return (self._state / "membership.json").is_file()

    def membership(self) -> Membership:
        """What the farm was given when it joined; raises ConfigError when it has not."""
        if not self.joined:
            raise ConfigError(
                f"farm {self.farm.name} is no member of a network yet; ask for it with: "
                "fieldfed-client request"
            )
        return Membership.load(self._state / "membership.json")

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

    def trust(self) -> Trust:
        """What it believes; raises ConfigError when it is no member, RefusalError as Trust does."""
        return Trust(self._state / "trust.json", self.membership().keys, datetime.now(UTC))
