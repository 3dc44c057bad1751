"""Real SuperLink, SuperExec and SuperNodes on loopback, and everything that passes between them."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.config import FarmConfig, ServerConfig
from common.errors import ConfigError, LaunchError
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
)
from common.processes import wait_for_port
from common.protocols import PROTOCOL
from server.launch import Network, run_status, serve
from tests.system.conftest import FARMS, ROOT, Plant, start_plant, write_bundle
from tests.system.proxy import PREFIX, Exchange
from tests.system.site import words
from tests.system.traffic import SCHEMA, LeakError, inspect
from tests.waiting import wait_until

pytestmark = pytest.mark.processes

DIGEST = "5" * 64
WORK: dict[str, Any] = {"run": 1, "round": 3, "attempt": 1, "base": DIGEST, "mask": DIGEST}
HELLO = {"kind": "hello"}
ALIGN = {"kind": "align", **WORK, "seed": 0, "train": {}}
EVALUATE = {"kind": "evaluate", **WORK, "seed": 0, "label": "probe", "train": {}}


@dataclasses.dataclass(frozen=True)
class Honest:
    """One run in which everybody keeps to the protocol, but for a server of another version."""

    steps: list[list[dict[str, Any]]]
    recording: list[Exchange]


@pytest.fixture(scope="module")
def honest(plant: Plant, bundle: Path) -> Honest:
    report = plant.run([HELLO, ALIGN, EVALUATE], bundle, "honest")
    return Honest(report["steps"], plant.recorder.take())


def farm_names(step: list[dict[str, Any]]) -> list[str]:
    return sorted(item["reply"]["farm"] for item in step)


# --- an honest run -------------------------------------------------------------------------------


def test_every_farm_answers_every_request(honest: Honest) -> None:
    hello, align, evaluate = honest.steps
    assert farm_names(hello) == farm_names(align) == farm_names(evaluate) == list(FARMS)
    assert {item["reply"]["kind"] for item in align} == {"align_reply"}
    assert {item["reply"]["round"] for item in align} == {3}
    assert {item["reply"]["label"] for item in evaluate} == {"probe"}


def test_the_traffic_is_the_typed_messages_and_adds_up(honest: Honest) -> None:
    messages = inspect(honest.recording)
    requests = Counter(type(item.message) for item in messages if item.direction == "down")
    assert requests == dict.fromkeys((HelloRequest, AlignRequest, EvaluateRequest), 2)
    replies = Counter(
        (type(item.message), item.message.farm)  # type: ignore[union-attr]
        for item in messages
        if item.direction == "up"
    )
    kinds = (HelloReply, AlignReply, EvaluateReply)
    assert replies == {(kind, name): 1 for kind in kinds for name in FARMS}
    sent = sum(item["sent"] for step in honest.steps for item in step)
    received = sum(item["size"] for step in honest.steps for item in step)
    assert sum(item.size for item in messages if item.direction == "down") == sent
    assert sum(item.size for item in messages if item.direction == "up") == received
    updates = [item for item in messages if isinstance(item.message, AlignReply)]
    assert all(item.size > 400_000 for item in updates)  # 400 000 numbers of 8 bits, two chunks


def test_almost_nothing_travels_beside_the_messages(honest: Honest) -> None:
    up = sum(len(exchange.request) for exchange in honest.recording)
    counted = sum(item.size for item in inspect(honest.recording) if item.direction == "up")
    assert counted - 10_000 < up < counted + 40_000  # what two farms say alike travels once


def test_a_message_that_did_not_travel_whole_is_noticed(honest: Honest) -> None:
    pushed = [e for e in honest.recording if e.path.endswith("/push-object")]
    for name in {SCHEMA["push-object"][0].FromString(e.request).object_id for e in pushed}:
        rest = [e for e in honest.recording if name.encode() not in e.request or e not in pushed]
        with pytest.raises(LeakError, match="did not travel"):
            inspect(rest)


@pytest.mark.parametrize("path", ["push-object", "send-node-heartbeat", "push-messages"])
def test_stray_bytes_are_noticed_wherever_they_hide(honest: Honest, path: str) -> None:
    recording = list(honest.recording)
    number = next(i for i, e in enumerate(recording) if e.path.endswith(path))
    field_99 = b"\x9a\x06\x08\xff\xd8\xff\xe0JFIF"  # a protobuf field that Flower does not know
    hidden = recording[number].request + field_99
    recording[number] = dataclasses.replace(recording[number], request=hidden)
    with pytest.raises(LeakError, match="stray bytes"):
        inspect(recording)


def test_other_paths_are_noticed(honest: Honest) -> None:
    with pytest.raises(LeakError, match="not a path"):
        inspect([Exchange("/v1/control/start-run", b"", 200, b"")])


def test_code_in_the_bundle_is_noticed(plant: Plant, honest: Honest, tmp_path: Path) -> None:
    with_code = write_bundle(tmp_path / "app")
    (with_code / "code.py").write_text("".join(f"a{number} = {number}\n" for number in range(9999)))
    plant.recorder.take()
    plant.run([HELLO], with_code, "code")
    with pytest.raises(LeakError, match="does it carry code"):
        inspect(plant.recorder.take())


# --- leaks and other versions --------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaks(plant: Plant, bundle: Path, honest: Honest) -> Honest:
    plant.recorder.take()
    steps = [
        {**HELLO, "protocol": PROTOCOL + 1},
        {**ALIGN, "seed": 1, "round": 1},
        {**ALIGN, "seed": 2, "round": 2},
    ]
    report = plant.run(steps, bundle, "leaks")
    return Honest(report["steps"], plant.recorder.take())


def of_round(recording: list[Exchange], number: int) -> list[Exchange]:
    """A recording with the messages of one round only (Flower calls it the group)."""

    def belongs(exchange: Exchange) -> bool:
        name = exchange.path.removeprefix(PREFIX)
        if name not in ("pull-messages", "push-messages"):
            return name in ("pull-object", "push-object")
        request, response = (
            kind.FromString(data)
            for kind, data in zip(SCHEMA[name], (exchange.request, exchange.response), strict=True)
        )
        heads = [*getattr(request, "messages_list", []), *getattr(response, "messages_list", [])]
        return any(head.metadata.group_id == str(number) for head in heads)

    return [exchange for exchange in recording if belongs(exchange)]


def test_another_protocol_is_refused_by_the_farm(leaks: Honest) -> None:
    replies = [item["reply"] for item in leaks.steps[0]]
    assert {(reply["kind"], reply["reason"]) for reply in replies} == {("refusal", "protocol")}
    assert all(f"protocol {PROTOCOL + 1}" in reply["detail"] for reply in replies)


def test_a_classifier_in_a_reply_is_refused_and_noticed(leaks: Honest) -> None:
    for item in leaks.steps[1]:
        assert item["malformed"]
        assert "classifier.weight" in item["error"]
        assert item["size"] > 3 * 384 * 4
    with pytest.raises(LeakError, match=r"classifier\.weight"):
        inspect(of_round(leaks.recording, 1))


def test_an_image_in_the_update_is_noticed(leaks: Honest) -> None:
    for item in leaks.steps[2]:
        assert item["reply"]["kind"] == "align_reply"  # well-formed as a message
    with pytest.raises(LeakError, match=r"update: not a coded update"):
        inspect(of_round(leaks.recording, 2))


def test_the_run_as_a_whole_does_not_pass(leaks: Honest) -> None:
    with pytest.raises(LeakError):
        inspect(leaks.recording)


# --- launching -----------------------------------------------------------------------------------


def test_a_port_in_use_is_told_before_anything_starts(plant: Plant, tmp_path: Path) -> None:
    config = ServerConfig.model_validate({"server": {"port": plant.network.port}})
    told = rf"port {plant.network.port} .*choose another port"
    with pytest.raises(LaunchError, match=told), serve(config, tmp_path / "state"):
        pass
    assert not (tmp_path / "state").exists()


def test_other_machines_are_not_served_without_encryption(tmp_path: Path) -> None:
    config = ServerConfig.model_validate({"server": {"host": "0.0.0.0"}})
    with pytest.raises(ConfigError, match="not encrypted"), serve(config, tmp_path):
        pass


def test_a_farm_does_not_speak_to_other_machines_without_encryption(tmp_path: Path) -> None:
    from client.agent import run_device

    farm = {"name": "alpha", "data": "none", "superlink": "example.org:8000"}
    with pytest.raises(ConfigError, match=r"no member of its network"):
        run_device(FarmConfig.model_validate({"farm": farm}), tmp_path / "farm.toml", tmp_path)


def test_questions_about_runs(plant: Plant, honest: Honest) -> None:
    with pytest.raises(LaunchError, match="not found"):
        run_status(plant.network, 12345)


def test_no_server(tmp_path: Path) -> None:
    network = Network("127.0.0.1", 9, tmp_path)
    (tmp_path / "flower").mkdir()
    connection = '[superlink.fieldfed]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    (tmp_path / "flower" / "config.toml").write_text(connection)
    with pytest.raises(LaunchError, match="unavailable"):
        run_status(network, 1)


def test_the_secret_and_the_database_are_private(plant: Plant) -> None:
    home = plant.network.state_dir / "flower"
    assert (home / "superexec.secret").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert (plant.network.state_dir / "flower-app" / "pyproject.toml").stat().st_size < 1000


def test_ctrl_c_during_a_run_leaves_no_process(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        plant = start_plant(tmp_path, ("alpha",), stack)
        plant.submit([{**ALIGN, "seed": 99}], bundle)
        working = "alpha/logs/clientapp.log"
        wait_until(lambda: "Start `flwr-clientapp`" in plant.log("alpha", "clientapp"), 60, working)
        processes = [p for child in plant.launchers for p in child.observe()]
        names = " ".join(map(words, processes))
        for name in ("superlink", "superexec", "supernode", "client.executor", "server.app"):
            assert name in names
        for child in plant.launchers:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGINT)
        wait_until(lambda: not any(child.observe() for child in plant.launchers), 20, "the end")
        assert all(child.returncode == 0 for child in plant.launchers)
        assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert "stopped" in plant.server.log_file.read_text()


def test_a_dead_superlink_is_started_again(plant: Plant, honest: Honest) -> None:
    superlink = next(p for p in plant.server.observe() if "flower-superlink" in words(p))
    superlink.kill()
    restarted = "superlink started again"
    wait_until(lambda: restarted in plant.server.log_file.read_text(), 30, restarted)
    wait_for_port(plant.network.host, plant.network.port, 30)


def test_requests_are_answered_with_and_without_an_executor(
    bundle: Path, plant: Plant, honest: Honest
) -> None:
    executor = _executor(plant)
    assert "Start `flwr-clientapp`" in plant.log("alpha", "clientapp")
    assert not plant.log("alpha", "executor"), "what children print belongs into clientapp.log"
    executor.kill()
    report = plant.run([{**ALIGN, "seed": 7}], bundle, "without-executor")
    assert farm_names(report["steps"][0]) == sorted(plant.farms)
    wait_until(lambda: _executor(plant).pid != executor.pid, 30, "another executor")


def _executor(plant: Plant) -> psutil.Process:
    """The parent of those that answer for alpha."""
    found = [p for p in plant.farms["alpha"].observe() if "client.executor" in words(p)]
    return min(found, key=lambda process: process.create_time())


def test_launchers_need_no_torch() -> None:
    code = "import server.launch, client.launch, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=ROOT, timeout=60)
