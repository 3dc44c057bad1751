"""The rooms: who may import whom, where Flower may be named, what leaves no trace of pickles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for room in ("common", "server", "client") for path in (ROOT / room).rglob("*.py")
)
FLOWER = {
    "server/app.py",
    "client/app.py",
    "common/wire.py",
    "server/launch.py",
    "client/launch.py",
}
FORBIDDEN = {"common": {"server", "client"}, "server": {"client"}, "client": {"server"}}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_in_their_room(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert not imported(path) & FORBIDDEN[room]
    if str(path.relative_to(ROOT)) not in FLOWER:
        assert "flwr" not in imported(path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_read_or_written(path: Path) -> None:
    text = path.read_text()
    assert not imported(path) & {"pickle", "dill", "cloudpickle", "joblib"}
    assert "torch.save(" not in text
    assert "torch.load(" not in text
    assert "allow_pickle=True" not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_what_devices_and_status_need_imports_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['flwr'] = None; "
        "import common.errors, common.settings, common.spec, common.files, common.messages, "
        "common.mask, common.pixels, common.manifest, common.objects, client.hub, client.infer, "
        "client.watch, client.health, client.discovery, client.ledger, client.figures, "
        "common.portable, server.status, server.hub, server.metrics, server.bridge, "
        "client.bench, client.footprint, client.agent, client.camera, server.page, "
        "client.doctor, server.doctor"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
