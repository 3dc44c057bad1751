"""Privacy through whole rounds: what farms send, what it costs, and when a run ends for it."""

import hashlib
import json
import math
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from client.farm import Farm
from client.privacy import KEY_FILE, RECORD_FILE, Curtain, farm_key, spent
from client.scores import FarmScores
from common import backbone, codec
from common.accountant import epsilon, mu_squared
from common.compress import expand
from common.config import FarmConfig, PrivacyConfig
from common.errors import ConfigError, RejectReason, StateError
from common.messages import AlignReply, AlignRequest, Refusal, Reply, Request
from common.privacy import Floats
from common.scores import decode_neurons
from server import privacy
from server.aggregate import aggregate
from server.models import Models
from server.report import write_report
from server.status import show, snapshot
from server.store import Store
from server.story import Provenance, Story, terminal_table
from server.summary import summarise
from tests.lab.network import Lab

PRUNE: dict[str, Any] = {"prune_heads": 0.4}
NOISY = PrivacyConfig(clip=0.5, noise=4.0, score_clip=0.5, score_noise=5.0)
WHERE = Provenance(command="test", commit="none", versions={}, seed=0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A network of two farms; every test runs it anew."""
    return Lab(tmp_path_factory.mktemp("lab"), count=2, **PRUNE)


@pytest.fixture
def request_(lab: Lab) -> AlignRequest:
    """A request for a scored round, with the whole backbone in it."""
    model, spec = backbone.load_backbone(lab.server_dir / "base.safetensors")
    body = np.frombuffer(backbone.pack(model, spec), np.uint8)
    digest = backbone.digest(model, spec)
    return AlignRequest(
        run=1,
        round=1,
        attempt=1,
        seed=3,
        base=digest,
        mask="0" * 64,
        body_kind="full",
        body=body,
        train=lab.config.train,
        criterion="taylor",
        privacy=NOISY,
    )


def answer(lab: Lab, state: Path, request: AlignRequest, **section: Any) -> Reply:
    config, _ = lab.farms[0]
    farm = FarmConfig(farm=config.farm.model_copy(update=section))
    return Farm.open(farm, state).handle(request)


def aligned(lab: Lab, state: Path, request: AlignRequest, **section: Any) -> AlignReply:
    reply = answer(lab, state, request, **section)
    assert isinstance(reply, AlignReply), reply
    return reply


def numbers(reply: AlignReply) -> Floats:
    update = expand(reply.update, 100_000_000)
    return codec.decode(update, base=reply.base, count=codec.read_header(update).count)


# --- one farm ------------------------------------------------------------------------------------


def test_a_reply_carries_noise_and_keeps_back_what_nobody_needs(
    lab: Lab, tmp_path: Path, request_: AlignRequest
) -> None:
    clear = aligned(lab, tmp_path / "a", request_.model_copy(update={"privacy": None}))
    exact = request_.train.model_copy(update={"update_bits": 32})
    reply = aligned(lab, tmp_path / "b", request_.model_copy(update={"train": exact}))
    sigma = 0.5 * 4.0
    assert numbers(reply).std() == pytest.approx(sigma, rel=0.1)
    assert numbers(clear).std() < sigma / 20
    assert (reply.f1, reply.loss, reply.dal) == (0, 0, 0)
    assert clear.loss > 0
    assert clear.f1 > 0
    assert reply.accuracy == clear.accuracy, "the guard needs it as it is"
    assert reply.head_mmd2 is not None
    assert not reply.head_mmd2.any()
    assert reply.head_importance is not None
    assert clear.head_importance is not None
    assert abs(np.corrcoef(reply.head_importance, clear.head_importance)[0, 1]) < 0.9
    assert reply.neuron_importance is not None
    neurons = decode_neurons(reply.neuron_importance, len(reply.neuron_importance) - 9)
    assert neurons.sum() == pytest.approx(1, rel=0.02)


def test_shifts_are_kept_back_where_scores_carry_noise_and_only_there() -> None:
    shares = np.full(4, 0.25, np.float32)
    scores = FarmScores(shares, np.ones(4, np.float32), shares)
    hidden = Curtain(NOISY, bytes(32), "a").scores(scores)
    assert not hidden.head_mmd2.any()
    assert hidden.head_importance.tobytes() != hidden.neuron_importance.tobytes()
    clear = Curtain(PrivacyConfig(clip=1.0, noise=1.0), bytes(32), "a").scores(scores)
    assert clear.head_mmd2.all()


def test_work_done_again_after_a_crash_has_the_same_noise_and_other_work_has_not(
    lab: Lab, tmp_path: Path, request_: AlignRequest
) -> None:
    state = tmp_path / "state"
    first = aligned(lab, state, request_)
    for cached in (state / "replies").iterdir():
        cached.unlink()
    again = aligned(lab, state, request_.model_copy(update={"attempt": 2}))
    assert again.update.tobytes() == first.update.tobytes()
    assert again.head_importance is not None
    assert again.head_importance.tobytes() == first.head_importance.tobytes()  # type: ignore[union-attr]
    other = aligned(lab, state, request_.model_copy(update={"run": 2}))
    gap = numbers(other) - numbers(first)
    assert gap.std() == pytest.approx(math.sqrt(2) * 0.5 * 4, rel=0.1)
    stranger = aligned(lab, tmp_path / "other", request_)
    assert stranger.update.tobytes() != first.update.tobytes(), "noise must not follow the seed"


def test_the_key_is_the_farms_alone_and_damage_is_mended(tmp_path: Path) -> None:
    key = farm_key(tmp_path)
    path = tmp_path / KEY_FILE
    assert path.stat().st_mode & 0o077 == 0
    assert len(key) == 32
    assert farm_key(tmp_path) == key != farm_key(tmp_path / "other")
    path.write_bytes(key[:7])
    assert farm_key(tmp_path) not in (key, key[:7])
    path.unlink()
    path.mkdir()
    with pytest.raises(StateError, match=KEY_FILE):
        farm_key(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"privacy": None}, "noise = 0"),
        ({"privacy": NOISY.model_copy(update={"noise": 2.9})}, "privacy.noise = 2.9"),
        ({"privacy": NOISY.model_copy(update={"score_noise": 2.9})}, "score_noise = 2.9"),
    ],
)
def test_a_farm_that_insists_on_noise_refuses_less(
    lab: Lab, tmp_path: Path, request_: AlignRequest, changes: dict[str, Any], told: str
) -> None:
    reply = answer(lab, tmp_path, request_.model_copy(update=changes), min_noise=3.0)
    assert isinstance(reply, Refusal)
    assert reply.reason == "bad_request"
    assert told in reply.detail
    assert "min_noise" in reply.detail
    assert isinstance(answer(lab, tmp_path, request_, min_noise=3.0), AlignReply)


@pytest.mark.parametrize(
    ("changes", "conditions"),
    [
        ({}, {}),
        ({"privacy": None}, {"max_epsilon": 1e6}),
        ({"privacy": NOISY}, {"min_noise": 1.0}),
    ],
)
def test_moments_which_carry_no_noise_are_refused(
    lab: Lab,
    tmp_path: Path,
    request_: AlignRequest,
    changes: dict[str, Any],
    conditions: dict[str, Any],
) -> None:
    asked = request_.model_copy(update={"moments": "heads", **changes})
    reply = answer(lab, tmp_path, asked, **conditions)
    assert isinstance(reply, Refusal)
    assert "plan.moments = 'source'" in reply.detail


def test_anchors_that_had_to_be_sent_again_cost_nothing(
    lab: Lab, tmp_path: Path, request_: AlignRequest
) -> None:
    anchors = np.frombuffer((lab.server_dir / "anchors.safetensors").read_bytes(), np.uint8)
    named = {"anchors_digest": hashlib.sha256(anchors.data).hexdigest()}
    bare = request_.model_copy(update=named)
    refused = answer(lab, tmp_path, bare)
    assert isinstance(refused, Refusal)
    assert refused.reason == "missing_base"
    aligned(lab, tmp_path, bare.model_copy(update={"attempt": 2, "anchors": anchors}))
    assert spent(tmp_path) == pytest.approx(mu_squared(NOISY, 1, 1))


def test_a_farm_keeps_its_own_record_and_limit_whatever_run_a_server_names(
    lab: Lab, tmp_path: Path, request_: AlignRequest
) -> None:
    limit = cost(2, 2) + 1e-6
    aligned(lab, tmp_path, request_, max_epsilon=limit)
    for cached in (tmp_path / "replies").iterdir():
        cached.unlink()
    other_way = {"attempt": 2, "body_object": "a" * 64, "body_bytes": 1}
    aligned(lab, tmp_path, request_.model_copy(update=other_way), max_epsilon=limit)
    assert spent(tmp_path) == pytest.approx(mu_squared(NOISY, 1, 1)), "the same reply cost twice"
    aligned(lab, tmp_path, request_.model_copy(update={"run": 2}), max_epsilon=limit)
    lenient = NOISY.model_copy(update={"delta": 0.9})
    for cached in (tmp_path / "replies").glob("*.safetensors"):
        cached.unlink()
    same: dict[str, Any] = {"run": 2, "seed": 4}
    for changes in ({"run": 3}, {"round": 2}, {"run": 4, "privacy": lenient}, same):
        refused = answer(lab, tmp_path, request_.model_copy(update=changes), max_epsilon=limit)
        assert isinstance(refused, Refusal)
        assert "max_epsilon" in refused.detail
    assert spent(tmp_path) == pytest.approx(mu_squared(NOISY, 2, 2))
    aligned(lab, tmp_path, request_.model_copy(update={"run": 5}))
    assert spent(tmp_path) == pytest.approx(mu_squared(NOISY, 3, 3)), "counted without a limit too"
    (tmp_path / RECORD_FILE).write_text("{}")
    damaged = answer(lab, tmp_path, request_.model_copy(update={"run": 6}))
    assert isinstance(damaged, Refusal)
    assert damaged.reason == "internal"


def test_a_farm_with_a_limit_sends_nothing_without_noise(
    lab: Lab, tmp_path: Path, request_: AlignRequest
) -> None:
    bare = request_.model_copy(update={"privacy": None})
    refused = answer(lab, tmp_path, bare, max_epsilon=1000.0)
    assert isinstance(refused, Refusal)
    assert "inf" in refused.detail


def test_the_error_of_the_mean_falls_with_the_root_of_the_number_of_farms(
    lab: Lab, tmp_path: Path, request_: AlignRequest
) -> None:
    class Reader:
        def __init__(self, node: int, reply: AlignReply) -> None:
            self.node, self.farm, self._body = (
                node,
                f"{node:02d}",
                expand(reply.update, 100_000_000).tobytes(),
            )

        def read(self, offset: int, length: int) -> bytes:
            return self._body[offset : offset + length]

    fine = request_.train.model_copy(update={"update_bits": 8})  # coding adds next to no error
    plain = request_.model_copy(update={"criterion": None, "train": fine})
    cut_only = plain.model_copy(update={"privacy": PrivacyConfig(clip=0.5)})
    truth = numbers(aligned(lab, tmp_path / "truth", cut_only))
    readers = [Reader(n, aligned(lab, tmp_path / str(n), plain)) for n in range(16)]
    for farms in (1, 4, 16):
        mean = aggregate(readers[:farms], [1.0] * farms, count=len(truth), clip=3.0)
        error = np.sqrt(np.square(mean - truth).mean())
        assert error == pytest.approx(0.5 * 4.0 / math.sqrt(farms), rel=0.1)


# --- a run and its record ------------------------------------------------------------------------


def cost(updates: int, scores: int) -> float:
    return epsilon(mu_squared(NOISY, updates, scores), NOISY.delta)


def story(lab: Lab, runs: list[int]) -> Story:
    with lab.store() as store:
        return summarise(store, Models(lab.server_dir), runs, title="T", provenance=WHERE)


def test_a_private_run_prunes_and_reports_what_it_cost(lab: Lab, tmp_path: Path) -> None:
    link = lab.run(privacy=NOISY)
    sent = [request for _, request in link.requests if isinstance(request, AlignRequest)]
    assert {request.privacy for request in sent} == {NOISY}
    values = snapshot(lab.server_dir)
    assert values["state"] == "done"
    told = values["privacy"]
    assert told["epsilon"] == pytest.approx(cost(2, 1))
    assert told["farms"]["farm1"] == {"epsilon": told["epsilon"], "updates": 2, "scores": 1}
    assert "accuracies" in told["outside"]
    json.dumps(values, allow_nan=False)
    assert "epsilon" in shown(show(values))
    with lab.store() as store:
        run = store.latest_run()
        assert run is not None
        masks = store.masks(run.run)
        (agreed,) = [row.importance for row in store.scores(run.run)[1] if row.farm is None]
    assert agreed is not None
    assert agreed.sum() == pytest.approx(1, rel=1e-5), "the maximum over noisy farms counted"
    assert len(masks) == 2, "nothing was pruned"
    tale = story(lab, [run.run])
    assert tale.privacy is not None
    assert tale.privacy.epsilon == pytest.approx(cost(2, 1))
    assert tale.result()["privacy"]["updates"] == 2
    write_report(tale, tmp_path / "report.html", {})
    assert "Privacy, epsilon" in (tmp_path / "report.html").read_text()
    assert "privacy of farm farm0" in shown(terminal_table(tale))


def test_runs_of_one_story_add_up_and_one_without_noise_has_no_bound(lab: Lab) -> None:
    lab.run(privacy=NOISY)
    with lab.store() as store:
        first = store.latest_run()
    assert first is not None
    lab.run(privacy=NOISY, label="again")
    twice = story(lab, [first.run, first.run + 1]).privacy
    assert twice is not None
    assert twice.epsilon == pytest.approx(cost(4, 2))
    lab.run()
    assert snapshot(lab.server_dir)["privacy"] is None
    assert story(lab, [first.run + 2]).privacy is None
    lab.run(privacy=PrivacyConfig(clip=0.5, noise=4.0))
    told = snapshot(lab.server_dir)
    assert told["privacy"]["epsilon"] is None, "scores left in the clear"
    assert "no bound" in shown(show(told))
    mixed = story(lab, [first.run + 2, first.run])
    assert mixed.privacy is not None
    assert mixed.privacy.epsilon is None


def test_a_reply_that_never_arrived_is_spent_and_one_sent_twice_only_once(lab: Lab) -> None:
    lost: list[int] = []

    def lose(node: int, request: Request, _reply: Reply) -> str | None:
        if isinstance(request, AlignRequest) and request.round == 1:
            if node == 2:
                lost.append(node)
                return "lost on the way"
            if request.attempt == 1:
                return "the first answer is lost"
        return None

    lab.run(fault=lose, privacy=NOISY)
    assert len(lost) == lab.config.rounds.attempts
    with lab.store() as store:
        run = store.latest_run()
        assert run is not None
        assert len(store.replies(run.run, 1)) == 1
        found = {row.farm: row for row in privacy.spent(store, run.run, NOISY)}
        assert RejectReason.LOST in {row.reason for row in store.rejections(run.run)}
    assert (found["farm0"].updates, found["farm0"].scores) == (2, 1)
    assert found["farm1"].epsilon(1e-5) == pytest.approx(cost(2, 1))


def test_a_run_ends_with_a_report_before_it_overspends(lab: Lab) -> None:
    budget = NOISY.model_copy(update={"max_epsilon": cost(2, 1) + 1e-6})
    plan = lab.config.plan.model_copy(update={"rounds": 4})
    link = lab.run(privacy=budget, plan=plan)
    rounds = {request.round for _, request in link.requests if isinstance(request, AlignRequest)}
    assert rounds == {1, 2}
    values = snapshot(lab.server_dir)
    assert values["state"] == "done"
    assert "ended after round 2: round 3 would bring farm" in values["detail"]
    assert values["privacy"]["epsilon"] <= budget.max_epsilon
    assert all("model" in row["reports"] for row in values["farms"])


def test_a_budget_that_allows_no_round_is_an_error_and_nobody_is_asked(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="max_epsilon"):
        lab.run(privacy=NOISY.model_copy(update={"max_epsilon": cost(1, 1) - 1e-6}))
    assert snapshot(lab.server_dir)["privacy"]["farms"] == {}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "fieldfed.db") as opened:
        yield opened


def test_a_round_opened_again_counts_once_and_stays_scored(store: Store) -> None:
    run = store.start_run("{}", 0, "aa" * 32, "{}", "")
    mask = store.run(run).mask
    for node, farm in ((1, "a"), (2, "a"), (3, "b")):
        store.upsert_farm(run, node, farm, 10, 2)
    same: dict[str, Any] = {"kind": "align", "base": "aa" * 32, "mask": mask, "quorum": 1}
    for scored in (True, False):
        store.open_round(run, 1, **same, deadline=1.0, scored=scored)
        store.record_sent(run, 1, 1, 1, 100)
        store.record_sent(run, 1, 2, 1, 100)  # the same farm, after it was started again
    store.open_round(run, 2, **same, deadline=1.0)
    store.record_sent(run, 2, 3, 1, 100)
    store.record_sent(run, 2, 3, 1, 100, kind="evaluate")
    found = privacy.spent(store, run, NOISY)
    assert [(row.farm, row.updates, row.scores) for row in found] == [("a", 1, 1), ("b", 1, 0)]


def shown(what: Any) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as captured:
        console.print(what)
    return captured.get()
