"""What promtool says of the alerts in deploy/prometheus, and of a real run's figures."""

import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from server.metrics import StateCollector
from tests.lab.network import Lab

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("promtool") is None,
        reason="promtool, which comes with Prometheus, is not on this machine",
    ),
]

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = sorted(str(path.relative_to(PROMETHEUS)) for path in PROMETHEUS.glob("rules/*.yml"))
TESTS = sorted(str(path.relative_to(PROMETHEUS)) for path in PROMETHEUS.glob("tests/*.yml"))


def promtool(*arguments: str, text: str | None = None) -> str:
    """Run it to its end; returns what it said."""
    done = subprocess.run(
        ["promtool", *arguments],
        input=text,
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_configuration_is_valid() -> None:
    assert f"{len(RULES)} rule files found" in promtool("check", "config", "prometheus.yml")


def test_the_rules_are_valid() -> None:
    assert promtool("check", "rules", "--lint-fatal", *RULES).count("SUCCESS") == len(RULES)


@pytest.mark.parametrize("name", TESTS)
def test_alerts_fire_when_they_should(name: str) -> None:
    assert "SUCCESS" in promtool("test", "rules", name)


def test_a_day_that_is_not_clean_is_told(tmp_path: Path) -> None:
    text = (PROMETHEUS / "tests" / "clean.yml").read_text()
    up = 'up{job="fieldfed", instance="127.0.0.1:9464"}\n        values: '
    assert f"{up}1x1440" in text
    changed = text.replace(f"{up}1x1440", f"{up}1x700 0x10 1x729")
    path = tmp_path / "clean.yml"
    path.write_text(changed.replace("../rules", str(PROMETHEUS / "rules")))
    with pytest.raises(AssertionError, match="FieldfedServerDown"):
        promtool("test", "rules", str(path))


def test_the_figures_of_a_run_are_as_prometheus_wants_them(tmp_path: Path) -> None:
    lab = Lab(tmp_path, prune_heads=0.4)
    lab.run()
    text = generate_latest(StateCollector(lab.server_dir)).decode()
    assert "fieldfed_replies_total" in text
    assert promtool("check", "metrics", text=text) == ""
