"""Server and farms of different releases in one run."""

from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import tostring

import pytest
from rich.console import Console

from common import protocols
from common.errors import RejectReason
from common.messages import AlignRequest, Refusal, Reply, Request
from common.protocols import PROTOCOL
from server.facts import sources
from server.page_farms import farm_page, farms_page
from server.status import show, snapshot
from tests.lab.link import Fault
from tests.lab.network import Lab

OLD = PROTOCOL - 1
PRUNE: dict[str, Any] = {"prune_heads": 0.4}


def older(*nodes: int, since: int = 0, speaks: int = OLD) -> Fault:
    """Farms at these nodes refuse everything but their own protocol, as an older release does."""

    def answer(node: int, request: Request, reply: Reply) -> Reply | None:
        number = getattr(request, "round", 0)
        if node in nodes and number >= since and request.protocol != speaks:
            return Refusal(reason="protocol", detail=f"I speak {speaks}", protocol=speaks)
        assert reply.protocol == request.protocol
        return None

    return answer


def candidates(lab: Lab) -> list[str]:
    with lab.store() as store:
        return [row.digest for row in store.candidates(1).values()]


def rejected(lab: Lab) -> list[tuple[int, RejectReason]]:
    with lab.store() as store:
        return [(count, reason) for reason, count in store.rejection_counts(1).items() if count]


def repliers(lab: Lab, number: int) -> list[int]:
    with lab.store() as store:
        return [row.node for row in store.replies(1, number)]


def test_an_older_farm_takes_part_as_any_other(tmp_path: Path) -> None:
    mixed, plain = Lab(tmp_path / "mixed", **PRUNE), Lab(tmp_path / "plain", **PRUNE)
    link = mixed.run(fault=older(2))
    plain.run()
    assert {(node, request.protocol) for node, request in link.requests} == {
        (1, PROTOCOL),
        (2, OLD),
        (3, PROTOCOL),
    }
    assert not rejected(mixed)
    assert candidates(mixed) == candidates(plain)
    told = snapshot(mixed.server_dir)
    assert [row["protocol"] for row in told["farms"]] == [PROTOCOL, OLD, PROTOCOL]
    console = Console(width=200, record=True, file=StringIO())
    console.print(show(told))
    words = f"farm1 runs an older release (protocol {OLD}); upgrade it"
    assert [line for line in console.export_text().splitlines() if "older" in line] == [words]
    with sources(mixed.server_dir, 0) as found:
        pages = [farms_page(found, 0.0), *(farm_page(found, f"farm{one}", 0.0) for one in range(3))]
    drawn = ["".join(tostring(part, "unicode") for part in page or () if part) for page in pages]
    assert [page.count("older release") for page in drawn] == [1, 0, 1, 0]


def test_an_older_farm_sends_no_moments_and_the_others_do(tmp_path: Path) -> None:
    lab = Lab(tmp_path, moments="farms", **PRUNE)
    link = lab.run(fault=older(2))
    asked = {
        node
        for node, one in link.requests
        if isinstance(one, AlignRequest) and one.moments is not None
    }
    assert asked == {1, 3}
    assert not rejected(lab)


def test_it_is_met_also_where_a_request_is_sent_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path, 2, rounds=1)
    once = lab.config.rounds.model_copy(update={"attempts": 1})
    lab.run(fault=older(1, 2), rounds=once)
    assert repliers(lab, 1) == [1, 2]
    assert not rejected(lab)


def test_a_farm_that_goes_back_to_the_release_of_before_stays(tmp_path: Path) -> None:
    lab = Lab(tmp_path, 2)
    link = lab.run(fault=older(2, since=2))
    of_round = {
        number: [r.protocol for node, r in link.requests if (node, r.round) == (2, number)]  # type: ignore[union-attr]
        for number in (1, 2)
    }
    assert set(of_round[1]) == {PROTOCOL}
    assert of_round[2][:2] == [PROTOCOL, OLD]
    assert repliers(lab, 2) == [1, 2]
    assert not rejected(lab)


def test_a_farm_that_lacks_what_is_asked_sits_out_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "ADDED", {PROTOCOL: ("align.criterion=magnitude",)})
    lab = Lab(tmp_path, criterion="magnitude", **PRUNE)
    link = lab.run(fault=older(2))
    scored = [r.round for _, r in link.requests if isinstance(r, AlignRequest) and r.criterion]
    assert scored
    assert all(repliers(lab, number) == [1, 3] for number in scored)
    assert rejected(lab) == [(len(set(scored)), RejectReason.PROTOCOL)]
    with lab.store() as store:
        details = [row.detail for row in store.rejections(1)]
    assert all(f"protocol {OLD} has no 'criterion' = 'magnitude'" in one for one in details)


@pytest.mark.parametrize("number", [OLD - 1, PROTOCOL + 1])
def test_a_farm_outside_of_the_range_is_left_out_by_name_of_both(
    number: int, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, 2, rounds=1)
    rules = lab.config.rounds.model_copy(update={"min_farms": 1})
    lab.run(fault=older(2, speaks=number), rounds=rules)
    assert repliers(lab, 1) == [1]
    assert {reason for _, reason in rejected(lab)} == {RejectReason.PROTOCOL}
