"""What a device tells over MQTT: an outbox on its disk, and the connection that empties it.

    STATE/outbox.db   what waits (common/outbox.py)

A broker that is away, a certificate that is missing or a disk that is full delays what is told, and
nothing else. What is told is counted: how many bytes of which kind went where.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client import ledger
from client.ledger import Ledger
from client.results import MARK
from common.broker import Broker
from common.errors import FieldfedError, StateError
from common.mqtt import Connection
from common.outbox import Kind, Mark, Outbox, text_of
from common.session import Take
from common.topics import DeviceState, Event, Result, Telemetry

log = logging.getLogger(__name__)

OUTBOX_BYTES = 64_000_000
SESSION_SECONDS = 3600
"""That the broker keeps notices for a device that is away."""
MOST_EVENTS = 100
"""That wait in memory for room on the disk."""
_PATH = re.compile(r"'/[^']*'|(?<![\w.])/[^\s'\":;,]+")


class Teller:
    """Tells what a device has to tell, for as long as it lives; any thread may call any method.

    Args:
        broker: where to.
        network: its name.
        device: its name.
        path: of the outbox.
        topics: to subscribe to.
        take: gets what comes on them.
        book: in which each message is written down; closed with it.
    """

    def __init__(
        self,
        broker: Broker,
        network: str,
        device: str,
        path: Path,
        topics: Sequence[str],
        take: Take,
        book: Ledger,
    ) -> None:
        self._broker, self._network, self._device, self._path = broker, network, device, path
        self._topics, self._take, self._ledger = topics, take, book
        self._outbox: Outbox | None = None
        self._connection: Connection | None = None
        self._lock = threading.RLock()
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self._state: DeviceState | None = None
        self._announcements: dict[str, bytes] = {}

    def open(self) -> None:
        """Open the outbox and connect, unless that is done; to be tried again when it fails.

        Raises:
            FieldfedError: the disk is full, another process has the outbox, or a file of TLS is
                missing.
        """
        with self._lock:
            if self._connection is not None:
                return
            if self._outbox is None:
                self._outbox = Outbox.open(self._path, OUTBOX_BYTES)
            connection = Connection(
                self._broker,
                self._network,
                self._device,
                self._outbox,
                self._take,
                session_seconds=SESSION_SECONDS,
            )
            for topic in self._topics:
                connection.subscribe(topic)
            if self._state is not None:
                connection.set_state(self._state.body())
            for topic, payload in self._announcements.items():
                connection.retain(topic, payload)
            connection.start()
            self._connection = connection
        self.hand_on_events()

    def close(self) -> None:
        """Publish "offline" and disconnect, within a few seconds; what waits stays on the disk."""
        with self._lock:
            connection, outbox = self._connection, self._outbox
        if connection is not None:
            connection.stop()
        if outbox is not None:
            outbox.close()
        self._ledger.close()

    # --- what is told ------------------------------------------------------------------------

    def announce(self, topic: str, payload: bytes) -> None:
        """Publish this anywhere, for the broker to keep: if it is news, and after each connect."""
        with self._lock:
            if payload == self._announcements.get(topic):
                return
            self._announcements[topic] = payload
            if self._connection is not None:
                self._connection.retain(topic, payload)
        self._count("discovery", len(payload))

    def state(self, state: DeviceState) -> None:
        """Tell what the device is, if that has changed."""
        with self._lock:
            if state == self._state:
                return
            self._state = state
            if self._connection is not None:
                self._connection.set_state(state.body())
        self._count("state", len(text_of(state.body())))

    def with_outbox(self, telemetry: Telemetry) -> Telemetry:
        """The same, with how much waits and how much was given up."""
        if self._outbox is None:
            return telemetry
        depth, dropped = self._outbox.depth, sum(self._outbox.dropped.values())
        return telemetry.model_copy(
            update={
                "outbox_messages": depth.count,
                "outbox_bytes": depth.bytes,
                "dropped_messages": dropped,
            }
        )

    def telemetry(self, telemetry: Telemetry) -> None:
        """Tell how the device is; raises DiskError."""
        self._put("telemetry", telemetry.body())

    def event(self, event: Event) -> None:
        """Tell what has happened, without paths; once there is room, should the disk be full."""
        self._events.append(event.model_copy(update={"words": plain(event.words)}))
        self.hand_on_events()

    def hand_on_events(self) -> None:
        """Tell events that had to wait."""
        with self._lock:
            while self._events and self._outbox is not None:
                try:
                    self._put("event", self._events[0].body())
                except FieldfedError as error:
                    log.debug("events wait: %s", error)
                    return
                self._events.popleft()

    def result(self, result: Result, number: int) -> None:
        """Tell what a photograph shows, and keep its number with that; raises DiskError."""
        self._put("result", result.body(), (MARK, number))

    def told(self) -> int | None:
        """The number of the last result that was kept, 0: none was; None: there is no outbox."""
        return None if self._outbox is None else self._outbox.marked(MARK) or 0

    def _put(self, kind: Kind, body: dict[str, Any], mark: Mark | None = None) -> None:
        if self._outbox is None:
            raise StateError(f"'{self._path}' is not open yet")
        topic = f"fieldfed/{self._network}/{self._device}/{kind}"
        number = self._outbox.put(kind, topic, body, mark)
        self._count(kind, len(text_of({**body, "id": number, "time": round(time.time(), 3)})))

    def _count(self, kind: str, size: int) -> None:
        where = f"broker {self._broker.host}:{self._broker.port}"
        self._ledger.add(ledger.Kind(kind), size, where)


def plain(words: str) -> str:
    """Without paths, and as long as an event may be."""
    return _PATH.sub("a file", words)[:500]
