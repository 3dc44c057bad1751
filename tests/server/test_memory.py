"""The server's memory does not grow with the number of replies."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ALLOWED_GROWTH = 100_000_000


def peak_bytes(folder: Path, farms: int) -> int:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.lab.crowd", str(folder), str(farms)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.timeout(600)
@pytest.mark.system
def test_200_replies_of_20_megabytes_need_no_more_memory_than_10(tmp_path: Path) -> None:
    few = peak_bytes(tmp_path / "few", 10)
    many = peak_bytes(tmp_path / "many", 200)
    print(f"peak resident: {few / 1e6:.0f} MB with 10 replies, {many / 1e6:.0f} MB with 200")
    assert many - few <= ALLOWED_GROWTH
