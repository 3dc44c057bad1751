"""A few updates that are killed at random, half of them with a power cut; many more in a benchmark.

They run in a program of their own: it forks, which threads of other tests would not survive.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.objects import PIECE_BYTES

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import json, sys
from pathlib import Path
from tests.benchmarks.updater import kill
print(json.dumps(kill(Path(sys.argv[1]), 8, int(sys.argv[2]), power_cut=sys.argv[2] != "0")))
"""


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.system), 1])
def test_a_verified_bundle_serves_after_every_kill(tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["failures"] == []
    assert (figures["kills"], figures["verified"]) == (8, 8)
    # what was on its way into memory, and the last piece on disk
    assert figures["resent_bytes_max"] <= 2 * PIECE_BYTES
