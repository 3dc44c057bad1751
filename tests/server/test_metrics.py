"""Figures for Prometheus: each is what the store says, whatever is damaged, and over HTTP."""

import http.client
import logging
import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from email.message import Message as Headers
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from client.identity import FarmIdentity
from common import exposition
from common.certificates import read_certificate
from common.config import ServerConfig
from common.errors import ConfigError, FieldfedError, LaunchError, RejectReason, StateError
from common.manifest import Outcome
from common.mask import Mask
from common.messages import AlignReply, EvaluateReply, Reply, Request
from common.processes import Child, free_port, port_is_free, wait_for_port
from common.services import MetricsConfig
from common.settings import load_settings
from server import families, figures, launch, rollout, telemetry
from server.figures import MOST_FARMS, Figures, reading
from server.identity import Authority
from server.metrics import MetricsServer, StateCollector
from server.registry import STABLE, Registry
from server.rollout import RolloutPlan
from server.rows import GUARD, RunRow, SpooledReply, VerdictRow
from server.status import snapshot
from server.store import CandidateRow, Store
from server.telemetry import Fate
from server.versions import InstallRow, Versions
from tests.lab.devices import tell
from tests.lab.network import Lab
from tests.lab.replies import DIGEST, align_reply
from tests.lab.versions import NETWORK, two_versions
from tests.waiting import wait_until

Labels = tuple[tuple[str, str], ...]
Series = dict[tuple[str, Labels], float]
Parse = Callable[[str], Iterable[Metric]]

SOURCES = ("runs", "replies", "farms", "model", "store", "registry", "telemetry", "certificates")
LABELS = {
    *("state", "le", "outcome", "reason", "direction", "farm", "part", "block", "head"),
    *("channel", "holder", "source", "version", "python", "device"),
}


ACTIVE = "fieldfed_farms", (("state", "active"),)


def lost(_node: int, _request: Request, reply: Reply) -> str | None:
    return "lost" if isinstance(reply, AlignReply) else None


def foreign(node: int, request: Request, reply: Reply) -> Reply | None:
    if node == 2 and isinstance(reply, AlignReply) and reply.round == 1:
        return reply.model_copy(update={"mask": "0" * 64})
    return None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A server with a run that failed and one that pruned, two versions and certificates."""
    made = Lab(tmp_path_factory.mktemp("lab"), prune_heads=0.4)
    with pytest.raises(FieldfedError):
        made.run(fault=lost)
    made.run(fault=foreign)
    with two_versions(made.server_dir) as registry:
        fill(registry)
    authority = Authority.create(made.server_dir / "identity", NETWORK, [])
    for farm, days in (("farm0", 10), ("farm1", 20), ("farm0", 30)):
        identity = FarmIdentity.create(made.root / "identities" / farm, farm)
        authority.sign(identity.request(), days)
    tell(made.server_dir)
    return made


def fill(registry: Registry) -> None:
    """Two channels, a version on its way to one of them, and three reports."""
    registry.promote(STABLE, 1)
    registry.promote("canary", 2)
    rollout.start(registry, RolloutPlan(channel=STABLE, version=2, stages=(0.1, 0.5, 1.0)))
    for farm, outcome in (("farm0", "committed"), ("farm1", "committed"), ("farm2", "refused")):
        row = InstallRow(farm, "pi", 2, outcome, "a text", None, None, time.time())
        registry.rows.record_install(row)


@pytest.fixture
def copied(lab: Lab, tmp_path: Path) -> Path:
    """What the server has on disk, to be changed."""
    folder = tmp_path / "server"
    folder.mkdir()
    for path in lab.server_dir.glob("fieldfed.db*"):
        shutil.copy(path, folder)
    shutil.copy(lab.server_dir / telemetry.NAME, folder)
    for name in ("registry", "identity"):
        shutil.copytree(lab.server_dir / name, folder / name)
    return folder


def scraped(folder: Path) -> Series:
    return parsed(generate_latest(StateCollector(folder)).decode())


def parsed(text: str, parse: Parse = text_string_to_metric_families) -> Series:
    found: Series = {}
    for family in parse(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def at(name: str, value: float, **labels: object) -> Series:
    return {(f"fieldfed_{name}", tuple(sorted((k, str(v)) for k, v in labels.items()))): value}


def each(name: str, label: str, values: Mapping[str, float]) -> Series:
    return {
        k: v for key, value in values.items() for k, v in at(name, value, **{label: key}).items()
    }


def up(series: Series) -> dict[str, float]:
    return {
        dict(key[1])["source"]: v for key, v in series.items() if key[0] == "fieldfed_up_source"
    }


# --- what the store says, found another way ------------------------------------------------------


def latest(store: Store) -> RunRow:
    run = store.latest_run()
    assert run is not None
    return run


def histogram(name: str, values: list[float], bounds: tuple[float, ...]) -> Series:
    found = at(f"{name}_count", len(values)) | at(f"{name}_sum", math.fsum(values))
    for bound in bounds:
        found |= at(f"{name}_bucket", sum(v <= bound for v in values), le=float(bound))
    return found | at(f"{name}_bucket", len(values), le="+Inf")


def runs_of(store: Store) -> Series:
    rounds = [
        (run, row) for run in store.runs() for row in store.rounds(run.run) if row.kind == "align"
    ]
    committed = [row for _, row in rounds if row.state == "committed"]
    failed = [row for run, row in rounds if row.state == "open" and run.state == "failed"]
    states = Counter(run.state for run in store.runs())
    verdicts = Counter(row.accepted for run in store.runs() for row in store.verdicts(run.run))
    newest = [row for run, row in rounds if run.run == latest(store).run][-1]
    return (
        at("run_number", len(store.runs()))
        | each("run_state", "state", {"running": 0, "done": 1, "stopped": 0, "failed": 0})
        | each("runs_total", "state", {s: states[s] for s in ("done", "stopped", "failed")})
        | each(
            "rounds_total",
            "outcome",
            {
                "committed": len(committed),
                "failed": len(failed),
                "reopened": sum(row.attempt - 1 for _, row in rounds),
            },
        )
        | histogram(
            "round_duration_seconds",
            [row.finished - row.started for row in committed if row.finished is not None],
            (1, 10, 30, 60, 300, 600, 1800, 3600, 10_800, 43_200, 86_400),
        )
        | each("cuts_total", "outcome", {"accepted": verdicts[True], "undone": verdicts[False]})
        | at("round_number", newest.round)
        | at("round_open", float(newest.state == "open"))
        | at("round_participants", newest.participants)
        | at("round_quorum", newest.quorum)
        | at("round_deadline_timestamp_seconds", newest.deadline)
    )


def replies_of(store: Store) -> Series:
    runs = [row.run for row in store.runs()]
    replies = [
        reply
        for run in runs
        for row in store.rounds(run)
        if (row.kind, row.state) == ("align", "committed")
        for reply in store.replies(run, row.round)
    ]
    rejected = Counter(row.reason for run in runs for row in store.rejections(run))
    traffic = [row for run in runs for row in store.traffic(run)]
    link = [row for run in runs for row in store.link_bytes(run)]
    messages = {"up": "bytes_up", "down": "bytes_down"}
    sockets = {"up": "sent", "down": "received"}
    return (
        at("replies_total", len(replies))
        | each("replies_rejected_total", "reason", {why: rejected[why] for why in RejectReason})
        | histogram(
            "reply_staleness_rounds",
            [row.round - row.of_round for row in replies],
            (0, 1, 2, 3, 5, 10, 30, 100),
        )
        | each(
            "message_bytes_total",
            "direction",
            {way: sum(getattr(row, name) for row in traffic) for way, name in messages.items()},
        )
        | each(
            "link_bytes_total",
            "direction",
            {way: sum(getattr(row, name) for row in link) for way, name in sockets.items()},
        )
    )


def farms_of(store: Store) -> Series:
    run = latest(store)
    paused = {row.farm for row in store.pauses()}
    active = {row.farm for row in store.farms(run.run)} - paused
    found = each("farms", "state", {"active": len(active), "paused": len(paused)})
    newest = {row.farm: row for row in store.last_replies(run.run)}
    reports = {row.farm: row for row in store.reports(run.run, run.message)}
    judged = {row.farm: row for row in store.reports(run.run, GUARD)}
    for row in store.farms(run.run):
        found |= at("farm_last_seen_timestamp_seconds", row.last_seen, farm=row.farm)
        decide = judged.get(row.farm, newest[row.farm])
        for part, quality in (("decide", decide), ("test", reports[row.farm])):
            found |= at("farm_accuracy_ratio", quality.accuracy, farm=row.farm, part=part)
            found |= at("farm_f1_ratio", quality.f1, farm=row.farm, part=part)
    return found


def model_of(store: Store, folder: Path) -> Series:
    run = latest(store)
    mask = Mask.from_json(store.last_mask(run))
    found: Series = {}
    for block, (heads, neurons) in enumerate(zip(mask.heads, mask.neurons, strict=True)):
        found |= at("heads_kept", len(heads), block=block)
        found |= at("neurons_kept", len(neurons), block=block)
    scores = store.scores(run.run)
    (agreed,) = [row for row in scores[max(scores)] if row.farm is None]
    values = iter(agreed.heads.tolist())
    for block, heads in enumerate(Mask.from_json(store.mask(agreed.mask)).heads):
        for head in heads:
            found |= at("head_score", next(values), block=block, head=head)
    ratios = [row.macs_ratio for row in store.rounds(run.run) if row.macs_ratio is not None]
    agreement = snapshot(folder)["agreement"]
    return found | at("macs_ratio", ratios[-1]) | at("score_rank_correlation", agreement)


def store_of(store: Store, folder: Path) -> Series:
    ends = [
        row.finished
        for run in store.runs()
        for row in store.rounds(run.run)
        if row.kind == "align" and row.finished is not None
    ]
    files = [folder / "fieldfed.db", folder / "fieldfed.db-wal"]
    size = sum(path.stat().st_size for path in files if path.exists())
    return at("last_commit_timestamp_seconds", max(ends)) | at("store_size_bytes", size)


def registry_of(folder: Path) -> Series:
    with Registry.open(folder) as registry:
        found = at("newest_version", registry.rows.versions()[-1].counter)
        for row in registry.rows.channels():
            found |= at("channel_version", row.version, channel=row.name)
            found |= at("channel_expiry_timestamp_seconds", row.expires, channel=row.name)
        going = registry.rows.rollout(STABLE)
        assert going is not None
        for state in ("running", "paused", "done", "aborted"):
            found |= at("rollout_state", going.state == state, channel=STABLE, state=state)
        found |= at("rollout_share_ratio", 0.1, channel=STABLE)
        counts = Counter(row.outcome for row in registry.rows.installs(2))
        return found | each(
            "installs_total", "outcome", {one: counts[one] for one in get_args(Outcome)}
        )


def certificates_of(folder: Path) -> Series:
    identity = folder / "identity"
    ends = {
        holder: read_certificate(identity / name, "").not_valid_after_utc.timestamp()
        for holder, name in (("authority", "ca.crt"), ("server", "server.crt"))
    }
    # farm0 has a newer one that ends after farm1's
    (second,) = [row for row in Authority.open(identity).issued() if row.farm == "farm1"]
    ends["farms"] = second.expires.timestamp()
    return each("certificate_expiry_timestamp_seconds", "holder", ends)


def devices_of() -> Series:
    counts = dict.fromkeys(get_args(Fate), 0) | {"stored": 5, "duplicate": 1, "malformed": 3}
    return (
        each("devices", "state", {"online": 1, "offline": 1})
        | at("device_last_seen_timestamp_seconds", 1_700_000_000.0, device="farm0")
        | at("device_outbox_messages", 7, device="farm0")
        | each("telemetry_messages_total", "outcome", counts)
    )


def told_of(folder: Path) -> Series:
    """Every series but the release's."""
    with Store.open(folder / "fieldfed.db", read_only=True) as store:
        return (
            runs_of(store)
            | replies_of(store)
            | farms_of(store)
            | model_of(store, folder)
            | store_of(store, folder)
            | registry_of(folder)
            | devices_of()
            | certificates_of(folder)
            | each("up_source", "source", dict.fromkeys(SOURCES, 1.0))
        )


# --- figures -------------------------------------------------------------------------------------


def test_every_figure_is_what_is_on_disk(lab: Lab) -> None:
    told = told_of(lab.server_dir)
    found = scraped(lab.server_dir)
    release = {key for key in found if key[0] == "fieldfed_build_info"}
    assert len(release) == 1
    assert {key: value for key, value in found.items() if key not in release} == told


def test_the_run_had_what_the_figures_are_about(lab: Lab) -> None:
    found = scraped(lab.server_dir)
    named: dict[str, float] = defaultdict(float)
    for (name, _), value in found.items():
        named[name] += value
    assert found["fieldfed_rounds_total", (("outcome", "failed"),)] == 1
    assert found["fieldfed_replies_rejected_total", (("reason", "foreign_mask"),)] == 1
    assert found["fieldfed_replies_rejected_total", (("reason", "lost"),)] > 0
    assert named["fieldfed_heads_kept"] == round(0.6 * 12)
    assert named["fieldfed_macs_ratio"] < 1
    assert found["fieldfed_message_bytes_total", (("direction", "up"),)] > 0


def test_families_and_series_are_few(lab: Lab) -> None:
    families = StateCollector(lab.server_dir).collect()
    assert len(families) == len({one.name for one in families}) <= 40
    assert all(one.name.startswith("fieldfed_") and one.documentation for one in families)
    found = scraped(lab.server_dir)
    farms = Counter(
        value for _, labels in found for name, value in labels if name in ("farm", "device")
    )
    assert set(farms) == {"farm0", "farm1", "farm2"}
    assert max(farms.values()) == farms["farm0"] <= 7, "a farm's only device, called as the farm"
    assert {label for _, labels in found for label, _ in labels} <= LABELS


def test_openmetrics_says_the_same(lab: Lab) -> None:
    text = generate_openmetrics(StateCollector(lab.server_dir)).decode()  # type: ignore[no-untyped-call]
    assert parsed(text, openmetrics_families) == scraped(lab.server_dir)


def test_no_path_and_no_class_leaks(lab: Lab) -> None:
    text = generate_latest(StateCollector(lab.server_dir)).decode()
    values = [value for _, labels in scraped(lab.server_dir) for _, value in labels]
    assert not any("/" in value or "class" in value or "a text" in value for value in values)
    for word in (str(lab.root), "class0", "a text", DIGEST[:8]):
        assert word not in text


def test_only_so_many_farms_are_shown_one_by_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_FARMS == 1000
    monkeypatch.setattr(figures, "MOST_FARMS", 2)
    monkeypatch.setattr(families, "MOST_FARMS", 0)
    found = scraped(lab.server_dir)
    assert {dict(labels).get("farm") for _, labels in found} == {None, "farm0", "farm1"}
    assert not any("device" in dict(labels) for _, labels in found)
    assert found["fieldfed_devices", (("state", "online"),)] == 1
    assert found[ACTIVE] == 3


# --- counters ------------------------------------------------------------------------------------


def counters(series: Series) -> Series:
    ends = ("_total", "_bucket", "_count")
    return {key: value for key, value in series.items() if key[0].endswith(ends)}


def test_a_restart_loses_nothing(lab: Lab) -> None:
    assert scraped(lab.server_dir) == scraped(lab.server_dir)
    assert sum(counters(scraped(lab.server_dir)).values()) > 0


def test_counters_only_rise_when_another_run_begins(copied: Path) -> None:
    before = counters(scraped(copied))
    with Store.open(copied / "fieldfed.db") as store:
        last = latest(store)
        run = store.start_run("{}", 1, last.base, last.mask_json)
        store.upsert_farm(run, 9, "oak", 10, 2)
        opened(store, run, 1)
        store.record_sent(run, 1, 9, 1, 100)
    found = scraped(copied)
    assert all(found[key] >= value for key, value in before.items())
    down = "fieldfed_message_bytes_total", (("direction", "down"),)
    assert found[down] == before[down] + 100
    assert found[ACTIVE] == 1
    assert found["fieldfed_macs_ratio", ()] == 1
    assert not any(name == "fieldfed_head_score" for name, _ in found), "they are of another run"


def opened(store: Store, run: int, number: int) -> None:
    mask = store.run(run).mask
    store.open_round(run, number, kind="align", base=DIGEST, mask=mask, quorum=1, deadline=99.0)


def committed(store: Store, run: int, number: int, verdict: VerdictRow | None = None) -> None:
    row = CandidateRow(DIGEST, DIGEST, store.run(run).mask, "{}", 1000, 100, "models/x")
    ratios = {"macs_ratio": 0.5, "heads_kept_ratio": 0.5, "mean_accuracy": None}
    store.commit_round(run, number, candidate=row, verdict=verdict, **ratios)  # type: ignore[arg-type]


def replied(store: Store, number: int, node: int, of: int, accuracy: float) -> None:
    reply = align_reply(np.zeros(3, np.uint8), farm=f"farm{node}", round=of, accuracy=accuracy)
    spooled = SpooledReply(Path("/spool/x"), 0, 9, DIGEST)
    assert store.record_reply(1, number, node, 1, 50, reply, spooled)


def test_a_round_that_goes_on_is_seen_and_its_replies_count_at_its_end(tmp_path: Path) -> None:
    mask = Mask(((0, 1),), ((0,),), (2,), (4,)).to_json()
    late = "fieldfed_reply_staleness_rounds_bucket"
    with Store.open(tmp_path / "fieldfed.db") as store:
        run = store.start_run("{}", 1, DIGEST, mask)
        for node in (1, 2):
            store.upsert_farm(run, node, f"farm{node}", 10, 2)
        opened(store, run, 1)
        replied(store, 1, 1, 1, 0.25)
        found = scraped(tmp_path)
        assert found["fieldfed_round_open", ()] == found["fieldfed_round_participants", ()] == 1
        assert found["fieldfed_round_quorum", ()] == 1
        assert found["fieldfed_round_deadline_timestamp_seconds", ()] == 99
        assert found["fieldfed_replies_total", ()] == 0
        assert found["fieldfed_reply_staleness_rounds_count", ()] == 0
        assert found["fieldfed_run_state", (("state", "running"),)] == 1
        decide = "fieldfed_farm_accuracy_ratio", (("farm", "farm1"), ("part", "decide"))
        assert found[decide] == 0.25
        committed(store, run, 1)
        opened(store, run, 2)
        opened(store, run, 2)
        replied(store, 2, 1, 2, 0.75)
        replied(store, 2, 2, 1, 0.5)
        judged = store.run(run).mask
        committed(store, run, 2, VerdictRow(1, 2, False, 0.3, 2, judged))
        store.pause("farm2", "bad replies")
    found = scraped(tmp_path)
    assert found["fieldfed_replies_total", ()] == 3
    assert found[late, (("le", "0.0"),)] == 2
    assert found[late, (("le", "1.0"),)] == 3
    assert found["fieldfed_reply_staleness_rounds_sum", ()] == 1
    assert found["fieldfed_rounds_total", (("outcome", "reopened"),)] == 1
    assert found["fieldfed_cuts_total", (("outcome", "undone"),)] == 1
    assert found["fieldfed_farms", (("state", "paused"),)] == 1
    assert found[decide] == 0.75
    assert ("fieldfed_farm_accuracy_ratio", (("farm", "farm2"), ("part", "decide"))) not in found


def test_quality_is_the_newest_of_a_shared_backbone(tmp_path: Path) -> None:
    mask = Mask(((0, 1),), ((0,),), (2,), (4,)).to_json()
    with Store.open(tmp_path / "fieldfed.db") as store:
        run = store.start_run("{}", 1, DIGEST, mask)
        store.upsert_farm(run, 1, "farm1", 10, 2)
        for label, accuracy in (("model", 0.7), (GUARD, 0.8), ("local", 0.9)):
            reply = EvaluateReply(
                run=run,
                round=1,
                attempt=1,
                farm="farm1",
                label=label,
                base=DIGEST,
                mask=DIGEST,
                examples=10,
                seconds=1.0,
                accuracy=accuracy,
                f1=accuracy - 0.1,
            )
            store.record_report(run, label, 1, 9, reply)
        store.upsert_farm(run, 2, "farm1", 10, 2)  # it slept, and is another node now
    found = scraped(tmp_path)
    assert found[ACTIVE] == 1
    figures_of_it = {
        (name.removeprefix("fieldfed_farm_"), dict(labels).get("part")): value
        for (name, labels), value in found.items()
        if ("farm", "farm1") in labels
    }
    assert figures_of_it.pop(("last_seen_timestamp_seconds", None)) <= time.time()
    assert figures_of_it == {
        ("accuracy_ratio", "test"): 0.7,
        ("accuracy_ratio", "decide"): 0.8,
        ("f1_ratio", "test"): pytest.approx(0.6),
        ("f1_ratio", "decide"): pytest.approx(0.7),
    }


def test_a_rollout_that_does_not_run(copied: Path) -> None:
    share = "fieldfed_rollout_share_ratio", (("channel", STABLE),)
    with Versions.open(copied / "registry" / "registry.db") as rows:
        going = rows.rollout(STABLE)
        assert going is not None
        for state, shown in (("paused", 0.5), ("done", 1.0), ("aborted", 0.0)):
            rows.put_rollout(going.changed(state=state, stage=1))
            found = scraped(copied)
            assert found[share] == shown
            assert found["fieldfed_rollout_state", (("channel", STABLE), ("state", state))] == 1


# --- what is not there, or damaged ---------------------------------------------------------------


def test_an_empty_folder(tmp_path: Path) -> None:
    found = scraped(tmp_path)
    assert up(found) == dict.fromkeys(SOURCES, 0.0)
    assert {name for name, _ in found} == {"fieldfed_build_info", "fieldfed_up_source"}
    assert not list(tmp_path.iterdir()), "looking must leave nothing behind"


def test_a_store_without_a_run(tmp_path: Path) -> None:
    Store.open(tmp_path / "fieldfed.db").close()
    found = scraped(tmp_path)
    assert [name for name, value in up(found).items() if value] == list(SOURCES[:5])
    assert found["fieldfed_rounds_total", (("outcome", "committed"),)] == found[ACTIVE] == 0
    assert not any(
        name.startswith(("fieldfed_run_number", "fieldfed_round_n")) for name, _ in found
    )
    with serving(tmp_path) as server:
        assert ask(server, "/readyz").status == 200


def overwritten(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def broken(statement: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("PRAGMA foreign_keys = OFF")
            db.execute(statement)

    return damage


@pytest.mark.parametrize(
    ("damage", "down"),
    [
        (overwritten, SOURCES[:5]),
        (cut_off, SOURCES[:5]),
        (broken("DROP TABLE reports"), ("farms",)),
        (broken("DROP TABLE rejections"), ("replies",)),
        (broken("UPDATE masks SET json = '[]'"), ("model",)),
        (broken("UPDATE scores SET heads = x'00'"), ("model",)),
        (broken("PRAGMA user_version = 99"), SOURCES[:5]),
    ],
)
def test_a_damaged_store_takes_away_only_what_it_told(
    copied: Path, damage: Callable[[Path], None], down: tuple[str, ...]
) -> None:
    before = scraped(copied)
    damage(copied / "fieldfed.db")
    found = scraped(copied)
    assert {name for name, value in up(found).items() if not value} == set(down)
    same = {key for key, value in found.items() if before[key] == value}
    assert {name for name, _ in found.keys() - same} <= {
        "fieldfed_up_source",
        "fieldfed_store_size_bytes",
    }


def test_a_damaged_registry_or_certificate(copied: Path) -> None:
    overwritten(copied / "registry" / "registry.db")
    overwritten(copied / telemetry.NAME)
    (copied / "identity" / "server.crt").write_text("no certificate")
    down = {name for name, value in up(scraped(copied)).items() if not value}
    assert down == {"registry", "telemetry", "certificates"}


def test_a_damaged_line_in_the_list_of_certificates(copied: Path) -> None:
    issued = copied / "identity" / "issued.jsonl"
    issued.write_bytes(
        issued.read_bytes() + b'{"farm": '
    )  # cut off by a crash: nobody was given it
    assert up(scraped(copied))["certificates"] == 1
    issued.write_bytes(issued.read_bytes() + b"\n")
    assert up(scraped(copied))["certificates"] == 0
    issued.unlink()
    assert up(scraped(copied))["certificates"] == 0


def test_certificates_are_read_without_private_keys(copied: Path) -> None:
    for name in ("ca.key", "server.key"):
        (copied / "identity" / name).unlink()
    assert up(scraped(copied))["certificates"] == 1


def test_a_fault_is_logged_once_and_so_is_its_end(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collector, store = StateCollector(copied), copied / "fieldfed.db"
    store.rename(copied / "away")
    with caplog.at_level(logging.INFO, "server.metrics"):
        for _ in range(3):
            collector.collect()
        (copied / "away").rename(store)
        collector.collect()
        collector.collect()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "no database at" in caplog.messages[0]


def test_reading_takes_no_longer_than_it_may(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "READ_SECONDS", 0.2)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    begin = time.monotonic()
    with (
        pytest.raises(StateError, match="interrupted"),
        reading(Figures, copied / "fieldfed.db") as opened_figures,
    ):
        opened_figures._select(endless)
    assert time.monotonic() - begin < 5


def test_a_scrape_sees_one_instant(copied: Path) -> None:
    with reading(Figures, copied / "fieldfed.db") as seen:
        run = seen.newest_run()
        with Store.open(copied / "fieldfed.db") as store:
            store.start_run("{}", 1, DIGEST, latest(store).mask_json)
            assert latest(store) != run
        assert seen.newest_run() == run


# --- over HTTP -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str
    text: str
    headers: Headers


@contextmanager
def serving(folder: Path) -> Iterator[MetricsServer]:
    server = MetricsServer(MetricsConfig(port=free_port()), folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def served(lab: Lab) -> Iterator[MetricsServer]:
    with serving(lab.server_dir) as server:
        yield server


def port_of(server: MetricsServer) -> int:
    return int(server.server_address[1])


def ask(
    server: MetricsServer, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> Answer:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)) as opened:
        opened.request(method, path, headers=dict(headers or {}))
        found = opened.getresponse()
        kind = found.headers["Content-Type"]
        return Answer(found.status, kind, found.read().decode(), found.headers)


def test_figures_over_http(served: MetricsServer, lab: Lab) -> None:
    answer = ask(served, "/metrics")
    assert (answer.status, answer.kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert parsed(answer.text) == scraped(lab.server_dir)
    assert ask(served, "/metrics?name[]=x").text == answer.text


def test_figures_as_prometheus_asks_for_them(served: MetricsServer, lab: Lab) -> None:
    wanted = (
        "application/openmetrics-text;version=1.0.0;q=0.5,"
        "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    )
    answer = ask(served, "/metrics", headers={"Accept": wanted})
    assert answer.kind.startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    assert parsed(answer.text, openmetrics_families) == scraped(lab.server_dir)


def test_a_wish_that_makes_no_sense_gets_text(served: MetricsServer) -> None:
    for wish in ("application/openmetrics-text; version=x", ";;;,,", "text/plain;version=..;q"):
        answer = ask(served, "/metrics", headers={"Accept": wish})
        assert (answer.status, answer.kind.split(";")[0]) == (200, "text/plain")


def test_head_has_no_body(served: MetricsServer) -> None:
    answer = ask(served, "/metrics", "HEAD")
    assert (answer.status, answer.text) == (200, "")
    assert int(answer.headers["Content-Length"]) > 1000
    assert ask(served, "/healthz", "HEAD").status == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/../server.toml", "/fieldfed.db"])
def test_nothing_else_is_there(served: MetricsServer, path: str) -> None:
    answer = ask(served, path)
    assert answer.status == 404
    assert "/metrics" in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(served: MetricsServer, method: str) -> None:
    answer = ask(served, "/metrics", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_ready_where_the_store_can_be_read(served: MetricsServer) -> None:
    assert (ask(served, "/healthz").status, ask(served, "/readyz").status) == (200, 200)


def test_not_ready_says_why_in_a_line(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert ask(server, "/healthz").status == 200
        assert ask(server, "/metrics").status == 200
        answer = ask(server, "/readyz")
        assert answer.status == 503
        assert "no database at" in answer.text
        assert answer.text.count("\n") == 1
        overwritten(tmp_path / "fieldfed.db")
        answer = ask(server, "/readyz")
        assert answer.status == 503
        assert "not a database" in answer.text


def test_who_says_nothing_is_cut_off(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 0.3)
    with serving(lab.server_dir) as server:
        address = "127.0.0.1", port_of(server)
        with closing(socket.create_connection(address, timeout=20)) as slow:
            for letter in b"GET /metr":
                slow.sendall(bytes([letter]))  # a byte now and then keeps no connection open
                time.sleep(0.01)
            assert slow.recv(100) == b""
        assert ask(server, "/healthz").status == 200


def test_who_comes_when_all_places_are_taken_is_sent_away(lab: Lab) -> None:
    with serving(lab.server_dir) as server, ExitStack() as opened:
        address = "127.0.0.1", port_of(server)
        for _ in range(exposition.MOST_REQUESTS):
            opened.enter_context(closing(socket.create_connection(address, timeout=20)))
        wait_until(lambda: server._places._value == 0, 10, "all places taken")
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(server, "/healthz")
        opened.close()
        wait_until(lambda: server._places._value == exposition.MOST_REQUESTS, 10, "places free")
        assert ask(server, "/healthz").status == 200


def test_a_port_that_is_taken(lab: Lab, served: MetricsServer) -> None:
    with pytest.raises(LaunchError, match=r"choose another port in \[metrics\]"):
        MetricsServer(MetricsConfig(port=port_of(served)), lab.server_dir)


def test_other_machines_are_not_listened_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[metrics\] host '0.0.0.0' is not on this machine"):
        MetricsServer(MetricsConfig(host="0.0.0.0"), tmp_path)


# --- a process of its own ------------------------------------------------------------------------


def test_it_is_off_unless_there_is_a_section() -> None:
    assert ServerConfig().metrics is None
    config = ServerConfig.model_validate({"metrics": {}}).metrics
    assert config is not None
    assert (config.host, config.port) == ("127.0.0.1", 9464)


def test_up_starts_and_ends_it(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, shown = free_port(), free_port()
    (copied / "server.toml").write_text(f"[server]\nport = {port}\n[metrics]\nport = {shown}\n")
    web = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]

    def stand_in(*_: object) -> Child:
        return Child("stand-in", lambda: web, copied / "stand-in.log")

    monkeypatch.setattr(launch, "_superlink", stand_in)
    monkeypatch.setattr(launch, "_superexec", stand_in)
    config = load_settings(ServerConfig, copied / "server.toml")
    with launch.serve(config, copied):
        wait_for_port("127.0.0.1", shown, 30)
        with closing(http.client.HTTPConnection("127.0.0.1", shown, timeout=20)) as opened_http:
            opened_http.request("GET", "/metrics")
            text = opened_http.getresponse().read().decode()
        assert up(parsed(text)) == dict.fromkeys(SOURCES, 1.0)
    assert port_is_free("127.0.0.1", shown)
    assert "figures are at http://127.0.0.1" in (copied / "logs" / "metrics.log").read_text()


def test_without_a_section_the_program_says_so(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("seed = 1\n")
    command = [sys.executable, "-P", "-m", "server.metrics", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "has no [metrics]" in done.stderr
