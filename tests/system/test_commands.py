"""A network run by its commands alone, with real processes, and the bytes that it exchanged."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.messages import AlignReply, AlignRequest, EvaluateReply
from common.processes import Child
from server.status import snapshot
from tests.system.conftest import Told
from tests.system.site import FARMS, Site, call, command
from tests.system.traffic import WireMessage, inspect
from tests.waiting import wait_until

pytestmark = pytest.mark.processes


@pytest.fixture
def site(told: Told) -> Site:
    """The network that told the story; it is still up."""
    return told.site


@pytest.fixture(scope="module")
def messages(told: Told) -> list[WireMessage]:
    """All that passed, decoded; raises when a byte belongs to no typed message."""
    return inspect(told.recording)


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
    with site.store as store:
        traffic = store.traffic(1)
    hellos = sum(m.size for m in messages if m.kind in ("hello", "hello_reply"))
    recorded = sum(line.bytes_up + line.bytes_down for line in traffic)
    assert sum(message.size for message in messages) == recorded + hellos
    kinds = {message.kind for message in messages}
    assert kinds == {"hello", "hello_reply", "align", "align_reply", "evaluate", "evaluate_reply"}


@pytest.mark.parametrize("farm", FARMS)
def test_a_farms_ledger_has_every_byte_that_left_it(
    site: Site, messages: list[WireMessage], farm: str
) -> None:
    sent = [one for one in messages if getattr(one.message, "farm", None) == farm]
    found = json.loads(call("fieldfed-client", "ledger", str(site.root / "farms" / farm), "--json"))
    assert sum(row["bytes"] for row in found["totals"]) == sum(one.size for one in sent)
    updates = [one.message.update for one in sent if isinstance(one.message, AlignReply)]
    by_kind = {row["kind"]: row for row in found["totals"]}
    assert by_kind["update"]["bytes"] == sum(update.nbytes for update in updates)
    assert by_kind["update"]["messages"] == len(updates) == 2
    assert by_kind.keys() == {"hello", "update", "scores", "metrics", "report"}
    assert found["socket_sent_bytes"] > sum(one.size for one in sent)


def test_no_classifier_and_no_image_is_among_the_bytes(
    told: Told, messages: list[WireMessage]
) -> None:
    site = told.site
    up = b"".join(exchange.request for exchange in told.recording)
    for path in (site.root / "photos").rglob("*.png"):
        assert path.read_bytes()[40:72] not in up, f"{path.name} left its farm"
    weights = [
        path.read_bytes()[-64:] for path in (site.root / "farms").rglob("classifiers/*.safetensors")
    ]
    assert weights
    assert not [weight for weight in weights if weight in up], "a classifier left its farm"
    assert all(b"class0" not in exchange.request for exchange in told.recording)


def test_a_round_without_a_prune_event_costs_kilobytes(messages: list[WireMessage]) -> None:
    replies = [m for m in messages if isinstance(m.message, AlignReply | EvaluateReply)]
    assert max(reply.size for reply in replies) < 8_000
    requests = [m for m in messages if isinstance(m.message, AlignRequest)]
    assert {m.message.body_kind for m in requests} == {"none", "delta"}  # type: ignore[union-attr]


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
