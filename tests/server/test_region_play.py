"""A region plays orders: what it answers, what it keeps to itself, and how it keeps up."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import backbone, codec
from common.config import NetworkConfig, PrivacyConfig, RoundConfig, ServerConfig, TrainConfig
from common.errors import ConfigError, ProtocolError
from common.mask import Mask
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    Refusal,
    Reply,
    Request,
)
from common.protocols import PROTOCOL
from common.scores import encode_neurons
from common.services import RegionConfig
from common.spec import ModelSpec
from common.step import Step
from common.trainable import trainable_set
from server.keys import SigningKeys
from server.link import Delivery, Sent
from server.models import Models
from server.region_base import MissingBaseError, bring_up, held
from server.region_desk import Desk
from server.region_play import Player
from server.region_record import Order, RegionReply, Terms, opened
from server.store import Store
from tests.lab.link import LabClock
from tests.lab.network import SIDE, TINY
from tests.lab.replies import align_reply
from tests.lab.versions import pruned
from tests.server.test_region_record import NOW

DENSE = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
TRAIN = TrainConfig(trainable="bias", update_bits=32)
RUN, OTHER = "1" * 64, "2" * 64


class Village:
    """Farms that train nothing and answer at once; what they were asked is kept."""

    def __init__(self, names: Sequence[str] = ("ash", "elm", "oak")) -> None:
        self.names = dict(enumerate(names, start=1))
        self.asked: list[Request] = []
        self.speaks: dict[str, int] = {}
        self._rng = np.random.default_rng(0)
        self._waiting: dict[str, tuple[int, Request]] = {}

    def online(self) -> Sequence[int]:
        return list(self.names)

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        self.asked.append(request)
        message_id = f"m{len(self.asked)}"
        self._waiting[message_id] = node, request
        return Sent(message_id, 1)

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        mine = [one for one in message_ids if one in self._waiting]
        return [Delivery(one, self._answer(*self._waiting.pop(one)), 1) for one in mine]

    def _answer(self, node: int, request: Request) -> Reply:
        farm, examples = self.names[node], 10 + node
        if isinstance(request, AlignRequest):
            return self._aligned(farm, examples, request)
        if isinstance(request, EvaluateRequest):
            about = {**request.identity(), "farm": farm, "label": request.label}
            values: dict[str, Any] = {
                "examples": 5,
                "accuracy": node / 10,
                "f1": node / 20,
                "seconds": 1.0,
            }
            return EvaluateReply(**about, **values)
        if request.protocol != self.speaks.get(farm, PROTOCOL):
            spoken = self.speaks[farm]
            return Refusal(reason="protocol", detail=f"it is {spoken} here", protocol=spoken)
        return HelloReply(farm=farm, examples=examples, classes=2)

    def _aligned(self, farm: str, examples: int, request: AlignRequest) -> AlignReply:
        spec = SPECS[request.mask]
        with torch.device("meta"):
            count = trainable_set(backbone.build(spec), "bias").layout.count
        values = self._rng.normal(0, 1e-3, count).astype(np.float32)
        more: dict[str, Any] = {}
        if request.criterion is not None:
            more = {
                "head_importance": self._rng.random(sum(spec.heads)).astype(np.float32),
                "head_mmd2": self._rng.random(sum(spec.heads)).astype(np.float32),
                "neuron_importance": encode_neurons(
                    self._rng.random(sum(spec.neurons)).astype(np.float32)
                ),
            }
        update = codec.encode(values, request.base, bits=32)
        return align_reply(
            update, **request.identity(), farm=farm, examples=examples, accuracy=0.5, **more
        )

    @property
    def aligned(self) -> list[AlignRequest]:
        return [one for one in self.asked if isinstance(one, AlignRequest)]


@dataclass
class Candidates:
    """A centre's: a dense one, the one it learnt next, and that one pruned."""

    models: Models
    digests: list[str] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)


SPECS: dict[str, ModelSpec] = {}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    """Three steps of learning from a random backbone, and one cut."""
    torch.manual_seed(0)
    models = Models(tmp_path_factory.mktemp("centre"))
    dense = Mask.dense(DENSE)
    found = Candidates(models, [models.save(backbone.build(DENSE), DENSE)], [dense])
    for seed in range(3):
        model, spec = models.load(found.digests[-1])
        count = trainable_set(model, "bias").layout.count
        values = np.random.default_rng(seed).normal(0, 1e-3, count).astype(np.float32)
        step = Step(codec.encode(values, found.digests[-1], bits=32))
        found.digests.append(models.save(*step.apply(model, spec), step.to_bytes()))
        found.masks.append(dense)
    model, spec = models.load(found.digests[-1])
    smaller = pruned(model, spec)
    heads = (tuple(range(1, spec.heads[0])), *dense.heads[1:])
    mask = Mask(heads, dense.neurons, dense.dense_heads, dense.dense_neurons)
    found.digests.append(models.save(*smaller))
    found.masks.append(mask)
    models.settle()
    SPECS.update({dense.digest: DENSE, mask.digest: smaller[1]})
    return found


class Place:
    """A region with a village, its desk and its player."""

    def __init__(self, folder: Path, candidates: Candidates, **settings: Any) -> None:
        self.folder, self.candidates = folder, candidates
        self.keys = SigningKeys.create(folder / "signing", "north")
        self.village = Village(settings.pop("names", ("ash", "elm", "oak")))
        self.config = ServerConfig(
            server=NetworkConfig(name="north"),
            region=RegionConfig(centre="coop", port=9, fewest=settings.pop("fewest", 2)),
            rounds=RoundConfig(deadline_seconds=30, grace_seconds=0),
        ).model_copy(update=settings)
        self.store = Store.open(folder / "fieldfed.db")
        self.desk = Desk.at(folder)
        self.begin()

    def begin(self) -> None:
        """A process begins."""
        self.player = Player(self.config, self.village, LabClock(), self.folder, self.store)

    def close(self) -> None:
        self.store.close()
        self.desk.close()

    def order(self, number: int, which: int, **changes: Any) -> Order:
        """Alignment in round ``number`` on one of the candidates, with the shortest body."""
        about = {
            "run": 7,
            "round": number,
            "attempt": 1,
            "seed": 0,
            "train": TRAIN,
            "base": self.candidates.digests[which],
            "criterion": "taylor",
            "folded": None,
        }
        return self._order(AlignRequest, which, about | changes)

    def evaluation(self, number: int, which: int, label: str = "model") -> Order:
        about = {
            "run": 7,
            "round": number,
            "attempt": 1,
            "seed": 0,
            "train": TRAIN,
            "base": self.candidates.digests[which],
            "label": label,
        }
        return self._order(EvaluateRequest, which, about)

    def _order(
        self, kind: type[AlignRequest | EvaluateRequest], which: int, about: dict[str, Any]
    ) -> Order:
        mask, models = self.candidates.masks[which], self.candidates.models
        terms = {
            "centre": about.pop("centre", "coop"),
            "run_id": about.pop("run_id", RUN),
            "criterion": "taylor",
            "rounds": 5,
            "exponent": 0.0,
            "mask": mask.to_json(),
        }
        body: dict[str, Any] = {"body_kind": "none"}
        here = held(self.folder)
        way = models.way(here, about["base"])
        if about["base"] not in here:
            body = {"body_kind": "full", "body": models.body(about["base"])}
            if way is not None:
                body = {"body_kind": way.kind, "body_from": way.start, "body": way.body}
        request = kind.model_validate({"mask": mask.digest} | body | about)
        return Order(Terms.model_validate(terms), request)

    def play(self, order: Order) -> Reply:
        """Through the desk, and opened as the centre would."""
        self.desk.give(order.to_bytes())
        current = self.desk.current()
        assert current is not None
        self.player.play(self.desk, current)
        data = self.desk.take(order.key, order.request.attempt)
        assert data is not None
        return opened(
            data, region="north", centre="coop", key=order.key, keys=self.keys.keys, now=NOW
        )


@pytest.fixture
def place(tmp_path: Path, candidates: Candidates) -> Iterator[Place]:
    made = Place(tmp_path, candidates)
    yield made
    made.close()


def test_a_round_is_answered_and_stays_open_until_the_centre_has_gone_on(place: Place) -> None:
    reply = place.play(place.order(1, 0))
    assert isinstance(reply, RegionReply)
    assert (reply.run, reply.round, reply.farms, reply.examples) == (7, 1, 3, 36)
    (row,) = place.store.rounds(1)
    assert row.state == "open"
    assert place.store.spooled_paths(1)
    place.play(place.order(2, 1))
    states = {row.round: row.state for row in place.store.rounds(1)}
    assert states == {1: "committed", 2: "open"}
    assert place.store.candidates(1)[1].digest == place.candidates.digests[1]
    assert {row.farm for row in place.store.scores(1)[1]} == {None, "ash", "elm", "oak"}


def test_a_run_of_the_centre_is_a_run_here(place: Place) -> None:
    place.play(place.order(1, 0))
    place.begin()  # the process was killed, and another goes on
    place.play(place.order(2, 1))
    assert [row.run for row in place.store.runs()] == [1]
    place.play(place.order(1, 0, run_id=OTHER))
    assert [row.state for row in place.store.runs()] == ["stopped", "running"]


def test_a_centre_that_was_restored_from_a_backup_is_followed_back(place: Place) -> None:
    place.play(place.order(1, 0))
    place.play(place.order(2, 1, folded=1))
    assert isinstance(place.play(place.order(1, 0)), RegionReply)
    assert isinstance(place.play(place.order(2, 2, folded=1)), RegionReply)
    assert [row.run for row in place.store.runs()] == [1, 2]
    assert sorted(place.store.candidates(2)) == [1]


def test_the_closing_report_ends_the_run(place: Place) -> None:
    place.play(place.order(1, 0))
    reply = place.play(place.evaluation(1, 1))
    assert isinstance(reply, EvaluateReply)
    assert reply.accuracy == pytest.approx(0.2)
    assert reply.f1 == pytest.approx(0.1)
    assert reply.examples == 15
    run = place.store.latest_run()
    assert run is not None
    assert run.state == "done"
    assert place.store.candidates(1)[1].digest == place.candidates.digests[1]


def test_a_baseline_ends_nothing(place: Place) -> None:
    place.play(place.evaluation(0, 0, "probe"))
    run = place.store.latest_run()
    assert run is not None
    assert run.state == "running"


def test_a_cut_and_its_undoing_are_followed(place: Place) -> None:
    for number, which in ((1, 3), (2, 4), (3, 3)):
        assert isinstance(place.play(place.order(number, which)), RegionReply)
    found = {number: row.digest for number, row in place.store.candidates(1).items()}
    assert found == {1: place.candidates.digests[4], 2: place.candidates.digests[3]}
    (cut, restored) = (place.store.candidates(1)[number].mask for number in (1, 2))
    assert (cut, restored) == tuple(place.candidates.masks[which].digest for which in (4, 3))


def test_rounds_that_were_missed_are_made_up_for(place: Place) -> None:
    place.play(place.order(1, 0))
    order = place.order(4, 3)
    assert order.request.body_kind in ("chain", "tensors")
    assert isinstance(place.play(order), RegionReply)
    assert place.store.candidates(1)[1].digest == place.candidates.digests[3]
    place.play(place.order(5, 4))
    assert sorted(place.store.candidates(1)) == [1, 4]


@pytest.mark.parametrize(
    ("counted", "expected"), [([None, None, None], [None, None]), ([None, 1, 2], [1, 2])]
)
def test_farms_hear_what_counts_at_the_centre(
    place: Place, counted: list[int | None], expected: list[int | None]
) -> None:
    for number, folded in enumerate(counted, start=1):
        place.play(place.order(number, number - 1, folded=folded))
    asked = {one.round: one.folded for one in place.village.aligned}
    assert [asked[2], asked[3]] == expected


def test_what_did_not_count_is_given_back(place: Place) -> None:
    """The centre had closed round 2 without this region: its farms' replies are not lost."""
    place.play(place.order(1, 0))
    place.play(place.order(2, 1, folded=1))
    place.play(place.order(3, 2, folded=1))
    assert {one.folded for one in place.village.aligned if one.round == 3} == {1}


def test_scores_wait_for_the_scale(place: Place) -> None:
    """Until the centre has frozen it, heads are scored by importance alone."""

    def taha(order: Order, tau: float | None) -> Order:
        changes = {"criterion": "taha", "exponent": 1.0, "tau": tau}
        request = order.request.model_copy(update={"criterion": "taha"})
        return Order(order.terms.model_copy(update=changes), request)

    place.play(taha(place.order(1, 0), None))
    assert place.store.tau(1) is None
    place.play(taha(place.order(2, 1), 0.125))
    assert place.store.tau(1) == 0.125


def test_a_region_keeps_its_own_noise_and_sends_no_maximum_with_it(
    tmp_path: Path, candidates: Candidates
) -> None:
    private = PrivacyConfig(clip=1.0, noise=1.0, score_noise=1.0)
    made = Place(tmp_path, candidates, privacy=private)
    reply = made.play(made.order(1, 0))
    assert isinstance(reply, RegionReply)
    assert {one.privacy for one in made.village.aligned} == {private}
    assert reply.head_mean is not None
    assert reply.head_most is not None
    np.testing.assert_array_equal(reply.head_mean, reply.head_most)
    made.close()


# --- what it does not answer ---------------------------------------------------------------------


def refused(reply: Reply) -> str:
    assert reply.kind == "refusal"
    for farm in ("ash", "elm", "oak"):
        assert farm not in reply.detail
    return reply.reason


def test_nothing_leaves_a_region_of_too_few_farms(tmp_path: Path, candidates: Candidates) -> None:
    made = Place(tmp_path, candidates, fewest=4)
    for order in (made.evaluation(0, 0, "probe"), made.order(1, 0)):
        assert refused(made.play(order)) == "internal"
    assert made.desk.take("hello", 1) is None
    made.village.names[4] = "yew"
    reply = made.play(made.order(1, 0, attempt=2))
    assert isinstance(reply, RegionReply)
    assert reply.farms == 4
    made.close()


def test_another_centre_is_not_served(place: Place) -> None:
    place.config = place.config.model_copy(
        update={"region": RegionConfig(centre="union", port=9, fewest=2)}
    )
    place.begin()
    assert refused(place.play(place.order(1, 0))) == "bad_request"
    assert not place.village.aligned


def test_a_base_that_is_not_here_is_asked_for(place: Place) -> None:
    reply = place.play(place.order(1, 0, body_kind="none", body=None))
    assert refused(reply) == "missing_base"
    assert isinstance(place.play(place.order(1, 0, attempt=2)), RegionReply)


def test_anchors_that_are_not_here_are_asked_for(place: Place) -> None:
    reply = place.play(place.order(1, 0, anchors_digest="ab" * 32))
    assert refused(reply) == "missing_base"


def test_an_ordinary_server_plays_no_orders(place: Place) -> None:
    place.config = place.config.model_copy(update={"region": None})
    with pytest.raises(ConfigError, match="no region"):
        place.begin()


# --- introductions -------------------------------------------------------------------------------


def introduced(place: Place) -> HelloReply:
    data = place.desk.take("hello", 1)
    assert data is not None
    reply = opened(data, region="north", centre="coop", key="hello", keys=place.keys.keys, now=NOW)
    assert isinstance(reply, HelloReply)
    return reply


def test_a_region_introduces_all_its_farms_as_one(place: Place, candidates: Candidates) -> None:
    place.player.introduce(place.desk, lambda: True)
    assert introduced(place) == HelloReply(farm="north", examples=36, classes=6)
    place.village.names[4] = "yew"
    place.play(place.order(1, 0))
    assert introduced(place).examples == 36 + 14
    assert introduced(place).held == (candidates.digests[0],)


def test_farms_of_the_older_protocol_count(place: Place) -> None:
    place.village.speaks = {"ash": PROTOCOL - 1, "oak": PROTOCOL - 2}
    looks = iter(range(3))
    place.player.introduce(place.desk, lambda: next(looks, None) is not None)
    assert introduced(place).examples == 11 + 12, "oak's protocol is one too old"


def test_a_region_of_too_few_farms_does_not_introduce_itself(
    tmp_path: Path, candidates: Candidates
) -> None:
    made = Place(tmp_path, candidates, fewest=4)
    looks = iter(range(5))
    made.player.introduce(made.desk, lambda: next(looks, None) is not None)
    assert made.desk.take("hello", 1) is None
    made.close()


def test_the_first_backbone_can_be_put_there(tmp_path: Path, candidates: Candidates) -> None:
    made = Place(tmp_path, candidates)
    model, spec = candidates.models.view(candidates.digests[0])
    backbone.save_backbone(tmp_path / "base.safetensors", model, spec)
    made.player.introduce(made.desk, lambda: True)
    assert introduced(made).held == (candidates.digests[0],)
    made.close()


# --- coming up to a candidate --------------------------------------------------------------------


def test_every_kind_of_body_leads_to_the_candidate(tmp_path: Path, candidates: Candidates) -> None:
    models, digests = candidates.models, candidates.digests
    kinds = set()
    for start, end in ((None, 0), (0, 1), (1, 3), (0, 3), (3, 4)):
        mine = Models(tmp_path / f"{start}-{end}")
        if start is not None:
            mine.save(*models.view(digests[start]))
        way = None if start is None else models.way({digests[start]}, digests[end])
        body: dict[str, Any] = {"body_kind": "full", "body": models.body(digests[end])}
        if way is not None:
            body = {"body_kind": way.kind, "body_from": way.start, "body": way.body}
        bring_up(mine, asking(candidates, end, **body))
        mine.settle()
        assert backbone.digest(*mine.view(digests[end])) == digests[end]
        assert (mine.step(digests[end]) is not None) == (body["body_kind"] in ("delta", "chain"))
        kinds.add(body["body_kind"])
    assert {"full", "delta", "chain"} <= kinds


def asking(candidates: Candidates, which: int, **body: Any) -> AlignRequest:
    return AlignRequest.model_validate(
        {
            "run": 1,
            "round": 1,
            "attempt": 1,
            "seed": 0,
            "train": TRAIN,
            "base": candidates.digests[which],
            "mask": candidates.masks[which].digest,
            **body,
        }
    )


def test_a_body_that_leads_elsewhere_is_not_believed(
    tmp_path: Path, candidates: Candidates
) -> None:
    models, digests = candidates.models, candidates.digests
    mine = Models(tmp_path)
    with pytest.raises(MissingBaseError, match="yields"):
        bring_up(mine, asking(candidates, 1, body_kind="full", body=models.body(digests[0])))
    step = models.step(digests[2])
    changed = {"body_kind": "delta", "body_from": digests[0], "body": step}
    with pytest.raises(ProtocolError, match="came as one from"):
        bring_up(mine, asking(candidates, 2, **changed))
    with pytest.raises(MissingBaseError, match="is not here"):
        bring_up(mine, asking(candidates, 2, **changed | {"body_from": digests[1]}))
