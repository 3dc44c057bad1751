"""The whole way of a farm on another machine: a code, a round through the door, put out at once."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.errors import LinkError
from common.processes import Child, free_port, stop_all, wait_for_port
from server.nodes import certified_farm
from server.store import Store
from tests.lab.network import draw_folder
from tests.system.site import call, command, site_settings, start, tell
from tests.waiting import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.system]


def log_of(folder: Path, program: str) -> str:
    path = folder / "logs" / f"{program}.log"
    return path.read_text() if path.exists() else ""


def test_a_farm_joins_by_code_trains_through_the_door_and_is_put_out(tmp_path: Path) -> None:
    server, farm, port, door = tmp_path / "server", tmp_path / "oak", free_port(), free_port()
    source = draw_folder(tmp_path / "photos" / "source", 3, 16, 7)
    server.mkdir()
    (server / "server.toml").write_text(
        site_settings(
            port,
            source,
            {
                "plan": {"rounds": 2, "prune_events": 1},
                "rounds": {"min_farms": 1},
                "door": {"host": "127.0.0.1", "port": door},
                "hub": {"host": "127.0.0.1", "port": free_port()},
            },
        )
    )
    call("fieldfed-server", "pretrain", str(server))
    data = draw_folder(tmp_path / "photos" / "oak", 2, 15, 50)
    call("fieldfed-client", "init", str(farm), "--data", str(data), "--threads", "1")
    with ExitStack() as stack:
        children: list[Child] = []
        stack.callback(lambda: tell(children))
        stack.callback(lambda: stop_all(children, 15))
        up = start("up", command("fieldfed-server", "up", str(server)), tmp_path)
        children.append(up)
        wait_for_port("127.0.0.1", door, 60, up)
        asked = json.loads(call("fieldfed-server", "enrol", str(server), "oak", "--json"))
        assert asked["door"] == f"https://127.0.0.1:{door}"
        said = call("fieldfed-client", "join", str(farm), asked["door"], asked["code"])
        assert "farm oak is a member" in said
        assert "but:" not in said
        children.append(start("oak", command("fieldfed-client", "run", str(farm)), tmp_path))
        assert "run 1 is done" in call("fieldfed-server", "train", str(server))
        with Store.open(server / "fieldfed.db", read_only=True) as store:
            (row,) = store.farms(1)
        assert row.farm == "oak"
        assert certified_farm(server, row.node) == "oak", "it came through the door"
        assert "member" in call("fieldfed-server", "enrol", str(server), "--list")

        assert "farm oak is out" in call("fieldfed-server", "revoke", str(server), "oak")
        code = LinkError.exit_code
        assert "revoked" in call("fieldfed-client", "update", str(farm), code=code), "the hub"
        wait_until(lambda: "403" in log_of(farm / "state", "supernode"), 60, "a refusal")
        wait_until(lambda: "farm oak is revoked" in log_of(server, "door"), 30, "its end")
        assert (server / "identity" / "revoked.crl").is_file()
        said = call("fieldfed-client", "leave", str(farm), code=code)
        assert "says no (403): the certificate of farm oak is revoked" in said
