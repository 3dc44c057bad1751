"""What promtool says of a device's figures."""

import shutil
import subprocess

import pytest
from prometheus_client import generate_latest

from tests.client.test_figures import STATE, TELEMETRY, told

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        shutil.which("promtool") is None,
        reason="promtool, which comes with Prometheus, is not on this machine",
    ),
]


def test_the_figures_of_a_device_are_as_prometheus_wants_them() -> None:
    text = generate_latest(told(STATE, TELEMETRY)).decode()
    assert text.count("# TYPE fieldfed_device_") == 6
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
