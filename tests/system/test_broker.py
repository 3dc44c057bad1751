"""A real broker that is gone for a while, and a device that is killed meanwhile: nothing is lost.

The same with paho alone, which keeps in memory what it has not sent, shows what the outbox is for.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from common.broker import Broker
from common.mqtt import Connection, Seen
from common.outbox import Outbox
from tests.system.bridges import Bridge
from tests.system.mosquitto import DAYS, MOSQUITTO, OURS, RESULTS, Mosquitto, device
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(MOSQUITTO is None, reason="the broker 'mosquitto' is not installed"),
]

KILLED_AFTER = 4_000
PAHO = """
import json, sys
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
port, start, end = map(int, sys.argv[2:])
client = Client(CallbackAPIVersion.VERSION2, "oak", clean_session=False)
client.reconnect_delay_set(1, 1)
client.connect_async("127.0.0.1", port)
client.loop_start()
print("ready", flush=True)
sys.stdin.readline()
for number in range(start, end):
    body = json.dumps({"number": number, "id": number + 1})
    client.publish("fieldfed/valley/oak/result", body, qos=1)
    print(number, flush=True)
sys.stdin.readline()
"""


@dataclass
class Server:
    """Who receives: numbers as they come for the first time, and whether the device is there."""

    numbers: list[int] = field(default_factory=list)
    availability: list[bytes] = field(default_factory=list)
    again: int = 0
    seen: Seen = field(default_factory=Seen)

    def take(self, topic: str, payload: bytes, _retained: bool) -> None:
        if topic.endswith("/availability"):
            self.availability.append(payload)
            return
        body = json.loads(payload)
        if self.seen.first(topic.split("/")[2], body["id"]):
            self.numbers.append(body["number"])
        else:
            self.again += 1


@dataclass
class Valley:
    """A broker, and a server that has subscribed there."""

    broker: Mosquitto
    server: Server
    connection: Connection


@pytest.fixture
def valley(tmp_path: Path) -> Iterator[Valley]:
    with ExitStack() as stack:
        broker, server = Mosquitto(tmp_path / "broker"), Server()
        stack.callback(broker.stop)
        broker.start()
        outbox = stack.enter_context(Outbox.open(tmp_path / "server.db"))
        connection = Connection(
            Broker(host="127.0.0.1", port=broker.port),
            "valley",
            "watcher",
            outbox,
            server.take,
            session_seconds=3600,
            first_pause=0.1,
        )
        connection.subscribe("fieldfed/valley/+/result")
        connection.subscribe("fieldfed/valley/+/availability")
        stack.enter_context(connection)
        # its own "online", retained, comes back once the broker knows what it subscribes to
        wait_until(lambda: server.availability, 20, "the server's subscription")
        server.availability.clear()
        yield Valley(broker, server, connection)


def away(valley: Valley, script: str, folder: Path) -> None:
    """Put all results while the broker is gone, kill the device in the middle; end it at last."""
    port = valley.broker.port
    with device(script, folder, port, 0, RESULTS) as oak:
        valley.broker.stop()
        oak.put(KILLED_AFTER)
        oak.kill()
    with device(script, folder, port, KILLED_AFTER, RESULTS) as oak:
        oak.put(RESULTS)
        valley.broker.start()
        numbers = valley.server.numbers
        wait_until(lambda: numbers and numbers[-1] == RESULTS - 1, 200, "the last result")
        oak.end()


def test_all_results_of_a_fortnight_arrive_in_order_and_once(
    valley: Valley, tmp_path: Path
) -> None:
    with Bridge(tmp_path / "bridge", valley.broker.port) as bridge:
        wait_until(lambda: bridge.names == {"watcher"}, 20, "the bridge's subscription")
        away(valley, OURS, tmp_path)
        assert valley.server.numbers == list(range(RESULTS))
        wait_until(lambda: len(bridge.numbers()) == RESULTS, 60, "the last result at the bridge")
        assert bridge.numbers() == list(range(RESULTS))
        with bridge.told() as told:
            (row,) = told._select("SELECT min(time) AS first, max(time) AS last FROM results")
            assert row["last"] - row["first"] > 0.99 * DAYS * 86_400
    assert sum(path.stat().st_size for path in tmp_path.glob("outbox.db*")) < 64_000_000


def test_paho_alone_loses_what_the_killed_process_had_not_sent(
    valley: Valley, tmp_path: Path
) -> None:
    away(valley, PAHO, tmp_path)
    numbers = valley.server.numbers
    assert len(numbers) < RESULTS
    lost = set(range(RESULTS)) - set(numbers)
    assert lost == set(range(KILLED_AFTER))


def reached(numbers: list[int], count: int) -> bool:
    return len(numbers) >= count


def test_a_broker_that_is_restarted_while_results_flow_loses_none(
    valley: Valley, tmp_path: Path
) -> None:
    numbers = valley.server.numbers
    with device(OURS, tmp_path, valley.broker.port, 0, RESULTS) as oak:
        oak.tell()
        for part in (1500, 3000):
            wait_until(partial(reached, numbers, part), 100, "some results")
            valley.broker.stop()
            valley.broker.start()
        wait_until(lambda: len(numbers) == RESULTS, 200, "all results")
        oak.kill()
    assert numbers == list(range(RESULTS))


def test_the_broker_tells_of_a_device_that_was_killed(valley: Valley, tmp_path: Path) -> None:
    said = valley.server.availability
    with device(OURS, tmp_path, valley.broker.port, 0, 0) as oak:
        wait_until(lambda: said == [b"online"], 20, "the birth")
        oak.kill()
        wait_until(lambda: said == [b"online", b"offline"], 20, "the last will")
    with device(OURS, tmp_path, valley.broker.port, 0, 0) as oak:
        wait_until(lambda: len(said) == 3, 20, "the second birth")
        oak.tell()
        oak.end()
    wait_until(lambda: said[2:] == [b"online", b"offline"], 20, "the farewell")


@pytest.mark.parametrize("limit", ["message_size_limit 1000", "max_packet_size 1000"])
def test_a_message_that_the_broker_finds_too_long_does_not_stop_the_others(
    tmp_path: Path, limit: str
) -> None:
    with ExitStack() as stack:
        broker = Mosquitto(tmp_path / "broker", limit)
        stack.callback(broker.stop)
        broker.start()
        outbox = stack.enter_context(Outbox.open(tmp_path / "outbox.db"))
        where = Broker(host="127.0.0.1", port=broker.port)
        oak = Connection(where, "valley", "oak", outbox, first_pause=0.1)
        for size in (10, 3000, 10):
            oak.put("result", {"leaf": "x" * size})
        stack.enter_context(oak)
        wait_until(lambda: outbox.depth.count == 0, 30, "the outbox being empty")
        assert outbox.dropped == {"telemetry": 0, "event": 0, "result": 1}
