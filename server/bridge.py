"""The bridge: what devices tell over MQTT is written down, and what they should know is told.

    python -P -m server.bridge FOLDER

A process of its own. It writes ``telemetry.db`` (server/telemetry.py) and only reads the store and
the registry, so whatever devices send, a round's commit waits for nothing here.

    broker --take--> checked, row by row --keep--> one transaction --> acknowledged

A message is acknowledged once it is committed, and the broker keeps for a week what comes while
the bridge is away. What comes twice is known by its id, which is a key of its table. A message
that is none, or of nobody, is counted by what is wrong with it and left out.
"""

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.broker import Broker
from common.certificates import is_name
from common.config import ServerConfig
from common.errors import ConfigError, ProtocolError, StateError
from common.mqtt import FIRST_PAUSE, Connection
from common.outbox import Outbox
from common.processes import terminate_like_interrupt
from common.session import KEEP_MESSAGES, OFFLINE, ONLINE
from common.settings import load_settings
from common.sqlite import is_damage, set_aside
from common.topics import (
    MOST_BYTES,
    PARTS,
    SERVER,
    DeviceState,
    Event,
    Part,
    Result,
    Telemetry,
    Topic,
)
from server.arrivals import Arrivals, Batch, Message, Said, There, values_of
from server.notices import Notices
from server.retention import MOST_BYTES as MOST_STORED
from server.retention import SPARE, Retention
from server.service import run_service
from server.telemetry import NAME, Fate, Table

log = logging.getLogger("server.bridge")  # also where this module is the program

SESSION_SECONDS = 7 * 86_400
LOOK_SECONDS = 1.0
NOTICES = "notices.db"
"""What the server has to say and the broker does not have yet."""
_MOST_TOLD = 1000
_LARGEST = 2**63 - 1

_KINDS: Final[Mapping[Part, tuple[Table, type[Telemetry] | type[Result] | type[Event]]]] = {
    "telemetry": ("telemetry", Telemetry),
    "result": ("results", Result),
    "event": ("events", Event),
}
_PRESENCE: Final[Mapping[bytes, bool]] = {ONLINE.encode(): True, OFFLINE.encode(): False}


class _Stamp(BaseModel):
    """What a device's outbox adds to its messages."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    id: Annotated[int, Field(ge=0, le=_LARGEST)]
    time: Annotated[float, Field(ge=0, lt=1e12)]

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise ProtocolError("it has no 'id' and 'time' that can be used") from error


class Bridge:
    """What comes, on its way into the file: :meth:`take` and :meth:`keep` are for one thread.

    Args:
        path: of the file, which is there.
        network: name of the network.
        most_bytes: of the file.
        clock: unix seconds.
    """

    def __init__(
        self,
        path: Path,
        network: str,
        most_bytes: int = MOST_STORED,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._network, self._clock = path, network, clock
        self._most_bytes = most_bytes
        self._store: Arrivals | None = None
        self._batch = Batch()
        self._told: set[tuple[str, str]] = set()
        self.damaged = threading.Event()
        """Set when the file turns out to be damaged."""

    def take(self, topic: str, payload: bytes, retained: bool) -> None:
        """Check a message, and hold it until it is kept; raises StateError as :meth:`keep` does."""
        if topic.split("/")[2:3] == [SERVER]:  # our own
            return
        if len(self._batch) >= 2 * KEEP_MESSAGES:
            self.keep()
        where = self._named(topic)
        if where is None:
            self._leave_out("foreign", topic, "no device is called so")
        elif len(payload) > MOST_BYTES:
            self._leave_out("oversized", topic, f"{len(payload)} bytes")
        else:
            try:
                self._batch.news.append(_read(where, payload))
            except ProtocolError as error:
                self._leave_out("malformed", topic, str(error))
                return
            if not retained:  # else it was sent who knows when
                self._batch.seen[where.device] = self._clock()

    def keep(self) -> None:
        """Write what was taken; raises StateError, and forgets it: whoever sent it still has it."""
        batch, self._batch = self._batch, Batch()
        if not len(batch):
            return
        try:
            if self._store is None:
                self._store = Arrivals.open(self._path)
                self._store.limit(int(SPARE * self._most_bytes))
            self._store.keep(batch, self._clock())
        except StateError as error:
            if _tells_of_damage(error):
                self.damaged.set()
            raise

    def _named(self, topic: str) -> Topic | None:
        where = Topic.parse(topic)
        if where is None or where.network != self._network or not is_name(where.device):
            return None
        return where

    def _leave_out(self, fate: Fate, topic: str, why: str) -> None:
        self._batch.fates[fate] += 1
        about = fate, topic[:100]
        if about not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(about)
            log.warning("left out, as are others like it: %s on %r: %s", fate, topic[:100], why)


def _read(where: Topic, payload: bytes) -> There | Said | Message:
    """What a message says; raises ProtocolError."""
    if where.part == "availability":
        if payload not in _PRESENCE:
            raise ProtocolError("neither 'online' nor 'offline'")
        return There(where.device, _PRESENCE[payload])
    if where.part == "state":
        return Said(where.device, DeviceState.parse(payload))
    table, kind = _KINDS[where.part]
    stamp, values = _Stamp.parse(payload), values_of(table, kind.parse(payload))
    if any(isinstance(value, int) and value > _LARGEST for value in values):
        raise ProtocolError("a number that is too large to be kept")
    return Message(where.device, table, stamp.id, stamp.time, values)


def _tells_of_damage(error: StateError) -> bool:
    return isinstance(error.__cause__, sqlite3.Error) and is_damage(error.__cause__)


def open_telemetry(state_dir: Path) -> Arrivals:
    """The file of a server, or a new one; one that is damaged is set aside.

    Raises:
        StateError: it cannot be used, or a newer release wrote it.
    """
    path = state_dir / NAME
    try:
        return Arrivals.open(path)
    except StateError as error:
        if not _tells_of_damage(error):
            raise
        set_aside(path, error)
    return Arrivals.open(path)


def run_bridge(
    broker: Broker,
    network: str,
    state_dir: Path,
    until: threading.Event,
    *,
    first_pause: float = FIRST_PAUSE,
    look_seconds: float = LOOK_SECONDS,
) -> None:
    """Work until the event is set.

    Args:
        broker: of the network.
        network: its name.
        state_dir: of the server.
        until: when to stop.
        first_pause: as of ``Connection``.
        look_seconds: between two looks at the store and the registry.

    Raises:
        StateError: another bridge works in this folder, or what devices told is damaged: it is set
            aside, and a bridge that is started again begins anew.
        ConfigError: files that [broker] names cannot be used.
    """
    with Outbox.open(state_dir / NOTICES) as outbox, open_telemetry(state_dir) as store:
        bridge = Bridge(state_dir / NAME, network)
        connection = Connection(
            *(broker, network, SERVER, outbox, bridge.take),
            session_seconds=SESSION_SECONDS,
            first_pause=first_pause,
            keep=bridge.keep,
        )
        for part in PARTS:
            connection.subscribe(f"fieldfed/{network}/+/{part}")
        notices, retention = Notices(connection, outbox, state_dir, network), Retention(store)
        with connection:
            while not until.wait(look_seconds) and not bridge.damaged.is_set():
                notices.look()
                _care(retention, bridge)
    if bridge.damaged.is_set():
        damage = StateError(f"'{state_dir / NAME}' is damaged")
        set_aside(state_dir / NAME, damage)
        raise damage


def _care(retention: Retention, bridge: Bridge) -> None:
    try:
        retention.step(time.time())
    except StateError as error:
        if _tells_of_damage(error):
            bridge.damaged.set()
        else:
            log.warning("what is old stays for now: %s", error)


def _main(folder: Path) -> None:
    config = load_settings(ServerConfig, folder / "server.toml")
    if config.broker is None:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [broker]; say there where it is")
    with contextlib.suppress(KeyboardInterrupt), terminate_like_interrupt():
        run_bridge(config.broker, config.server.name, folder, threading.Event())


if __name__ == "__main__":
    run_service(_main, log)
