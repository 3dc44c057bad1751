"""A few random kills; ``make chaos`` does hundreds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(300)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.lab.chaos", str(tmp_path), "6", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == figures["resumed"] == 6
    assert figures["double_counted"] == 0
    assert figures["weights_equal"] is True
    assert figures["rounds_redone_max"] <= 1
