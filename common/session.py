"""One connect to a broker, from its start to its end, for common/mqtt.py.

The thread that runs a session is the only one that touches paho's client: other threads leave word
in the :class:`Memory` and write a byte that wakes it. paho keeps nothing for us: of what is in
flight when the line is lost nothing counts as sent, and the next session begins with a new client.
"""

import contextlib
import logging
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from paho.mqtt.client import Client, DisconnectFlags, MQTTMessage, MQTTMessageInfo
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from common.errors import DiskError, LinkError, StateError
from common.outbox import Outbox, Waiting

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ACKNOWLEDGE_SECONDS = 60.0
"""That a broker may take to say that it has any of what is in flight."""
WINDOW = 20
"""Messages of the outbox in flight at once."""
ONLINE, OFFLINE = "online", "offline"
LEAVE_SECONDS = 4.0
TURN_SECONDS = 1.0
KEEP_MESSAGES, KEEP_SECONDS = 500, 0.5
"""Most that is taken before it is kept, and how long the first of it waits for more."""
QUIET_SECONDS = 0.05
"""After so long without a message what was taken is kept: the broker may wait for our word."""
_HEADER_BYTES = 16
_UNUSABLE: Final = frozenset({0x81, 0x82, 0x90, 0x95, 0x99})
"""Reasons that lie in the message itself: its form, its topic's name, its length, its payload."""

Take: TypeAlias = Callable[[str, bytes, bool], None]
Keep: TypeAlias = Callable[[], None]


class RefusedError(LinkError):
    """The broker does not let us in; ``reason`` is a code of MQTT 5."""

    def __init__(self, reason: ReasonCode) -> None:
        super().__init__(f"the broker refuses: {reason}")
        self.reason = int(reason.value)


class ClosedError(LinkError):
    """The broker closed the line instead of an answer to CONNECT, as some do to MQTT 5."""


@dataclass
class Memory:
    """What outlives a session."""

    retained: dict[str, bytes] = field(default_factory=dict)
    """Payload by topic: what the broker is to keep."""
    filters: list[str] = field(default_factory=list)
    acknowledged: set[int] = field(default_factory=set)
    """What the broker has and the outbox, its disk being full, could not yet forget."""
    suspect: int | None = None
    """The message upon which the broker broke the protocol, or said that we did."""


class Session:
    """One connect.

    Args:
        client: fresh, with the last will set.
        base: of topics, "fieldfed/NETWORK/DEVICE".
        outbox: of which messages are sent.
        memory: what outlives a session.
        take: gets what comes on subscribed topics; a message is acknowledged once it returns.
        ended: whether the end was asked for.
        wake: readable when there is something to do.
        keep: if given, called after one message was taken, or several; only once it has returned
            are they acknowledged.
    """

    def __init__(
        self,
        client: Client,
        base: str,
        outbox: Outbox,
        memory: Memory,
        take: Take,
        ended: Callable[[], bool],
        wake: socket.socket,
        keep: Keep | None = None,
    ) -> None:
        self._client, self._base, self._outbox, self._memory = client, base, outbox, memory
        self._take, self._ended, self._wake, self._keep = take, ended, wake, keep
        client.manual_ack_set(keep is not None)
        self._taken: list[tuple[int, int]] = []
        self._first_taken = self._last_taken = 0.0
        self._reason: ReasonCode | None = None
        self._lost: ReasonCode | None = None
        self._flying: dict[int, int] = {}
        self._sent_until = self._subscribed = 0
        self._told: dict[str, bytes] = {}
        self._elsewhere: dict[int, str] = {}
        self._window, self._largest, self._heard, self._full = WINDOW, 0, 0.0, False
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message

    def run(self, connect: Callable[[], object], accepted: Callable[[], None]) -> None:
        """Stay connected until the end is asked for, and then take leave.

        Args:
            connect: opens the line and sends CONNECT.
            accepted: called once the broker has let us in.

        Raises:
            LinkError: the line is lost, or the broker says no.
            StateError: what came, or what is to be sent, cannot be kept or read on this disk.
        """
        try:
            self._open(connect)
            accepted()
            self._publish(f"{self._base}/availability", ONLINE.encode())
            while not self._ended():
                self._feed()
                self._turn(self._patience())
                self._settle()
            self._keep_taken()
            self._leave()
        finally:
            # closed without a farewell, the line makes the broker publish the last will
            if (line := self._client.socket()) is not None:
                line.close()

    def _open(self, connect: Callable[[], object]) -> None:
        until = time.monotonic() + CONNECT_SECONDS
        try:
            connect()
        except (OSError, ValueError) as error:
            raise LinkError(str(error)) from error
        while self._reason is None:
            if self._ended() or time.monotonic() > until:
                raise LinkError(f"no answer to CONNECT within {CONNECT_SECONDS:.0f} s")
            try:
                self._turn(TURN_SECONDS)
            except LinkError as error:
                if self._reason is None:
                    raise ClosedError(str(error)) from error
        if self._reason.is_failure:
            raise RefusedError(self._reason)

    def _leave(self) -> None:
        until = time.monotonic() + LEAVE_SECONDS
        told = self._publish(f"{self._base}/availability", OFFLINE.encode())
        while not told.is_published() and (left := until - time.monotonic()) > 0:
            self._turn(left)
        self._client.disconnect()
        while self._client.socket() is not None and (left := until - time.monotonic()) > 0:
            self._turn(left)
        self._settle()

    def _turn(self, seconds: float) -> None:
        """Wait for the line or a wake for so long, and let paho do what there is to do."""
        line = self._client.socket()
        if line is None:
            raise RefusedError(self._lost) if self._lost else LinkError("the line was lost")
        poll = select.poll()
        poll.register(line.fileno(), select.POLLIN | select.POLLOUT * self._client.want_write())
        poll.register(self._wake.fileno(), select.POLLIN)
        # what TLS has decrypted already does not show on the line
        held = isinstance(line, ssl.SSLSocket) and line.pending() > 0
        ready = dict(poll.poll(0 if held else seconds * 1000))
        if self._wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
        if held or ready.get(line.fileno(), 0) & ~select.POLLOUT:
            self._client.loop_read()
        if self._client.want_write():
            self._client.loop_write()
        self._client.loop_misc()
        if self._taken and self._patience() <= 0:
            self._keep_taken()
        if self._flying and time.monotonic() > self._heard + ACKNOWLEDGE_SECONDS:
            raise LinkError(f"nothing was acknowledged for {ACKNOWLEDGE_SECONDS:.0f} s")

    # --- what is sent ------------------------------------------------------------------------

    def _publish(self, topic: str, payload: bytes) -> MQTTMessageInfo:
        return self._client.publish(topic, payload, qos=1, retain=True)

    def _feed(self) -> None:
        """Send what is new: what is retained, subscriptions, messages as far as the window goes."""
        for topic, payload in list(self._memory.retained.items()):
            if payload is not self._told.get(topic):
                self._told[topic] = payload
                sent = self._publish(topic, payload)
                if not topic.startswith(f"{self._base}/"):
                    self._elsewhere[sent.mid] = topic
        for one in self._memory.filters[self._subscribed :]:
            self._subscribed += 1
            self._client.subscribe(one, qos=1)
        # one that the broker may not be able to take is sent alone
        room = (self._window if self._memory.suspect is None else 1) - len(self._flying)
        for message in self._outbox.waiting(room, self._sent_until) if room > 0 else ():
            self._sent_until = message.id
            if message.id not in self._memory.acknowledged:
                self._send(message)

    def _send(self, message: Waiting) -> None:
        size = len(message.topic.encode()) + len(message.payload) + _HEADER_BYTES
        if self._largest and size > self._largest:
            self._refuse(message.id, f"{size} bytes, and the broker takes {self._largest}")
            return
        try:
            sent = self._client.publish(message.topic, message.payload, qos=1)
        except ValueError as error:
            self._refuse(message.id, str(error))
            return
        if not self._flying:
            self._heard = time.monotonic()
        self._flying[sent.mid] = message.id

    def _settle(self) -> None:
        """Let the outbox forget what the broker has."""
        if not self._memory.acknowledged:
            return
        try:
            self._outbox.remove(self._memory.acknowledged)
        except DiskError as error:
            if not self._full:
                log.warning("what was sent cannot be forgotten: %s", error)
            self._full = True
        else:
            self._memory.acknowledged.clear()
            self._full = False

    def _refuse(self, number: int, why: object) -> None:
        log.error("message %d cannot be sent and is given up: %s", number, why)
        self._outbox.refuse(number)

    # --- what comes --------------------------------------------------------------------------

    def _patience(self) -> float:
        """Seconds for which there is nothing to do, unless the line or a wake says otherwise."""
        if not self._taken:
            return TURN_SECONDS
        if len(self._taken) >= KEEP_MESSAGES:
            return 0.0
        due = min(self._first_taken + KEEP_SECONDS, self._last_taken + QUIET_SECONDS)
        return max(0.0, due - time.monotonic())

    def _keep_taken(self) -> None:
        """Let what was taken be kept, and say so to the broker, in the order in which it came."""
        if self._keep is None or not self._taken:
            return
        self._keep()
        for number, qos in self._taken:
            self._client.ack(number, qos)
        self._taken.clear()

    # --- what paho tells: raised errors end the session --------------------------------------

    def _on_connect(
        self,
        _client: Client,
        _data: object,
        _flags: object,
        reason: ReasonCode,
        also: Properties | None,
    ) -> None:
        self._window = min(WINDOW, getattr(also, "ReceiveMaximum", WINDOW))
        self._largest = getattr(also, "MaximumPacketSize", 0)
        self._reason = reason

    def _on_disconnect(
        self,
        _client: Client,
        _data: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        _also: object,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._lost = reason
        if reason.value in _UNUSABLE and self._flying:
            self._suspect(min(self._flying.values()), reason)

    def _suspect(self, number: int, why: object) -> None:
        """Send a message alone the next time, and when the line ends there again, not any more."""
        if number == self._memory.suspect and len(self._flying) == 1:
            self._memory.suspect = None
            self._refuse(number, why)
        else:
            self._memory.suspect = number

    def _on_publish(
        self, _client: Client, _data: object, mid: int, reason: ReasonCode, _also: object
    ) -> None:
        number, elsewhere = self._flying.pop(mid, None), self._elsewhere.pop(mid, None)
        self._heard = time.monotonic()
        if number is not None:
            self._memory.suspect = None
        if number is not None and reason.value in _UNUSABLE:
            self._refuse(number, reason)
        elif reason.is_failure and elsewhere is not None:  # what is ours goes on without
            log.warning("the broker refuses '%s': %s; allow it there", elsewhere, reason)
        elif reason.is_failure:
            raise RefusedError(reason)
        elif number is not None:
            self._memory.acknowledged.add(number)

    def _on_subscribe(
        self, _client: Client, _data: object, _mid: int, reasons: list[ReasonCode], _also: object
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                log.error("the broker refuses a subscription: %s; allow it there", reason)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            self._take(message.topic, bytes(message.payload), message.retain)
        except StateError:
            raise  # not acknowledged: it comes again when there is room
        except Exception:
            log.exception("a message that came could not be used and is left out")
        if self._keep is not None:
            self._last_taken = time.monotonic()
            if not self._taken:
                self._first_taken = self._last_taken
            self._taken.append((message.mid, message.qos))
