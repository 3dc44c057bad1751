"""A farm that answers badly again and again is paused, and can be readmitted."""

from pathlib import Path

import pytest

from common.errors import RejectReason, StateError
from common.messages import AlignReply, AlignRequest, Reply, Request
from server.cli import readmit
from server.status import snapshot
from tests.lab.network import Lab


def foreign(node: int, _request: Request, reply: Reply) -> Reply | None:
    if node == 2 and isinstance(reply, AlignReply):
        return reply.model_copy(update={"mask": "0" * 64})
    return None


def asked(lab: Lab, **options: object) -> list[int]:
    link = lab.run(**options)  # type: ignore[arg-type]
    return [
        request.round
        for node, request in link.requests
        if node == 2 and isinstance(request, AlignRequest)
    ]


def paused_lab(root: Path) -> Lab:
    lab = Lab(root, rounds=4, settings={"rounds": {"strikes": 2}})
    rules = lab.config.rounds.model_copy(update={"strikes": 2})
    lab.config = lab.config.model_copy(update={"rounds": rules})
    return lab


def test_it_is_not_asked_any_more_and_status_says_why(tmp_path: Path) -> None:
    lab = paused_lab(tmp_path)
    assert asked(lab, fault=foreign) == [1, 2]
    values = snapshot(lab.server_dir)
    assert list(values["paused"]) == ["farm1"]
    assert "2 bad replies in a row" in values["paused"]["farm1"]
    assert "mask" in values["paused"]["farm1"]
    assert values["rejected"] == {str(RejectReason.FOREIGN_MASK): 2}
    assert asked(lab) == [], "a pause outlasts the run"


def test_a_readmitted_farm_is_asked_again_with_a_clean_slate(tmp_path: Path) -> None:
    lab = paused_lab(tmp_path)
    asked(lab, fault=foreign)
    readmit(lab.server_dir, "farm1")
    assert not snapshot(lab.server_dir)["paused"]
    assert asked(lab) == [1, 2, 3, 4]


def test_who_is_not_paused_cannot_be_readmitted(tmp_path: Path) -> None:
    lab = paused_lab(tmp_path)
    with pytest.raises(StateError, match="no run"):
        readmit(tmp_path / "elsewhere", "farm1")
    asked(lab, fault=foreign)
    with pytest.raises(StateError, match="paused farms: farm1"):
        readmit(lab.server_dir, "farm7")


def test_good_replies_in_between_wipe_out_strikes(tmp_path: Path) -> None:
    lab = paused_lab(tmp_path)

    def now_and_then(node: int, request: Request, reply: Reply) -> Reply | None:
        odd = isinstance(reply, AlignReply) and reply.round % 2
        return foreign(node, request, reply) if odd else None

    assert asked(lab, fault=now_and_then) == [1, 2, 3, 4]


def test_lost_messages_pause_nobody(tmp_path: Path) -> None:
    lab = paused_lab(tmp_path)

    def lost(node: int, _request: Request, reply: Reply) -> str | None:
        return "gone" if node == 2 and isinstance(reply, AlignReply) else None

    assert asked(lab, fault=lost).count(4) == 3
    assert not snapshot(lab.server_dir)["paused"]


def test_no_farm_left_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    lab = paused_lab(tmp_path)

    def all_foreign(_node: int, _request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, AlignReply):
            return reply.model_copy(update={"mask": "0" * 64})
        return None

    with pytest.raises(StateError):
        asked(lab, fault=all_foreign)
    with pytest.raises(StateError):
        asked(lab, fault=all_foreign)
    with pytest.raises(StateError, match="readmit"):
        asked(lab)
