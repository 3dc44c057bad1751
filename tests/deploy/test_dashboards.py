"""Dashboards are what their program makes of them, ask for what is there, and lead on."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from client.identity import FarmIdentity
from deploy.grafana import dashboards, names, runbooks
from server import rollout
from server.identity import BROKER, Authority
from server.metrics import StateCollector
from server.registry import STABLE
from server.rollout import RolloutPlan
from tests.lab.boards import GRAFANA, Asked, asked, boards, chosen_from, panels
from tests.lab.devices import tell
from tests.lab.network import Lab
from tests.lab.promql import Selector, selectors
from tests.lab.versions import NETWORK, two_versions

Known = Mapping[str, Mapping[str, set[str]]]
"""Values that each label of a series has, by its name."""

PROMETHEUS = GRAFANA.parent / "prometheus"
BOARDS = boards()
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in panels(board)]
NAMES = [f"{name}: {panel['title']}" for name, panel in PANELS]
ASKED = [*asked(), *chosen_from()]

OF_TARGETS = {"job", "instance"}
"""Labels that Prometheus adds."""
OF_NETWORKS = {"farm", "device", "channel", "block", "head", "version", "python"}
"""Labels whose values differ from network to network."""
ELSEWHERE: Known = {
    "up": {"device": set()},
    "ALERTS": {
        "alertname": set(),
        "severity": set(),
        "alertstate": {"pending", "firing"},
    },
    **{str(name): {"device": set(), "direction": {"up", "down"}} for name in names.Device},
}
"""Series that Prometheus makes, and those of a device's own endpoint."""


def rules() -> Iterable[dict[str, Any]]:
    for path in sorted(PROMETHEUS.glob("rules/*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


RULES = {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


# --- files ---------------------------------------------------------------------------------------


def test_files_are_what_the_program_makes() -> None:
    made = dashboards.files()
    assert set(made) == {path.name for path in GRAFANA.glob("*.json")}
    for name, text in made.items():
        same = (GRAFANA / name).read_text() == text
        assert same, f"{name} is not what deploy/grafana makes: give 'make dashboards'"


def test_the_program_makes_the_same_in_any_process() -> None:
    code = "from deploy.grafana.dashboards import files; print(''.join(files().values()), end='')"
    root = str(GRAFANA.parents[1])
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root}
        command = [sys.executable, "-P", "-c", code]
        made = subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
        assert made.stdout.decode() == "".join(dashboards.files().values())


def test_names_of_files_are_those_of_addresses() -> None:
    assert {name: board["uid"] for name, board in BOARDS.items()} == {
        name: f"fieldfed-{name}" for name in ("device", "fleet", "rounds", "runbooks")
    }


# --- panels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=NAMES)
def test_a_panel_says_what_it_shows(board: str, panel: dict[str, Any]) -> None:
    if panel["type"] == "text":
        assert panel["options"]["content"]
        return
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert {json.dumps(one["datasource"]) for one in (panel, *panel["targets"])} == {
        '{"type": "prometheus", "uid": "${datasource}"}'
    }
    variables = {one["name"] for one in BOARDS[board]["templating"]["list"]}
    assert variables >= {"datasource", "instance"}


@pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
def test_panels_lie_beside_each_other(board: dict[str, Any]) -> None:
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
def test_titles_are_there_once(board: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in panels(board)]
    assert sorted(set(titles)) == sorted(titles)


# --- links ---------------------------------------------------------------------------------------


def test_a_link_leads_to_the_runbook_that_it_names() -> None:
    books = {panel["id"]: panel["title"] for panel in panels(BOARDS["runbooks"])}
    told = set()
    for _, panel in PANELS:
        for link in panel.get("links", ()):
            begin = f"/d/{runbooks.UID}?viewPanel="
            assert link["url"].startswith(begin)
            name = books[int(link["url"].removeprefix(begin))]
            assert link["title"] == f"Runbook: {name}"
            told.add(name)
    assert told == set(runbooks.sections()), "an alert that no panel leads to"


def test_every_alert_has_a_runbook_there() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    titles = {panel["title"] for panel in panels(BOARDS["runbooks"]) if panel["type"] == "text"}
    assert titles == alerts
    texts = [one["options"]["content"] for one in panels(BOARDS["runbooks"]) if "content" in one]
    assert not any("](#" in text for text in texts), "a link that leads nowhere in Grafana"


@pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
def test_dashboards_lead_to_each_other(board: dict[str, Any]) -> None:
    assert board["tags"] == ["fieldfed"]
    (link,) = board["links"]
    assert (link["type"], link["tags"]) == ("dashboards", ["fieldfed"])
    assert link["includeVars"]
    assert link["keepTime"]


# --- what is asked -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Every series of a server that has pruned, with versions, a rollout and certificates."""
    lab = Lab(tmp_path_factory.mktemp("lab"), count=2, prune_heads=0.4)
    lab.run()
    with two_versions(lab.server_dir) as registry:
        registry.promote(STABLE, 1)
        rollout.start(registry, RolloutPlan(channel=STABLE, version=2, stages=(0.1, 1.0)))
    authority = Authority.create(lab.server_dir / "identity", NETWORK, [])
    authority.sign(FarmIdentity.create(lab.root / "identity", "farm0").request(), 30)
    broker = lab.server_dir / BROKER
    broker.mkdir()
    authority.certify_broker(broker, ["127.0.0.1"])
    tell(lab.server_dir)
    return known_of(lab.server_dir)


def known_of(folder: Path) -> Known:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    text = generate_latest(StateCollector(folder)).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            of_name = found[sample.name]
            for label, value in sample.labels.items():
                of_name[label].add(value)
    assert found["fieldfed_up_source"]["source"] >= {"runs", "registry", "certificates"}
    return found


def everything(shown: Known) -> Known:
    """With what comes from elsewhere; the name of a recorded series begins with its labels."""
    recorded: dict[str, dict[str, set[str]]] = {
        name: {label: set() for label in [*name.split(":")[0].split("_"), "part"]}
        for name in RECORDED
    }
    return {**shown, **ELSEWHERE, **recorded}


def check(selector: Selector, known: Known) -> None:
    assert selector.name in known, f"nobody shows {selector.name}"
    labels = known[selector.name]
    for matcher in selector.matchers:
        if matcher.label in OF_TARGETS:
            continue
        assert matcher.label in labels, f"{selector.name} has no label {matcher.label}"
        there = labels[matcher.label]
        if there and matcher.label not in OF_NETWORKS and "$" not in matcher.value:
            assert set(matcher.values) <= there, f"{selector.name} has no {matcher}"


@pytest.mark.parametrize("query", ASKED, ids=str)
def test_a_dashboard_asks_for_what_is_shown(query: Asked, shown: Known) -> None:
    known, found = everything(shown), selectors(query.expression)
    assert found
    for selector in found:
        check(selector, known)
    labels = {label for selector in found for label in known[selector.name]}
    assert query.shown <= labels | OF_TARGETS, "the legend shows what is not there"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_asks_for_what_is_shown(name: str, shown: Known) -> None:
    found = selectors(RULES[name])
    assert found
    for selector in found:
        check(selector, everything(shown))


def test_the_table_names_what_is_asked_and_nothing_else(shown: Known) -> None:
    table = {
        str(name)
        for kind in (names.Server, names.Device, names.Recorded, names.Prometheus)
        for name in kind
    }
    assert {one.name for query in ASKED for one in selectors(query.expression)} == table
    assert set(map(str, names.Server)) <= set(shown)
    assert set(map(str, names.Recorded)) <= RECORDED


def test_a_name_or_a_label_that_is_not_there_is_told(shown: Known) -> None:
    known = everything(shown)
    for wrong, why in (
        ("fieldfed_nothing", "nobody shows"),
        ('fieldfed_macs_ratio{farm="oak"}', "has no label farm"),
        ('fieldfed_farm_f1_ratio{part="fit"}', "has no Matcher"),
        ('fieldfed_replies_rejected_total{reason!~"lost|lazy"}', "has no Matcher"),
    ):
        with pytest.raises(AssertionError, match=why):
            check(selectors(wrong)[0], known)


def test_the_clean_day_has_every_series(shown: Known) -> None:
    day = yaml.safe_load((PROMETHEUS / "tests" / "clean_day.yml").read_text())["tests"][0]
    there = [selectors(one["series"])[0] for one in day["input_series"]]
    assert {one.name for one in there} == {"up", *shown}
    known = {**shown, "up": {}}
    for series in there:
        assert {one.label for one in series.matchers} - OF_TARGETS == known[series.name].keys()
        check(series, everything(shown))
    reasons = {one.value for series in there for one in series.matchers if one.label == "reason"}
    assert reasons == shown["fieldfed_replies_rejected_total"]["reason"]


# --- provisioning --------------------------------------------------------------------------------


def test_grafana_is_told_of_the_prometheus_and_of_the_folder() -> None:
    folder = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == settings["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((folder / "dashboards/fieldfed.yaml").read_text())["providers"]
    assert provider["options"]["path"] == "$FIELDFED_DASHBOARDS"
    assert "FIELDFED_DASHBOARDS=" in (GRAFANA.parent / "README.md").read_text()
    jobs = {job["job_name"] for job in settings["scrape_configs"]}
    assert names.SERVER_JOB in jobs
