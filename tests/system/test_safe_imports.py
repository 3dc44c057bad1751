"""Whatever is called like our modules, in the working directory or in an app, ours is loaded.

A farm goes further: it refuses a run that brings code at all.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.system.conftest import ROOT, Plant, set_traps, write_bundle
from tests.waiting import wait_until

pytestmark = pytest.mark.processes

SAID = "refused the bundle of a run, and ran nothing of it"
HOSTILE = """
from pathlib import Path
from flwr.clientapp import ClientApp
Path({mark!r}).open("a").write("hostile " + __file__)
app = ClientApp()
"""


def hostile(folder: Path, mark: Path) -> Path:
    """An app as Flower's own examples are made: its code is in the bundle."""
    bundle = write_bundle(folder, client="hostile:app")
    (bundle / "hostile.py").write_text(HOSTILE.format(mark=str(mark)))
    return bundle


def told(plant: Plant, farm: str) -> bool:
    return SAID in plant.log(farm, "clientapp")


@pytest.mark.parametrize("kind", ["traps", "hostile", "other"])
def test_a_run_that_brings_code_or_names_other_code_is_refused(
    plant: Plant, tmp_path: Path, kind: str
) -> None:
    if kind == "hostile":
        bundle = hostile(tmp_path / "app", plant.mark)
    elif kind == "traps":
        bundle = write_bundle(tmp_path / "app")
        set_traps(bundle, plant.mark)
    else:
        bundle = write_bundle(tmp_path / "app", client="standin_other:app")
        text = HOSTILE.format(mark=str(plant.mark))
        (plant.folder / "standins" / "standin_other.py").write_text(text)
    report = plant.run([{"kind": "hello"}], bundle, f"refused-{kind}")
    assert Path(report["server.app"]) == ROOT / "server" / "app.py"
    errors = [item["error"] for item in report["steps"][0]]
    expected = "it names 'standin_other:app'" if kind == "other" else "it carries '"
    assert len(errors) == len(plant.farms)
    assert all(expected in error for error in errors), errors
    for farm in plant.farms:
        wait_until(partial(told, plant, farm), 20, SAID)
    marks = plant.mark.read_text() if plant.mark.exists() else ""
    assert not marks, marks


def test_the_same_run_without_code_is_answered(plant: Plant, bundle: Path) -> None:
    report = plant.run([{"kind": "hello"}], bundle, "plain")
    assert {item["reply"]["farm"] for item in report["steps"][0]} == set(plant.farms)


def test_our_server_app_is_the_one_that_runs(plant: Plant, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "app", server="server.app:app")
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
