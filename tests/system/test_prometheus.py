"""A real Prometheus watches a real run: every query of every dashboard finds something there."""

import json
import math
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.processes import Child, free_port, stop_all, wait_for_port
from deploy.grafana import names
from server import rollout
from server.registry import STABLE, Registry
from server.rollout import RolloutPlan
from tests.lab.boards import Asked, asked, chosen_from
from tests.lab.promql import selectors
from tests.lab.versions import add_version, model_of
from tests.system.mosquitto import MOSQUITTO, Mosquitto
from tests.system.site import FARMS, Site, call, open_site, toml
from tests.waiting import wait_until

PROMETHEUS = shutil.which("prometheus")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROMETHEUS is None, reason="'prometheus' is not on this machine"),
    pytest.mark.skipif(MOSQUITTO is None, reason="'mosquitto' is not on this machine"),
]

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
SECOND = "1s"
ALWAYS = {
    "alert": "FieldfedAnswers",
    "expr": 'up{job="fieldfed"} == 1',
    "labels": {"severity": "ticket"},
}
"""Fires while all is well, so that what shows alerts has some to show."""

NEEDS_THERMOMETER = {str(names.Device.TEMPERATURE)}
"""Names of what many machines cannot measure."""
ASKED = [*asked(), *chosen_from()]


@dataclass(frozen=True)
class Answer:
    """A series, and its newest value."""

    labels: dict[str, str]
    value: float


@dataclass
class Watch:
    """A Prometheus, and the network that it watches."""

    site: Site
    port: int
    shown: str
    """Where the server shows its figures: what Prometheus calls the instance."""

    def get(self, path: str, **query: str) -> Any:
        """What its HTTP interface answers."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as found:
            answer = json.load(found)
        assert answer["status"] == "success", answer
        return answer["data"]

    def ask(self, expression: str) -> list[Answer]:
        """The values that an expression has now, those that are numbers."""
        values = {
            "$instance": self.shown,
            "$part": "decide",
            "$device": FARMS[0],
            "$__range": "30m",
        }
        text = re.sub(r"\$\w+", lambda found: values[found[0]], expression)
        data = self.get("query", query=text)
        assert data["resultType"] == "vector"
        found = [Answer(one["metric"], float(one["value"][1])) for one in data["result"]]
        return [one for one in found if not math.isnan(one.value)]

    def alerts(self) -> dict[str, str]:
        """Alerts that are pending or firing, by name."""
        found = self.get("alerts")["alerts"]
        return {one["labels"]["alertname"]: one["state"] for one in found}

    def rules(self) -> list[dict[str, Any]]:
        """Every rule that was loaded."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]


def settings_in(folder: Path, shown: str, device: str) -> Path:
    """The settings and rules of deploy/prometheus, but every second, and with one rule more."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": SECOND, "evaluation_interval": SECOND}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [shown]}]
    own = [{"targets": [device], "labels": {"device": FARMS[0]}}]
    config["scrape_configs"].append({"job_name": names.DEVICE_JOB, "static_configs": own})
    (folder / "rules").mkdir(parents=True)
    for path in DEPLOY.glob("rules/*.yml"):
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
        (folder / "rules" / path.name).write_text(yaml.safe_dump(rules))
    more = {"groups": [{"name": "more", "rules": [ALWAYS]}]}
    (folder / "rules" / "more.yml").write_text(yaml.safe_dump(more))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def start_prometheus(folder: Path, shown: str, device: str, stack: ExitStack) -> int:
    """Start one that keeps its data in the folder; returns its port."""
    port, settings = free_port(), settings_in(folder, shown, device)
    command = [
        *(str(PROMETHEUS), f"--config.file={settings}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    child = Child("prometheus", lambda: command, folder / "prometheus.log")
    stack.callback(stop_all, [child], 15)
    child.start()
    wait_for_port("127.0.0.1", port, 60, child)
    wait_until(lambda: is_ready(port), 60, f"Prometheus: {child.last_words()}")
    return port


def is_ready(port: int) -> bool:
    """Whether a Prometheus answers queries, which it does some time after it listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=20):
            return True
    except urllib.error.HTTPError:
        return False


def fill_registry(site: Site) -> None:
    """A version in use, another on its way."""
    folder = Path(site.server)
    call("fieldfed-server", "registry", "publish", site.server)
    call("fieldfed-server", "registry", "promote", site.server, "1", STABLE)
    with Registry.open(folder) as registry:
        second = add_version(registry, *model_of()).counter
        rollout.start(registry, RolloutPlan(channel=STABLE, version=second, stages=(0.1, 1.0)))


def join(site: Site, name: str) -> None:
    """Make a farm that runs a member of the network."""
    folder, asks, given = (str(site.root / part) for part in (f"farms/{name}", "csr", "member"))
    call("fieldfed-client", "request", folder, "--out", asks)
    call("fieldfed-server", "certify", site.server, asks, "--out", given)
    call("fieldfed-client", "join", folder, given)


def scrapes(watch: Watch) -> float:
    """How often the server was asked so far."""
    found = watch.ask('count_over_time(up{instance="$instance"}[1h])')
    return found[0].value if found else 0


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A network that aligned, pruned, published and served on a device while it was watched."""
    root = tmp_path_factory.mktemp("watched")
    shown, hub, own = (free_port() for _ in range(3))
    with ExitStack() as stack:
        mosquitto = Mosquitto(root / "broker")
        mosquitto.start()
        stack.callback(mosquitto.stop)
        broker = {"host": "127.0.0.1", "port": mosquitto.port}
        settings: dict[str, dict[str, object]] = {
            "metrics": {"port": shown},
            "hub": {"port": hub, "names": ["localhost"]},
            "broker": dict(broker),
        }
        more = {FARMS[0]: toml({"broker": dict(broker), "metrics": {"port": own}})}
        site = stack.enter_context(open_site(root, settings=settings, more=more))
        wait_for_port("127.0.0.1", shown, 60, site.up)
        address = f"127.0.0.1:{shown}"
        device = f"127.0.0.1:{own}"
        port = start_prometheus(root / "prometheus", address, device, stack)
        watch = Watch(site, port, address)
        wait_until(lambda: scrapes(watch) > 1, 60, "a first look at the server")
        join(site, FARMS[0])
        assert "run 1 is done" in call("fieldfed-server", "train", site.server)
        fill_registry(site)
        serving = f"{names.Device.VERSION} > 0"
        wait_until(lambda: watch.ask(serving), 180, "a version in use on the device")
        waiting = f"{names.Server.DEVICE_OUTBOX}"
        wait_until(lambda: watch.ask(waiting), 90, "a word of the device over the broker")
        channel = 'fieldfed_rollout_share_ratio{instance="$instance"}'
        wait_until(lambda: watch.ask(channel), 60, "a look at the rollout")
        before = scrapes(watch)
        wait_until(lambda: scrapes(watch) > before + 2, 60, "some more looks")
        yield watch


def lacking(query: Asked) -> str:
    """Why a query cannot find anything here; empty where it can."""
    if any(one.name in NEEDS_THERMOMETER for one in selectors(query.expression)):
        return "there may be no thermometer"
    return ""


HERE = [query for query in ASKED if not lacking(query)]
NOT_HERE = [query for query in ASKED if lacking(query)]


@pytest.mark.parametrize("query", HERE, ids=str)
def test_a_dashboard_finds_what_it_asks_for(query: Asked, watch: Watch) -> None:
    found = watch.ask(query.expression)
    assert found, query.expression
    for one in found:
        assert query.shown <= one.labels.keys(), "the legend names a label that is not there"


@pytest.mark.parametrize("query", NOT_HERE, ids=str)
def test_what_may_not_be_here_is_asked_for_in_words_that_prometheus_knows(
    query: Asked, watch: Watch
) -> None:
    watch.ask(query.expression)


def test_what_prometheus_has_is_what_the_store_says(watch: Watch) -> None:
    with watch.site.store as store:
        committed = [row for row in store.rounds(1) if row.state == "committed"]
        told = {row.farm: row.accuracy for row in store.reports(1, "model")}
    rounds = watch.ask('fieldfed_round_duration_seconds_count{instance="$instance"}')
    assert [one.value for one in rounds] == [len([row for row in committed if row.kind == "align"])]
    accuracy = watch.ask('fieldfed_farm_accuracy_ratio{instance="$instance", part="test"}')
    assert {one.labels["farm"]: one.value for one in accuracy} == pytest.approx(told)
    assert set(told) == set(FARMS)


def test_every_rule_is_judged_and_only_the_one_that_should_fires(watch: Watch) -> None:
    rules = watch.rules()
    assert len(rules) > 12
    wrong = {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"}
    assert not wrong
    assert watch.alerts() == {ALWAYS["alert"]: "firing"}


def test_a_server_that_ends_is_seen(watch: Watch) -> None:
    stop_all([watch.site.up], 15)
    wait_until(
        lambda: watch.alerts().get("FieldfedServerDown") == "pending", 60, "a sign of the alert"
    )
    wait_until(lambda: set(watch.alerts()) == {"FieldfedServerDown"}, 60, "the end of the other")
