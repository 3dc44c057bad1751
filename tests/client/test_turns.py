"""Farms of one machine take turns."""

import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from client.turns import turn
from common.errors import StateError

ROOT = Path(__file__).parent.parent.parent

HOLD = """
import sys, time
from pathlib import Path
from typing import IO
from client.turns import turn
with turn(Path(sys.argv[1]), 2):
    print("at work", flush=True)
    time.sleep(60)
"""


def test_no_more_than_the_places_and_a_killed_farm_frees_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    farms = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        streams = [farm.stdout for farm in farms if farm.stdout is not None]
        deadline = time.monotonic() + 30
        at_work: set[IO[bytes]] = set()
        while len(at_work) < 2 and time.monotonic() < deadline:
            at_work |= set(select.select(streams, [], [], 1)[0])
        assert len(at_work) == 2
        (waits,) = set(streams) - at_work
        assert not select.select([waits], [], [], 2)[0], "three farms were at work in two places"
        next(farm for farm in farms if farm.stdout in at_work).kill()
        assert select.select([waits], [], [], 30)[0], "a killed farm kept its place"
    finally:
        for farm in farms:
            farm.kill()
            farm.communicate()


def test_without_a_folder_nobody_waits(tmp_path: Path) -> None:
    started = time.monotonic()
    with turn(None, 1), turn(None, 1):
        pass
    assert time.monotonic() - started < 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StateError, match="file"), turn(file, 1):
        pass
