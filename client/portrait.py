"""What a device says it is: its state, put together from what lies on its disk.

It is looked at every few seconds, so what takes time is read again only when its file has changed,
and images are counted, by their names alone, every ten minutes.
"""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from client import health
from client.lookout import Offered
from client.served import About, Served
from common.config import FarmConfig
from common.errors import DataError
from common.images import count
from common.release import release
from common.topics import DeviceState

log = logging.getLogger(__name__)

COUNT_SECONDS = 600.0
_REPLY = re.compile(r"\d+-(\d+)-align-.*\.safetensors")


class Portrait:
    """The state of one device.

    Args:
        config: the farm's settings.
        state_dir: of the farm.
        offered: what the channel names, as far as it is known.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        config: FarmConfig,
        state_dir: Path,
        offered: Callable[[], Offered] = Offered,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._farm, self._offered, self._clock = config.farm, offered, clock
        self._served = Served(state_dir / "serving")
        self._replies = state_dir / "replies"
        self._release, self._model = release(), health.model()
        self._about: tuple[object, About | None] = (None, None)
        self._counted: tuple[float, int | None, int | None] = (float("-inf"), None, None)
        self.asleep = False

    def look(self) -> DeviceState:
        """As it is now."""
        about = self._about_now()
        classes, images = self._count()
        offered = self._offered()
        return DeviceState(
            farm=self._farm.name,
            release=self._release,
            model=self._model,
            channel=self._farm.channel,
            version=None if about is None else about.manifest.counter,
            latest=offered.version,
            gain=offered.gain,
            accuracy=None if about is None else about.accuracy,
            f1=None if about is None else about.f1,
            species=(self._farm.data.resolve().name or self._farm.name)[:40],
            classes=classes,
            images=images,
            last_round=self._last_round(),
            asleep=self.asleep,
        )

    def _about_now(self) -> About | None:
        if (stamp := self._served.stamp) != self._about[0]:
            self._about = stamp, self._served.about()
        return self._about[1]

    def _count(self) -> tuple[int | None, int | None]:
        when, classes, images = self._counted
        if self._clock() >= when + COUNT_SECONDS:
            try:
                classes, images = count(self._farm.data)
            except DataError as error:
                log.debug("images are not counted: %s", error)
                classes = images = None
            self._counted = self._clock(), classes, images
        return classes, images

    def _last_round(self) -> int | None:
        """Of the newest reply that is kept (client/state.py)."""
        found = [(path, _REPLY.fullmatch(path.name)) for path in _files(self._replies)]
        dated = [(_age(path), int(match[1])) for path, match in found if match]
        return max(dated)[1] if dated else None


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
