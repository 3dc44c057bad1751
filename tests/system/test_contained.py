"""The operator's page in a network of its own, as a container has one, looked at from outside.

There is no container engine here. What its published port does is a connection to the container's
own address, from another; so does the machine beside it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import ConfigError
from common.processes import Child, stop_all
from tests.conftest import ROOT
from tests.system.namespaces import Machine, machines, missing
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system]

PORT = 9465
SETTINGS: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
CONTAINED: dict[str, str] = SETTINGS["services"]["server"]["environment"]
ASK = """
import http.client, sys
address, method, path, host, origin = sys.argv[1:]
line = http.client.HTTPConnection(address, 9465, timeout=20)
line.request(method, path, headers={"Host": host} | ({"Origin": origin} if origin else {}))
print(line.getresponse().status)
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Machine]]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with machines(["container", "host"]) as made:
        yield made


def page(container: Machine, folder: Path, settings: dict[str, str]) -> Child:
    """The page of a new server there."""
    (folder / "server.toml").write_text("[page]\n")
    command = container.inside(sys.executable, "-P", "-m", "server.page", str(folder))
    env = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    return Child("page", lambda: command, folder / "page.log", env)


@contextmanager
def shown(container: Machine, folder: Path, settings: dict[str, str]) -> Iterator[None]:
    child = page(container, folder, settings)
    try:
        child.start()
        wait_until(lambda: PORT in container.listening(), 90, f"the page: {folder / 'page.log'}")
        yield
    finally:
        stop_all([child], 15)


def answer(pair: list[Machine], host: str, method: str = "GET", origin: str = "") -> int:
    container, outside = pair
    question = (container.address, method, "/sign-in", host, origin)
    command = outside.inside(sys.executable, "-I", "-S", "-c", ASK, *question)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_on_loopback_it_is_out_of_reach(pair: list[Machine], tmp_path: Path) -> None:
    container, outside = pair
    with shown(container, tmp_path, {}):
        assert container.reaches("127.0.0.1", PORT)
        assert not outside.reaches(container.address, PORT)


def test_as_composed_it_answers_to_this_machines_names_alone(
    pair: list[Machine], tmp_path: Path
) -> None:
    with shown(pair[0], tmp_path, CONTAINED):
        assert answer(pair, f"localhost:{PORT}") == 200
        assert answer(pair, "127.0.0.1:19465") == 200  # a tunnel's port is another
        for foreign in (f"{pair[0].address}:{PORT}", "0.0.0.0:9465", "farms.example.org", ""):
            assert answer(pair, foreign) == 421, foreign
        assert answer(pair, "localhost:9465", "POST", "http://evil.example") == 403


def test_it_does_not_listen_for_others_without_being_told_who_keeps_them_out(
    pair: list[Machine], tmp_path: Path
) -> None:
    told = {key: value for key, value in CONTAINED.items() if "CONTAINED" not in key}
    child = page(pair[0], tmp_path, told)
    child.start()
    wait_until(lambda: child.returncode is not None, 90, "the end of the page")
    assert child.returncode == ConfigError.exit_code
    assert "[page] host '0.0.0.0' is not on this machine" in (tmp_path / "page.log").read_text()
