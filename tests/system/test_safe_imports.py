"""Whatever is called like our modules, in the working directory or in an app, ours is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import ROOT, Plant, set_traps, write_bundle
from tests.waiting import wait_until

pytestmark = pytest.mark.processes


def test_an_app_with_modules_named_like_ours_does_not_replace_them(
    plant: Plant, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "app", client="client.app:app")
    set_traps(bundle, plant.mark)
    report = plant.run([{"kind": "hello"}], bundle, "trapped-farm")
    assert Path(report["server.app"]) == ROOT / "server" / "app.py"
    # our farm answers, and it has no images; the trap would have ended the process
    replies = [item["reply"] for item in report["steps"][0]]
    assert [reply["kind"] for reply in replies] == ["refusal"] * len(plant.farms)
    assert {reply["reason"] for reply in replies} == {"data"}
    assert not plant.mark.exists(), plant.mark.read_text()


def test_our_server_app_is_the_one_that_runs(plant: Plant, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "app", server="server.app:app", client="client.app:app")
    set_traps(bundle, plant.mark)
    before = len(plant.log("server", "serverapp"))
    plant.submit([], bundle, "trapped-server")
    # the stand-in's settings are not those of our round loop, which says so
    said = "RunSettings"
    wait_until(lambda: said in plant.log("server", "serverapp")[before:], 60, said)
    assert not plant.mark.exists(), plant.mark.read_text()


def test_the_traps_are_live(plant: Plant) -> None:
    """Without our programs in between, the working directory wins."""
    done = subprocess.run(
        [sys.executable, "-c", "import client.app"],
        cwd=plant.folder / "cwd",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "imported the trap" in done.stderr
    plant.mark.unlink()


def test_our_own_bundle_carries_no_code(plant: Plant) -> None:
    files = [p for p in (plant.network.state_dir / "flower-app").rglob("*") if p.is_file()]
    assert [file.name for file in files] == ["pyproject.toml"]
