"""What a device is told over MQTT, and what it does about it.

    rounds            a round is open        wakes a farm that sleeps, unless it is over
    models/CHANNEL    a version, or news     the hub is asked, in the hours for it
    command/install   install a version      the hub is asked now

Anybody who may publish there could say all this: it makes a device ask, and never believe.
"""

import logging
import time
from collections.abc import Callable

from common import topics
from common.errors import DiskError, ProtocolError
from common.topics import Install, ModelNotice, RoundNotice

log = logging.getLogger(__name__)


class Notices:
    """What concerns one device.

    Args:
        network: its name.
        device: its name.
        channel: that it follows.
        wake: wakes the farm.
        news: has the channel looked at.
        install: has a version installed, if the channel names it.
        seen: counter of the newest state of the channel that was believed.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        network: str,
        device: str,
        channel: str,
        *,
        wake: Callable[[], None],
        news: Callable[[], None],
        install: Callable[[int], None],
        seen: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._wake, self._news, self._install = wake, news, install
        self._channel, self._seen, self._clock = channel, seen, clock
        self._handlers = {
            topics.rounds(network): self._round,
            topics.models(network, channel): self._model,
            topics.install(network, device): self._order,
        }

    @property
    def topics(self) -> tuple[str, ...]:
        """What is to be subscribed to."""
        return tuple(self._handlers)

    def take(self, topic: str, payload: bytes, retained: bool) -> None:
        """Do what a message asks for; one that cannot be read is left out."""
        handler = self._handlers.get(topic)
        if handler is None:
            return
        try:
            handler(payload, retained)
        except ProtocolError as error:
            log.warning("what came on '%s' is left out: %s", topic, error)
        except DiskError as error:  # raised, it would make the broker send it again and again
            log.error("what came on '%s' is not done: %s", topic, error)

    def _round(self, payload: bytes, _retained: bool) -> None:
        notice = RoundNotice.parse(payload)
        if notice.deadline < self._clock():
            log.info("round %d of run %d is over by now", notice.round, notice.run)
            return
        self._wake()

    def _model(self, payload: bytes, _retained: bool) -> None:
        notice = ModelNotice.parse(payload)
        if notice.channel == self._channel and notice.counter > self._seen():
            self._news()

    def _order(self, payload: bytes, retained: bool) -> None:
        if retained:  # it would come again with each connect
            log.warning("an order to install is left out: it was published to be kept")
            return
        self._install(Install.parse(payload).version)
