"""docker-compose, which brings the schema of the compose specification, takes our file."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

COMPOSE = shutil.which("docker-compose")
FILE = Path(__file__).parents[2] / "deploy" / "compose.yaml"

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(COMPOSE is None, reason="'docker-compose' is not installed"),
]


def config(file: Path) -> subprocess.CompletedProcess[str]:
    profiles = ["--profile", "front", "--profile", "farm"]
    command = [str(COMPOSE), "--file", str(file), *profiles, "config"]
    env = os.environ | {"COMPOSE_PROJECT_NAME": "fieldfed"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=env
    )


def test_the_file_is_what_the_specification_allows() -> None:
    done = config(FILE)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == {
        *yaml.safe_load(FILE.read_text())["services"]
    }


def test_a_file_that_it_does_not_allow_is_refused(tmp_path: Path) -> None:
    changed = yaml.safe_load(FILE.read_text())
    changed["services"]["server"]["mem_limits"] = "4g"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(changed))
    done = config(tmp_path / "compose.yaml")
    assert done.returncode != 0
    assert "mem_limits" in done.stderr
