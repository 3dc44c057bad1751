"""A network run by its commands alone, with real processes, and the bytes that it exchanged."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.messages import AlignReply, AlignRequest, EvaluateReply
from common.processes import Child, free_port, stop_all, wait_for_port
from server.status import snapshot
from server.store import Store
from tests.lab.network import SIDE, TINY, draw_folder
from tests.system.conftest import wait_until
from tests.system.traffic import Exchange, Recorder, WireMessage, inspect

pytestmark = pytest.mark.processes

BIN = Path(sys.executable).parent
FARMS = ("oak", "vine")

SERVER_TOML = """
seed = 1
[server]
port = {port}
[backbone]
name = "vit_tiny_patch16_224"
image_size = {side}
options = {options}
source = {source}
epochs = 2
anchor_images = 32
[plan]
rounds = 2
warmup = 0
prune_events = 1
prune_heads = 0.4
max_drop_ratio = 1.0
[rounds]
min_farms = 2
grace_seconds = 0
deadline_seconds = 120
[train]
epochs = 1
batch_size = 16
"""


def command(*arguments: str) -> list[str]:
    return [str(BIN / arguments[0]), *arguments[1:]]


def call(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@dataclass
class Site:
    """A running network in a folder."""

    root: Path
    up: Child
    recorder: Recorder
    farms: list[Child]
    recording: list[Exchange]

    @property
    def server(self) -> str:
        return str(self.root / "server")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The whole story once: pretrain, up, two farms, train."""
    root = tmp_path_factory.mktemp("site")
    port = free_port()
    source = draw_folder(root / "photos" / "source", 3, 16, 7)
    options = "{ " + ", ".join(f"{key} = {value}" for key, value in TINY.items()) + " }"
    text = SERVER_TOML.format(port=port, side=SIDE, options=options, source=json.dumps(str(source)))
    (root / "server").mkdir()
    (root / "server" / "server.toml").write_text(text)
    call("fieldfed-server", "pretrain", str(root / "server"))
    with ExitStack() as stack:
        children: list[Child] = []
        stack.callback(lambda: stop_all(children, 15))
        up = _start("up", command("fieldfed-server", "up", str(root / "server")), root, children)
        wait_for_port("127.0.0.1", port, 60, up)
        recorder = stack.enter_context(Recorder("127.0.0.1", port))
        farms = []
        for number, name in enumerate(FARMS):
            data = draw_folder(root / "photos" / name, 2 + number, 15, 50 + number)
            folder = str(root / "farms" / name)
            flags = ("--data", str(data), "--superlink", recorder.address, "--threads", "1")
            assert f"farm {name}: {2 + number} classes" in call(
                "fieldfed-client", "init", folder, *flags
            )
            farms.append(_start(name, command("fieldfed-client", "run", folder), root, children))
        said = call("fieldfed-server", "train", str(root / "server"))
        assert "run 1 is done" in said
        yield Site(root, up, recorder, farms, recorder.take())


def _start(name: str, arguments: list[str], root: Path, children: list[Child]) -> Child:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    child = Child(name, lambda: arguments, root / f"{name}.log", env)
    children.append(child)
    child.start()
    return child


@pytest.fixture(scope="module")
def messages(site: Site) -> list[WireMessage]:
    """All that passed, decoded; raises when a byte belongs to no typed message."""
    return inspect(site.recording)


def status(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("fieldfed-server", "status", site.server, "--json"))
    return found


def test_the_run_aligned_pruned_and_reported(site: Site) -> None:
    values = status(site)
    assert values["state"] == "done"
    assert [row["state"] for row in values["rounds"]] == ["committed"] * 2
    assert values["mask"]["heads_kept_ratio"] == pytest.approx(7 / 12)
    assert {row["farm"] for row in values["farms"]} == set(FARMS)
    assert all({"probe", "model"} <= row["reports"].keys() for row in values["farms"])
    assert values["rejected"] == {}


def test_every_byte_on_the_wire_is_a_typed_message_and_the_sizes_add_up(
    site: Site, messages: list[WireMessage]
) -> None:
    store = Store.open(site.root / "server" / "fieldfed.db", read_only=True)
    traffic = store.traffic(1)
    store.close()
    hellos = sum(m.size for m in messages if m.kind in ("hello", "hello_reply"))
    recorded = sum(line.bytes_up + line.bytes_down for line in traffic)
    assert sum(message.size for message in messages) == recorded + hellos
    kinds = {message.kind for message in messages}
    assert kinds == {"hello", "hello_reply", "align", "align_reply", "evaluate", "evaluate_reply"}


def test_no_classifier_and_no_image_is_among_the_bytes(
    site: Site, messages: list[WireMessage]
) -> None:
    up = b"".join(exchange.request for exchange in site.recording)
    for path in (site.root / "photos").rglob("*.png"):
        assert path.read_bytes()[40:72] not in up, f"{path.name} left its farm"
    weights = [
        path.read_bytes()[-64:] for path in (site.root / "farms").rglob("classifiers/*.safetensors")
    ]
    assert weights
    assert not [weight for weight in weights if weight in up], "a classifier left its farm"
    assert all(b"class0" not in exchange.request for exchange in site.recording)


def test_a_round_without_a_prune_event_costs_kilobytes(messages: list[WireMessage]) -> None:
    replies = [m for m in messages if isinstance(m.message, AlignReply | EvaluateReply)]
    assert max(reply.size for reply in replies) < 8_000
    requests = [m for m in messages if isinstance(m.message, AlignRequest)]
    assert {m.message.body_kind for m in requests} == {"none", "full"}  # type: ignore[union-attr]


def test_report_and_the_farms_own_evaluation(site: Site) -> None:
    page = site.root / "report.html"
    assert "report:" in call("fieldfed-server", "report", site.server, "--out", str(page))
    assert "<svg" in page.read_text()
    said = json.loads(
        call("fieldfed-client", "evaluate", str(site.root / "farms" / "oak"), "--json").split(
            "\n", 1
        )[0]
    )
    reported = {row["farm"]: row["reports"]["model"] for row in status(site)["farms"]}
    assert said["accuracy"] == pytest.approx(reported["oak"])


def test_a_port_in_use_is_one_clear_line(site: Site) -> None:
    said = call("fieldfed-server", "up", site.server, code=7)
    assert "port" in said
    assert "Traceback" not in said


def test_ctrl_c_during_a_round_keeps_the_store_and_ends_every_process(site: Site) -> None:
    log = site.root / "train.log"
    long = ["--rounds", "50", "--label", "long"]
    train = Child("train", lambda: command("fieldfed-server", "train", site.server, *long), log)
    train.start()
    folder = Path(site.server)
    wait_until(
        lambda: snapshot(folder)["label"] == "long" and snapshot(folder)["rounds"][1:],
        120,
        "round 2",
    )
    assert train.pid is not None
    os.kill(train.pid, signal.SIGINT)
    wait_until(lambda: train.returncode is not None, 60, "the end of train")
    assert train.returncode == 130, log.read_text()
    processes = [p for child in [site.up, *site.farms] for p in child.observe()]
    for child in [site.up, *site.farms]:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
    wait_until(lambda: not [p for p in processes if _lives(p)], 60, "the end of every process")
    with_rounds = status(site)
    assert with_rounds["label"] == "long"
    assert with_rounds["rounds"][0]["state"] == "committed"
    assert not list((site.root / "server" / "models").glob(".*"))


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
