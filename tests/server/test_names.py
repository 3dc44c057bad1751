"""A farm that came by the door is taken by the name in its certificate, and by no other."""

from pathlib import Path

from common.errors import RejectReason
from common.messages import AlignRequest
from server.nodes import Nodes
from server.status import snapshot
from tests.lab.network import Lab


def certify(folder: Path, farm: str, node: int) -> None:
    """As the door does when a farm's SuperNode is activated."""
    nodes = Nodes(folder)
    assert nodes.claim(f"key {node}", farm)
    nodes.tell(f"key {node}", node)


def asked(lab: Lab) -> set[int]:
    return {node for node, request in lab.run().requests if isinstance(request, AlignRequest)}


def test_a_farm_with_the_name_of_another_is_refused_and_the_round_goes_on(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=1)
    lab.server_dir.mkdir(parents=True, exist_ok=True)
    certify(lab.server_dir, "farm0", 1)
    certify(lab.server_dir, "mallory", 2)  # it will say that it is farm1
    others = asked(lab)
    assert 1 in others
    assert 2 not in others
    rejected = snapshot(lab.server_dir)["rejected"]
    assert set(rejected) == {str(RejectReason.PROTOCOL)}


def test_farms_that_say_who_they_are_are_asked(tmp_path: Path) -> None:
    lab = Lab(tmp_path, rounds=1)
    lab.server_dir.mkdir(parents=True, exist_ok=True)
    certify(lab.server_dir, "farm1", 2)
    assert 2 in asked(lab)
    assert snapshot(lab.server_dir)["rejected"] == {}
