"""Whole backbones by the hub: for members of the network, and never the only way to get one."""

from pathlib import Path

import numpy as np
import pytest

from client import hub as hub_module
from client import traffic
from client.bodies import can_fetch, with_body
from client.device import Device
from client.ledger import FILE, Ledger
from client.traffic import Counters
from common import objects as objects_module
from common.config import TrainConfig
from common.errors import DiskError, LinkError
from common.messages import Array, EvaluateRequest, Work
from common.objects import Objects
from server.bodies import KEPT, Bodies, bodies_of
from tests.lab.hub import LabHub
from tests.lab.link import LabLink
from tests.lab.network import Lab
from tests.lab.versions import registry_in

MEMBER, OTHER = 1, 2


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, count=2, rounds=1)


@pytest.fixture
def hub(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> LabHub:
    """Of a network that the first farm is a member of; it does not run yet."""
    monkeypatch.setattr(hub_module, "TRIES", 1)
    hub = LabHub(lab.server_dir)
    with registry_in(lab.server_dir) as registry:
        config, state = lab.farms[0]
        hub.join(Device(config, state), config.farm.name, registry.keys.text)
    return hub


def test_a_member_fetches_what_another_farm_is_sent(lab: Lab, hub: LabHub) -> None:
    states = [state for _, state in lab.farms]
    for state in states:
        traffic.keep(state, Counters(sent=1, received=10))
    with hub.running():
        link = lab.run(hub=hub.config)
    asked = work_of(link, MEMBER)
    assert [one.body_kind for one in asked].count("hub") == 1, "what it holds was named again"
    assert asked[0].body_kind == "hub"
    assert work_of(link, OTHER)[0].body_kind == "full"
    with lab.store() as store:
        run = store.latest_run()
        assert run is not None
        assert run.state == "done"
        assert {row.farm for row in store.reports(run.run)} == {"farm0", "farm1"}
    received = [traffic.fields(state)["link_received"] for state in states]
    assert received == [10 + (asked[0].body_bytes or 0), 10]
    with Ledger.open(states[0] / FILE) as ledger:
        (asking,) = ledger.totals()
    assert (asking.kind, asking.destination) == ("request", f"hub {hub.address}")
    assert 64 < asking.bytes < 200, "a digest, and little else"


def test_without_the_hub_the_backbone_is_sent(
    lab: Lab, hub: LabHub, caplog: pytest.LogCaptureFixture
) -> None:
    link = lab.run(hub=hub.config)
    assert [one.body_kind for one in work_of(link, MEMBER)[:2]] == ["hub", "full"]
    with lab.store() as store:
        run = store.latest_run()
        assert run is not None
        assert run.state == "done"
    assert f"hub at {hub.address}: unavailable" in caplog.text


def test_it_goes_on_from_where_the_last_try_was_cut(lab: Lab, hub: LabHub) -> None:
    config, state = lab.farms[0]
    bodies, content = bodies_of(lab.server_dir), np.random.default_rng(0).bytes(1_000_000)
    name = bodies.add(content)
    held = content[:800_000]
    Objects(state / "bodies").receive(name, 0, held, len(content))
    with hub.running():
        request = with_body(named(name, len(content)), config, state)
    assert isinstance(request, Work)
    assert request.body_kind == "full"
    assert request.body is not None
    assert request.body.tobytes() == content
    counted = Counters.model_validate_json((state / traffic.HUB_FILE).read_bytes())
    assert counted.received < 500_000


def work_of(link: LabLink, farm: int) -> list[Work]:
    """What a farm was asked."""
    return [one for node, one in link.requests if node == farm and isinstance(one, Work)]


def named(name: str, size: int) -> EvaluateRequest:
    """A request whose body is at the hub."""
    return EvaluateRequest(
        run=1,
        round=1,
        attempt=1,
        seed=0,
        base="b" * 64,
        mask="c" * 64,
        body_kind="hub",
        body_object=name,
        body_bytes=size,
        label="model",
        train=TrainConfig(),
    )


def test_a_farm_that_left_says_so_without_naming_its_folders(lab: Lab, hub: LabHub) -> None:
    config, state = lab.farms[0]
    assert can_fetch(state)
    (state / "membership.json").write_text("{")
    assert not can_fetch(state)
    with pytest.raises(LinkError, match="backbone bbbbbbbbbbbb did not come") as error:
        with_body(named("a" * 64, 5), config, state)
    assert str(state) not in str(error.value)


def test_only_the_newest_bodies_stay(tmp_path: Path) -> None:
    made = []

    def body(candidate: str) -> Array:
        made.append(candidate)
        return np.frombuffer(candidate.encode(), np.uint8)

    bodies = Bodies(tmp_path, body)
    placed = [bodies.place(name * 64) for name in "abca"]
    assert made == ["a" * 64, "b" * 64, "c" * 64, "a" * 64]
    assert bodies.place("a" * 64) == placed[3]
    objects = bodies_of(tmp_path)
    assert [one is not None and objects.has(one[0]) for one in placed] == [True, False, True, True]
    assert KEPT == 2


def test_a_full_disk_means_that_the_request_carries_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskError("no space left on the disk")

    monkeypatch.setattr(objects_module, "write_atomically", full)
    body = np.zeros(1000, np.uint8)
    assert Bodies(tmp_path, lambda _candidate: body).place("a" * 64) is None
