"""Flower ServerApp: adapts Grid to FarmLink, nothing else.

Delivery is at most once, and a reply whose node is offline at the moment of the pull is lost, so
replies are pulled one by one and only from nodes that are online. A pull can block for minutes
when a farm's upload broke off, so pulls run in threads, and no more replies are held than there
are threads.
"""

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast, get_args

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException

from common.config import ServerConfig
from common.errors import LaunchError, ProtocolError
from common.logs import start_logging
from common.messages import Reply, Request, Work
from common.settings import load_settings
from common.wire import MAX_ARRAY_BYTES, from_record, message_type, size_of, to_record
from server.link import Delivery, Sent

log = logging.getLogger(__name__)

app = ServerApp()

PULL_THREADS = 4
PACE_SECONDS = 0.5
SECONDS_PER_PULL = 0.05
"""An idle pull costs the SuperLink some 7 ms; this bounds what asking costs in all."""

# What could be imported before Flower put the unpacked app first on the import path.
_IMPORT_PATH = list(sys.path)


@app.main()
def run(grid: Grid, context: Context) -> None:
    """Run the round loop over Flower; ``state-dir`` and ``settings`` come with the run."""
    sys.path[:] = _IMPORT_PATH
    from server.begin import run_rounds
    from server.region_play import play_orders
    from server.rounds import WallClock

    state_dir = Path(str(context.run_config["state-dir"]))
    settings = Path(str(context.run_config["settings"]))
    with FlowerLink(grid) as link:
        if settings.name == "server.toml":  # a region, whose centre says what is done
            play_orders(load_settings(ServerConfig, settings), link, state_dir, WallClock())
        else:
            run_rounds(link, state_dir, settings)


def main() -> None:
    """Flower's program ``flwr-serverapp``, with this very module as ``server.app``."""
    from flwr.superlink.cli import flwr_serverapp

    start_logging()
    flwr_serverapp()


@dataclass(frozen=True)
class _Flight:
    """A message on its way."""

    node: int
    expires: float
    error: str | None = None


class FlowerLink:
    """A FarmLink over Flower's Grid; a context, because replies are pulled by threads."""

    def __init__(
        self,
        grid: Grid,
        *,
        max_reply_bytes: int = MAX_ARRAY_BYTES,
        threads: int = PULL_THREADS,
        pace_seconds: float = PACE_SECONDS,
    ) -> None:
        self._grid, self._max_reply_bytes, self._pace = grid, max_reply_bytes, pace_seconds
        self._flights: dict[str, _Flight] = {}
        self._asked: set[str] = set()  # queued, being pulled, or arrived and not handed out
        self._todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._arrived: queue.Queue[Delivery] = queue.Queue(maxsize=threads)
        self._next_sweep = 0.0
        self._online: tuple[float, tuple[int, ...]] = (float("-inf"), ())
        self._online_lock = threading.Lock()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._pull_forever, name=f"pull-{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        """Start the threads that pull replies."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Let the threads end; one that is stuck in a pull does not hold the process."""
        for _ in self._threads:
            self._todo.put(None)

    def online(self) -> Sequence[int]:
        """Node ids that can be reached, at most ``pace_seconds`` old, ascending.

        Flower's are unsigned; ours are the same 64 bits with a sign, because SQLite has no others.

        Raises:
            LaunchError: the run was stopped.
        """
        with self._online_lock:
            when, nodes = self._online
            if time.monotonic() - when >= self._pace:
                with _run_stopped_is_an_error():
                    nodes = tuple(sorted(map(_signed, self._grid.get_node_ids())))
                self._online = (time.monotonic(), nodes)
        return nodes

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        """Send a new message; one that the SuperLink refuses is reported by :meth:`poll`.

        Raises:
            LaunchError: the run was stopped.
        """
        record = to_record(request)
        message = Message(
            content=record,
            dst_node_id=node % 2**64,
            message_type=message_type(request),
            ttl=max(ttl_seconds, 1.0),  # zero would mean Flower's default of 12 hours
            group_id=str(request.round) if isinstance(request, Work) else "",
        )
        size = size_of(record)
        with _run_stopped_is_an_error():
            stored = list(self._grid.push_messages([message]))
        message_id = message.metadata.message_id
        error = None if stored == [message_id] else f"the SuperLink does not know node {node}"
        self._flights[message_id] = _Flight(node, time.monotonic() + ttl_seconds, error)
        return Sent(message_id, size)

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        """Whatever has been pulled for these messages since the last call; does not wait.

        Raises:
            LaunchError: the run was stopped.
        """
        if self._stopped:
            raise LaunchError("the run was stopped")
        deliveries = [d for d in self._hand_out() if d.message_id in message_ids]
        found = {delivery.message_id for delivery in deliveries}
        for message_id in [m for m in message_ids if m not in found]:
            flight = self._flights.get(message_id)
            error = "unknown message" if flight is None else flight.error
            if error is not None:
                self._flights.pop(message_id, None)
                deliveries.append(Delivery(message_id, None, error=error))
        self._sweep(message_ids)
        return deliveries

    def _hand_out(self) -> Iterator[Delivery]:
        while True:
            try:
                delivery = self._arrived.get_nowait()
            except queue.Empty:
                return
            self._asked.discard(delivery.message_id)
            self._flights.pop(delivery.message_id, None)
            yield delivery

    def _sweep(self, message_ids: Collection[str]) -> None:
        now = time.monotonic()
        if now < self._next_sweep:
            return
        wanted = [m for m in message_ids if m in self._flights and m not in self._asked]
        self._next_sweep = now + max(self._pace, SECONDS_PER_PULL * len(wanted))
        for message_id in wanted:
            self._asked.add(message_id)
            self._todo.put(message_id)
        for message_id, flight in list(self._flights.items()):
            if message_id not in message_ids and now > flight.expires + 60:
                del self._flights[message_id]  # nobody asks any more

    def _pull_forever(self) -> None:
        while (message_id := self._todo.get()) is not None:
            try:
                delivery = self._pull(message_id)
            except (LaunchError, RunNotRunningException):
                self._stopped = True
                return
            except Exception:
                log.exception("asking for a reply failed; it will be asked for again")
                delivery = None
            if delivery is None:
                self._asked.discard(message_id)
            else:
                self._arrived.put(delivery)  # waits while enough replies are held

    def _pull(self, message_id: str) -> Delivery | None:
        flight = self._flights.get(message_id)
        if flight is None:
            return None
        expired = time.monotonic() >= flight.expires
        if not expired and flight.node not in self.online():
            return None
        try:
            for message in self._grid.pull_messages([message_id]):
                if message.metadata.reply_to_message_id == message_id:
                    return _delivery_of(message_id, message, self._max_reply_bytes)
        except Exception as error:  # Flower raises all sorts when a farm's objects are damaged
            log.warning("pulling a reply of node %d: %r", flight.node, error)
            text = f"the reply could not be put together: {type(error).__name__}"
            return Delivery(message_id, None, error=text, malformed=True)
        return None


def _signed(node: int) -> int:
    return node - 2**64 if node >= 2**63 else node


@contextlib.contextmanager
def _run_stopped_is_an_error() -> Iterator[None]:
    try:
        yield
    except RunNotRunningException:
        raise LaunchError("the run was stopped") from None


def _delivery_of(message_id: str, message: Message, max_bytes: int) -> Delivery:
    if message.has_error():
        error = f"Flower error {message.error.code}: {message.error.reason}"
        return Delivery(message_id, None, error=error[:500])
    size = size_of(message.content)
    try:
        reply = from_record(message.content, max_bytes)
        if not isinstance(reply, get_args(Reply)):
            raise ProtocolError(f"a farm answers with a reply, not with '{reply.kind}'")
    except ProtocolError as error:
        return Delivery(message_id, None, size, error=str(error)[:500], malformed=True)
    return Delivery(message_id, cast(Reply, reply), size)
