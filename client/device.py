"""The trainer of a farm, put together: what it serves with, its images, its updater."""

from contextlib import AbstractContextManager
from pathlib import Path

from client.labels import labels_of
from client.member import Member
from client.serving import Serving
from client.updater import Updater
from common.config import FarmConfig
from common.files import only_one
from common.images import FarmFolder, open_folder

TRIED_SECONDS = 900.0
"""That another try of a version is waited for."""


class Device(Member):
    """The device of a farm's folder; the network is needed for a part of it only."""

    def __init__(self, config: FarmConfig, state_dir: Path) -> None:
        super().__init__(config, state_dir)
        self.serving = Serving(state_dir / "serving")
        self.labels = labels_of(config, state_dir)

    def updater(self) -> Updater:
        """Raises ConfigError when the farm is no member, RefusalError as Trust does."""
        return Updater(
            device=self.farm.device or self.farm.name,
            channel=self.farm.channel,
            folder=self.images,
            serving=self.serving,
            trust=self.trust(),
            labels=self.labels,
        )

    def alone(self) -> AbstractContextManager[None]:
        """While nobody else on this device tries a version; who does is waited for.

        A person and the device itself hear of a new version at the same time. Raises StateError.
        """
        return only_one(self._state / "serving" / "updater.lock", TRIED_SECONDS)

    def images(self) -> FarmFolder:
        """The farm's images; raises DataError."""
        cache = self._state / "images.json"
        return open_folder(
            self.farm.data, per_class=self.farm.per_class, seed=self.farm.seed, cache=cache
        )
