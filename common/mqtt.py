"""The connection of a device, or of the server, to the broker of its network: MQTT 5, else 3.1.1.

    fieldfed/NETWORK/DEVICE/availability   "online" or "offline", retained; "offline" is also the
                                           last will, which the broker publishes for a lost device
    fieldfed/NETWORK/DEVICE/state          the latest state as JSON, retained
    fieldfed/NETWORK/DEVICE/telemetry      out of the outbox, as are the next two
    fieldfed/NETWORK/DEVICE/event
    fieldfed/NETWORK/DEVICE/result

The outbox alone remembers what is to be sent: a message leaves it when the broker has said that it
has it, and not before. Each connect begins with a fresh client that knows nothing, publishes
"online" and the state, subscribes, and sends what waits from the oldest on, a few at a time. What
the broker had without our hearing of it is thus sent twice, with the same id; :class:`Seen` tells.
"""

import contextlib
import heapq
import logging
import random
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Self

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from common.broker import Broker
from common.errors import ConfigError, FieldfedError
from common.outbox import JSON, Kind, Outbox, text_of
from common.processes import is_loopback
from common.session import (
    CONNECT_SECONDS,
    KEEP_MESSAGES,
    LEAVE_SECONDS,
    OFFLINE,
    ClosedError,
    Keep,
    Memory,
    RefusedError,
    Session,
    Take,
)

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 120.0
HEALTHY_SECONDS = 30.0
"""A session that lasted so long makes the next pause short again."""
SEEN_DEVICES, SEEN_IDS = 10_000, 256
_SLOWEST = 60
"""Failures after which pauses are as long as they get."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
OLD_BROKER = 0x84
_REMEDIES: Final[Mapping[int, str]] = {
    0x85: "let the broker accept this device's name",
    0x86: "correct 'username' and 'password' in [broker], or add them to the broker",
    0x87: "allow this device to connect, and to publish below its topic, at the broker",
    0x8A: "the broker bans this device; lift that there",
    0x8E: "another device has the same name and takes the connection over; rename one of them",
    0x8C: "the broker wants another kind of login; allow a password or a certificate there",
}


def pause(draw: random.Random, failures: int, first: float = FIRST_PAUSE) -> float:
    """Seconds before the next connect: anything up to a bound that doubles with each failure.

    Full jitter: a thousand devices that lost their broker together do not come back together.
    """
    return draw.uniform(0, min(LONGEST_PAUSE, first * 2.0 ** min(failures, _SLOWEST)))


def name_of(network: str, device: str) -> str:
    """By which a broker knows a device, or the server, of a network."""
    return f"fieldfed-{network}-{device}"


def client_of(
    broker: Broker, name: str, protocol: MQTTProtocolVersion, session_seconds: int
) -> Client:
    """A client that knows nothing yet; raises ConfigError where files of TLS cannot be used."""
    old = protocol == MQTTProtocolVersion.MQTTv311
    client = Client(
        CallbackAPIVersion.VERSION2,
        name,
        clean_session=session_seconds == 0 if old else None,
        protocol=protocol,
        reconnect_on_failure=False,
    )
    client.connect_timeout = CONNECT_SECONDS
    client.max_inflight_messages = client.max_queued_messages = 0  # the window is ours
    if broker.username is not None:
        password = broker.password
        client.username_pw_set(broker.username, password.get_secret_value() if password else None)
    if (context := broker.tls()) is not None:
        client.tls_set_context(context)
    return client


def options_of(
    protocol: MQTTProtocolVersion, session_seconds: int, most: int | None = None
) -> dict[str, Any]:
    """What CONNECT says of a session; ``most`` messages come before we have acknowledged any."""
    if protocol != MQTTProtocolVersion.MQTTv5:
        return {}
    asked = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    asked.SessionExpiryInterval = session_seconds
    if most is not None:
        asked.ReceiveMaximum = most
    return {"clean_start": session_seconds == 0, "properties": asked}


def remedy_for(error: FieldfedError | None) -> str | None:
    """What somebody has to do before a broker lets us in; None: it may pass by itself."""
    if isinstance(error, RefusedError):
        return _REMEDIES.get(error.reason)
    if error is not None and isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return "check 'ca' and 'host' in [broker], and the clock of this device"
    return "put the files back" if isinstance(error, ConfigError) else None


class Connection:
    """A connection that comes back whenever it is lost.

    Args:
        broker: where to.
        network: name of the network.
        device: name of the device; no other may use it.
        outbox: of which messages are sent; nobody else may listen to it.
        take: gets topic, payload and whether it was retained of what comes on subscribed topics,
            in the connection's thread: it must return soon. A message is acknowledged once it
            returns; when it raises StateError (a full disk, say) the line is closed and the
            message comes again, if the broker keeps it.
        seed: of pauses.
        session_seconds: that the broker keeps for us what comes while we are away; 0 for nothing.
        first_pause: most seconds before the first attempt to come back.
        keep: if given, what was taken is acknowledged only once this has returned, which is called
            soon after, for one message or for several; when it raises StateError they all come
            again.

    Raises:
        ConfigError: a name cannot be part of a topic, or TLS files cannot be used.
    """

    def __init__(
        self,
        broker: Broker,
        network: str,
        device: str,
        outbox: Outbox,
        take: Take = lambda _topic, _payload, _retained: None,
        *,
        seed: int | None = None,
        session_seconds: int = 0,
        first_pause: float = FIRST_PAUSE,
        keep: Keep | None = None,
    ) -> None:
        for name in (network, device):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"'{name}' cannot be part of a topic; use A-Z a-z 0-9 _ -")
        broker.tls()
        if broker.password is not None and broker.ca is None and not is_loopback(broker.host):
            log.warning("the password goes to '%s' unencrypted; set 'ca' in [broker]", broker.host)
        self._broker, self._name, self._outbox = broker, device, outbox
        self._take, self._keep = take, keep
        self._id, self._base = name_of(network, device), f"fieldfed/{network}/{device}"
        self._random = random.Random(seed)  # noqa: S311
        self._session_seconds, self._first_pause = session_seconds, first_pause
        self._memory, self._told = Memory(), set[str]()
        self._protocol, self._certain = MQTTProtocolVersion.MQTTv5, False
        self._ending, self._connected = threading.Event(), threading.Event()
        self._ears, self._bell = socket.socketpair()
        self._ears.setblocking(False)
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{device}", daemon=True)
        outbox.listen(self._wake)

    def start(self) -> None:
        """Connect, and stay so; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Publish "offline" and disconnect, within a few seconds; for good."""
        self._ending.set()
        self._wake()
        self._outbox.listen(lambda: None)
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS + 1)
        if self._thread.is_alive():  # it waits for a name or a line, and ends by itself
            log.warning("the connection to '%s' did not end in time", self._broker.host)
            return
        self._ears.close()
        self._bell.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def connected(self) -> bool:
        """Whether the broker has let us in, and the line was not lost since, as far as we know."""
        return self._connected.is_set()

    def topic(self, kind: Kind) -> str:
        """Where messages of a kind are published."""
        return f"{self._base}/{kind}"

    def put(self, kind: Kind, body: Mapping[str, JSON]) -> int:
        """Send a message, now or when there is a line; returns its id. Raises as Outbox.put."""
        return self._outbox.put(kind, self.topic(kind), body)

    def set_state(self, body: Mapping[str, JSON]) -> None:
        """Publish the state of the device, now and after each connect; raises ProtocolError."""
        self.retain(f"{self._base}/state", text_of(body).encode())

    def retain(self, topic: str, payload: bytes) -> None:
        """Publish this, for the broker to keep, now and after each connect."""
        self._memory.retained[topic] = payload
        self._wake()

    def subscribe(self, topic_filter: str) -> None:
        """Receive what comes on these topics, now and after each connect."""
        self._memory.filters.append(topic_filter)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is left to wake
            self._bell.send(b"\0")

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._ending.is_set():
            began = time.monotonic()
            error = self._attempt()
            self._connected.clear()
            if self._ending.is_set() or self._other_protocol(error):
                continue
            if time.monotonic() - began > HEALTHY_SECONDS:
                failures = 0
            if self._say(error):
                failures = _SLOWEST
            seconds = pause(self._random, failures, self._first_pause)
            log.debug("next attempt in %.1f s", seconds)
            self._ending.wait(seconds)
            failures += 1

    def _attempt(self) -> FieldfedError | None:
        """Connect, and stay so until the line is lost; returns why it was."""
        try:
            client, broker = self._client(), self._broker
            # with 'keep' the broker would wait for our word before that
            most = None if self._keep is None else KEEP_MESSAGES
            options = options_of(self._protocol, self._session_seconds, most)
            session = Session(
                client,
                self._base,
                self._outbox,
                self._memory,
                self._take,
                self._ending.is_set,
                self._ears,
                self._keep,
            )
            session.run(
                lambda: client.connect(broker.host, broker.port, broker.keepalive, **options),
                self._accepted,
            )
        except FieldfedError as error:
            return error
        except Exception:
            log.exception("the connection to the broker failed; it is made anew")
        return None

    def _client(self) -> Client:
        client = client_of(self._broker, self._id, self._protocol, self._session_seconds)
        client.will_set(f"{self._base}/availability", OFFLINE, qos=1, retain=True)
        return client

    def _accepted(self) -> None:
        log.info("connected to the broker at %s:%d", self._broker.host, self._broker.port)
        self._certain = True
        self._told.clear()
        self._connected.set()

    def _other_protocol(self, error: FieldfedError | None) -> bool:
        """Change to the protocol that the broker may know; returns whether to try it at once."""
        refused = isinstance(error, RefusedError) and error.reason == OLD_BROKER
        if not refused and (self._certain or not isinstance(error, ClosedError)):
            return False
        if self._protocol == MQTTProtocolVersion.MQTTv5:
            self._protocol = MQTTProtocolVersion.MQTTv311
            return refused
        self._protocol = MQTTProtocolVersion.MQTTv5
        return False

    def _say(self, error: FieldfedError | None) -> bool:
        """Log why there is no connection; returns whether somebody has to do something first."""
        place, remedy = f"{self._broker.host}:{self._broker.port}", remedy_for(error)
        if remedy is None:
            log.info("no connection to the broker at %s: %s", place, error)
        elif str(error) not in self._told:
            self._told.add(str(error))
            log.error("broker at %s: %s; %s", place, error, remedy)
        return remedy is not None


class Seen:
    """Tells what a device has sent before, for who receives it; forgets with the process.

    Each device sends in the order of its ids. Its latest ids are remembered; one that is below all
    of them was seen, or was given up by the device.

    Args:
        devices: most that are remembered; beyond it the one that was silent for longest is
            forgotten.
        window: ids that are remembered of each.
    """

    def __init__(self, devices: int = SEEN_DEVICES, window: int = SEEN_IDS) -> None:
        self._devices, self._window = devices, window
        self._latest: OrderedDict[str, list[int]] = OrderedDict()

    def first(self, device: str, id: int) -> bool:  # noqa: A002
        """Whether this message comes for the first time; from now on it has come."""
        latest = self._latest.setdefault(device, [])
        self._latest.move_to_end(device)
        if len(self._latest) > self._devices:
            self._latest.popitem(last=False)
        if id in latest or (len(latest) == self._window and id < latest[0]):
            return False
        if len(latest) < self._window:
            heapq.heappush(latest, id)
        else:
            heapq.heapreplace(latest, id)  # the lowest goes
        return True
