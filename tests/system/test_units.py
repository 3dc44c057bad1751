"""What systemd itself says of our units: it takes them, and how exposed it finds them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ANALYZE = shutil.which("systemd-analyze")
UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
MOST_EXPOSED = 2.5
"""Of 10; what a unit without any such setting has is 9.6."""
NEWER = {"RestartSteps", "RestartMaxDelaySec"}
"""Known from systemd 254 on; older ones say so and go on."""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(ANALYZE is None, reason="'systemd-analyze' is not installed (systemd)"),
]

each = pytest.mark.parametrize(
    ("name", "instance"),
    [
        ("fieldfed-server.service", "fieldfed-server.service"),
        ("fieldfed-client@.service", "fieldfed-client@apple.service"),
        ("fieldfed-centre@.service", "fieldfed-centre@spring.service"),
    ],
)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ANALYZE), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def installed(folder: Path, name: str, instance: str, text: str | None = None) -> str:
    """A unit as it would be on a machine where our programs lie beside this Python."""
    here = str(Path(sys.executable).parent)
    text = text or (UNITS / name).read_text()
    (folder / instance).write_text(text.replace("/opt/fieldfed/.venv/bin", here))
    return str(folder / instance)


def complaints(path: str) -> set[str]:
    done = analyze("verify", "--man=no", path)
    lines = {line.removeprefix(path) for line in done.stderr.splitlines() if path in line}
    assert done.returncode == 0, done.stderr
    return {line for line in lines if not any(f"'{name}'" in line for name in NEWER)}


@each
def test_systemd_takes_it(tmp_path: Path, name: str, instance: str) -> None:
    assert complaints(installed(tmp_path, name, instance)) == set()


@each
def test_a_key_that_systemd_does_not_know_is_told(tmp_path: Path, name: str, instance: str) -> None:
    text = (UNITS / name).read_text().replace("PrivateTmp=", "PrivateTemp=")
    assert "PrivateTemp" in str(complaints(installed(tmp_path, name, instance, text)))


@each
def test_it_is_not_exposed(tmp_path: Path, name: str, instance: str) -> None:
    path = installed(tmp_path, name, instance)
    said = analyze("security", "--offline=true", "--no-pager", path).stdout
    found = re.search(r"exposure level for \S+: ([\d.]+)", said)
    assert found is not None, said
    print(f"{instance}: exposure {found[1]} of 10")
    assert float(found[1]) <= MOST_EXPOSED, said
