"""nginx as deploy/nginx/fieldfed.conf sets it up, before a door of a test."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.door import DoorConfig
from common.processes import Child, stop_all, wait_for_port
from tests.lab.door import LabDoor

PROGRAM = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx" / "fieldfed.conf"
LOCAL = "127.0.0.1"
AROUND = """
load_module {module};
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 512; }}
include {folder}/fieldfed.conf;
"""

marks = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.skipif(
        PROGRAM is None or not MODULE.is_file(),
        reason="'nginx' is not installed (nginx-light, libnginx-mod-stream)",
    ),
]


@contextmanager
def nginx(door: DoorConfig, folder: Path, most: int = 256) -> Iterator[None]:
    """The configuration as it is, but for ports, where the log goes and, if said, its limit."""
    folder.mkdir(parents=True, exist_ok=True)
    text = CONFIGURATION.read_text()
    for before, after in {
        "listen 443;": f"listen {LOCAL}:{door.proxy_port};",
        "listen [::]:443;": "",
        f"server {LOCAL}:8443;": f"server {LOCAL}:{door.port};",
        "/var/log/nginx/fieldfed.log": f"{folder}/access.log",
        "fieldfed_address 256;": f"fieldfed_address {most};",
    }.items():
        assert text.count(before) == 1, f"{before!r} is not there once"
        text = text.replace(before, after)
    (folder / "fieldfed.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    around = AROUND.format(folder=folder, user=user, module=MODULE)
    (folder / "nginx.conf").write_text(around)
    command = [str(PROGRAM), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    child = Child("nginx", lambda: command, folder / "nginx.log")
    assert door.proxy_port is not None
    try:
        child.start()
        wait_for_port(LOCAL, door.proxy_port, 30, child)
        yield
    finally:
        stop_all([child])


@pytest.fixture(autouse=True, scope="module")
def behind_nginx() -> Iterator[None]:
    """Every door of a module's tests has nginx before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabDoor, "before", (nginx,))
        yield
