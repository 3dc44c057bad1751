"""Alerts for Prometheus name families that exist, say what to do, and each has a test of its own.

That they fire when they should is for promtool to say (tests/system/test_alerts.py).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from typer import Typer
from typer.main import get_command

from client.cli import app as client_app
from common.errors import RejectReason
from common.manifest import Outcome
from common.services import MetricsConfig
from server import telemetry
from server.arrivals import Arrivals
from server.cli import app as server_app
from server.identity import Authority
from server.metrics import STORE, StateCollector
from server.rows import RunState
from server.store import Store
from server.telemetry import Fate, Presence
from server.versions import RolloutState, Versions

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RUNBOOKS = (DEPLOY / "runbooks.md").read_text()

OF_PROMETHEUS = {"up", "ALERTS"}
ENDINGS = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "gauge": ("",),
}
CUTS = ("accepted", "undone")
VALUES = {
    "state": {
        *get_args(RunState),
        *get_args(RolloutState),
        *get_args(Presence),
        "active",
        "paused",
    },
    "outcome": {*get_args(Outcome), *get_args(Fate), "committed", "failed", "reopened", *CUTS},
    "reason": {str(reason) for reason in RejectReason},
    "source": {*STORE, "registry", "telemetry", "certificates"},
    "holder": {"authority", "server", "broker", "farms"},
    "part": {"decide", "test"},
}
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')


def loaded(*names: str) -> Iterable[dict[str, Any]]:
    """What is in YAML files below the folder of Prometheus."""
    for name in names:
        for path in sorted(PROMETHEUS.glob(name)):
            yield yaml.safe_load(path.read_text())


RULES: list[dict[str, Any]] = [
    rule for file in loaded("rules/*.yml") for group in file["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


CASES: list[dict[str, Any]] = [case for file in loaded("tests/*.yml") for case in file["tests"]]
"""Of promtool's tests, from every file."""


def names_in(expression: str) -> set[str]:
    """Names of metrics: whatever is ours or recorded, and what stands before a selector."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(?:on|by|without|ignoring)\s*\([^)]*\)", "", bare)
    ours = re.findall(r"(?<![\w:])(?:fieldfed_\w+|\w+:\w[\w:]*)", bare)
    return {*ours, *re.findall(r"(?<![\w:])([a-zA-Z_][\w:]*)\s*\{", bare)}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """Every family, of a server that has not run yet."""
    folder = tmp_path_factory.mktemp("server")
    Store.open(folder / "fieldfed.db").close()
    (folder / "registry").mkdir()
    Versions.open(folder / "registry" / "registry.db").close()
    Authority.create(folder / "identity", "valley", [])
    Arrivals.open(folder / telemetry.NAME).close()
    found = StateCollector(folder).collect()
    (up,) = [family for family in found if family.name == "fieldfed_up_source"]
    assert all(sample.value == 1 for sample in up.samples), "every source has to be read"
    return found


def test_every_name_is_one_of_a_family(shown: list[Metric]) -> None:
    there = {one.name + ending for one in shown for ending in ENDINGS[one.type]}
    for rule in RULES:
        names = names_in(rule["expr"])
        assert names, rule["expr"]
        assert names <= there | RECORDED | OF_PROMETHEUS, rule["expr"]


def test_every_name_in_the_tests_is_one_of_a_family(shown: list[Metric]) -> None:
    there = {one.name + ending for one in shown for ending in ENDINGS[one.type]}
    for case in CASES:
        for series in case["input_series"]:
            assert names_in(series["series"]) <= there | OF_PROMETHEUS, series["series"]


def test_every_value_of_a_label_may_occur() -> None:
    texts = [rule["expr"] for rule in RULES]
    texts += [series["series"] for case in CASES for series in case["input_series"]]
    for text in texts:
        for label, value in MATCHER.findall(text):
            if label in VALUES:
                assert set(value.split("|")) <= VALUES[label], text


def test_recordings_are_needed() -> None:
    used = {name for rule in RULES for name in names_in(rule["expr"])}
    assert used >= RECORDED


def test_alerts_are_few() -> None:
    assert 8 <= len(ALERTS) <= 12
    assert len(ALERTS) + len(RECORDED) == len(RULES), "a name is there twice"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert re.fullmatch(r"[1-9]\d*[mh]", alert["for"])
    assert alert["labels"] == {"severity": alert["labels"]["severity"]}
    assert alert["labels"]["severity"] in ("page", "ticket")
    told = alert["annotations"]
    assert set(told) == {"summary", "description", "runbook_url"}
    assert told["summary"]
    assert "{{" in told["description"]
    assert told["runbook_url"] == f"deploy/runbooks.md#{name.lower()}"


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", RUNBOOKS, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    assert list(sections()) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_a_section_is_whole(name: str) -> None:
    text = sections()[name]
    assert text.strip().startswith(f"**{ALERTS[name]['labels']['severity']}.**")
    for part in ("Users notice", "Look at", "Mend", "Escalate"):
        assert f"- **{part}:**" in text
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in {one.lower() for one in ALERTS}


def named(app: Typer, path: tuple[str, ...] = ()) -> set[str]:
    """Every command and group of a program."""

    def below(command: Any, words: tuple[str, ...]) -> Iterable[str]:
        yield " ".join(words)
        for name, one in getattr(command, "commands", {}).items():
            yield from below(one, (*words, name))

    return set(below(get_command(app), path))


def test_the_commands_exist() -> None:
    known = named(server_app, ("fieldfed-server",)) | named(client_app, ("fieldfed-client",))
    groups = {" ".join(one.split()[:2]) for one in known if len(one.split()) == 3}
    told = re.findall(r"`(fieldfed-(?:server|client)\s[^`]+)`", RUNBOOKS)
    assert len(told) > len(ALERTS)
    for text in told:
        words = text.split()
        assert " ".join(words[: 3 if " ".join(words[:2]) in groups else 2]) in known, text


# --- tests of promtool ---------------------------------------------------------------------------


def minutes(text: str) -> int:
    """A time like 1h30m."""
    found = re.findall(r"(\d+)([mhd])", text)
    return sum(int(number) * {"m": 1, "h": 60, "d": 1440}[unit] for number, unit in found)


def fires(name: str, case: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """What a case expects of an alert, by minute."""
    return {
        minutes(one["eval_time"]): one["exp_alerts"]
        for one in case.get("alert_rule_test", ())
        if one["alertname"] == name
    }


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_tested_just_before_it_fires_and_just_after(name: str) -> None:
    close = []
    for found in (fires(name, case) for case in CASES):
        for minute, expected in found.items():
            before = [found[minute - step] for step in (1, 2) if minute - step in found]
            if expected and [] in before:
                close.append(expected)
    assert close
    told = {"summary", "description", "runbook_url"}
    for expected in close:
        for one in expected:
            assert one["exp_labels"]["severity"] == ALERTS[name]["labels"]["severity"]
            assert set(one["exp_annotations"]) == told
            assert one["exp_annotations"]["runbook_url"].endswith(f"#{name.lower()}")


def test_days_on_which_nothing_may_fire() -> None:
    silent = [
        one
        for case in CASES
        for one in case.get("promql_expr_test", ())
        if one["expr"].startswith("count_over_time(ALERTS") and not one["exp_samples"]
    ]
    assert len(silent) > len(ALERTS) // 2
    assert any(minutes(one["eval_time"]) >= minutes("1d") for one in silent)


def test_the_server_is_asked_where_it_shows_its_figures() -> None:
    (settings,) = loaded("prometheus.yml")
    config = MetricsConfig()
    (job,) = settings["scrape_configs"]
    assert job["job_name"] == "fieldfed"
    assert job["static_configs"] == [{"targets": [f"{config.host}:{config.port}"]}]
    assert settings["rule_files"] == ["rules/*.yml"]
