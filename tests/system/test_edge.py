"""A device that only classifies: a clean environment with the edge extra, and no torch in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from client.portable import write_portable
from client.serving import Serving
from tests.lab.bundles import CLASSES, photographs_in, serve
from tests.lab.versions import two_versions
from tests.system.conftest import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.system, pytest.mark.timeout(600)]


def test_a_clean_environment_classifies_without_torch(tmp_path: Path) -> None:
    registry, serving = two_versions(tmp_path / "server"), Serving(tmp_path / "serving")
    torch.manual_seed(0)
    classifier = nn.Linear(registry.manifest(2).spec.width, len(CLASSES)).requires_grad_(False)
    serve(serving, registry, 2, classifier)
    write_portable(serving, tmp_path / "apple.bundle")
    folder = photographs_in(tmp_path / "camera")

    # setuptools builds in the folder: not in ours
    copy = tmp_path / "fieldfed"
    files = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(["git", *files], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    device = tmp_path / "device"
    subprocess.run([sys.executable, "-m", "venv", device], check=True, timeout=120)
    options = ["install", "--quiet", "--disable-pip-version-check"]
    pins = ["-c", str(copy / "constraints.txt"), f"{copy}[edge]"]
    subprocess.run([device / "bin" / "pip", *options, *pins], check=True, timeout=300)

    lacking = (
        "import importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('flwr')"
    )
    subprocess.run([device / "bin" / "python", "-c", lacking], check=True, timeout=60)
    command = [device / "bin" / "fieldfed-client"]
    options = ["classify", str(tmp_path / "apple.bundle"), str(folder), "--json"]
    done = subprocess.run([*command, *options], check=True, timeout=60, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["image"]).name for line in lines] == [f"img{n}.png" for n in range(4)]
    refused = subprocess.run(
        [*command, "serving", str(tmp_path)], check=False, timeout=60, capture_output=True
    )
    assert refused.returncode == 2
    assert b"this command needs" in refused.stderr
    assert b"fieldfed[client]" in refused.stderr
