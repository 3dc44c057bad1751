"""Federated distillation in the lab: real rounds, real farms, one student."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from client.farm import Farm
from client.infer import Classifier
from client.pupil import portable_pupil
from client.state import FarmState
from common import backbone, codec
from common.compress import expand
from common.config import PrivacyConfig, RoundConfig, ServerConfig, TrainConfig
from common.errors import ConfigError, ModelError, RejectReason, StateError
from common.export import TOLERANCE
from common.images import Purpose, open_folder
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
)
from common.runtime import Runtime
from common.student import recalibrate
from common.trainable import trainable_set
from server.centre import run_centre
from server.cli import app
from server.distil import last_student, last_teacher, lesson_settings, write_student
from server.facts import Facts, planned_rounds
from server.models import Models
from server.provenance import provenance
from server.publish import publish_run
from server.registry import Registry
from server.settings import RunSettings
from server.status import snapshot
from server.store import Store
from server.summary import summarise
from tests.lab.network import Lab
from tests.lab.school import STUDENT, School
from tests.server.test_mixed import older

LIMIT = 10_000_000


class Heard:
    """The replies of a run, as they came."""

    def __init__(self) -> None:
        self.asked: list[AlignRequest] = []
        self.aligned: list[AlignReply] = []
        self.reports: list[EvaluateReply] = []

    def __call__(self, _node: int, request: Request, reply: Reply) -> None:
        if isinstance(request, AlignRequest):
            self.asked.append(request)
        if isinstance(reply, AlignReply):
            self.aligned.append(reply)
        elif isinstance(reply, EvaluateReply):
            self.reports.append(reply)


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory, heard: Heard) -> School:
    """Three farms that have taught a student for two rounds."""
    made = School(tmp_path_factory.mktemp("school"))
    made.teach(heard)
    return made


def test_it_ends_with_a_report_on_teacher_and_student_by_every_farm(school: School) -> None:
    with school.store() as store:
        run = store.run(2)
        reports = {(row.label, row.farm): row.base for row in store.reports(2)}
        rows = list(store.candidates(2).values())
        rounds = [row for row in store.rounds(2) if row.kind == "align"]
        assert run.state == "done"
        assert last_teacher(store) == run.base, "a student teaches nobody"
    farms = ["farm0", "farm1", "farm2"]
    assert reports == {
        **{("probe", farm): run.base for farm in farms},
        **{("student", farm): rows[-1].digest for farm in farms},
    }
    settings = RunSettings.model_validate_json(run.config_json)
    assert settings.taught is not None
    assert [row.parent for row in rows] == [settings.taught.student, rows[0].digest]
    assert [row.participants for row in rounds] == [3, 3]
    assert all(row.macs_ratio is not None and row.macs_ratio < 0.5 for row in rounds)


def test_what_travels_is_a_byte_for_every_parameter(school: School, heard: Heard) -> None:
    student, _ = Models(school.server_dir).load_student(school.students()[-1])
    count = sum(one.numel() for one in student.parameters())
    assert len(heard.aligned) == 6
    for reply in heard.aligned:
        header = codec.read_header(expand(reply.update, LIMIT))
        assert (header.count, header.bits) == (count, 8), "statistics are not among the numbers"
    with school.store() as store:
        rows = [row for row in store.traffic(2) if row.kind == "align"]
    up = {(row.round, row.farm): row.bytes_up for row in rows}
    down = [row.bytes_down for row in rows if row.round > 1]
    assert len(up) == 6
    assert all(0.5 * count < size < 1.2 * count for size in [*up.values(), *down])


def test_the_next_student_is_the_weighted_mean_of_what_farms_learnt(
    school: School, heard: Heard
) -> None:
    models, digest = Models(school.server_dir), school.students()[0]
    with school.store() as store:
        parent = store.candidates(2)[1].parent
    before, _ = models.load_student(parent)
    layout = trainable_set(before, "full").layout
    start = layout.flatten(dict(before.named_parameters()))
    first = [reply for reply in heard.aligned if reply.round == 1]
    updates = [
        codec.decode(expand(reply.update, LIMIT), base=parent, count=layout.count)
        for reply in first
    ]
    norms = np.array([np.linalg.norm(one) for one in updates])
    clipped = np.minimum(1, RoundConfig().clip * np.median(norms) / norms)
    weights = np.array([reply.examples for reply in first]) * clipped
    total = sum(reply.examples for reply in first)
    mean = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True)) / total
    after, _ = models.load_student(digest)
    moved = layout.flatten(dict(after.named_parameters())) - start
    scales = [np.abs(mean[i : i + 256]).max() for i in range(0, layout.count, 256)]
    bound = np.repeat(scales, 256)[: layout.count] / 127 * 0.51 + 1e-6
    assert (np.abs(moved - mean) <= bound).all()


def test_every_farm_has_the_same_student_and_statistics_of_its_own(school: School) -> None:
    digest, found = school.students()[-1], []
    for config, state in school.farms[:2]:
        held = FarmState(state).load_student(digest)
        assert held is not None
        student, spec = held
        folder = open_folder(config.farm.data)
        recalibrate(student, [next(folder.fit.batches(spec, 32))[0]])
        found.append(student)
    one, other = (dict(student.named_parameters()) for student in found)
    assert all(torch.equal(one[name], other[name]) for name in one)
    means = [dict(student.named_buffers())["network.bn1.running_mean"] for student in found]
    assert not torch.equal(*means)


def test_a_farm_classifies_with_it(school: School) -> None:
    config, state = school.farms[2]
    folder = open_folder(config.farm.data)
    made = portable_pupil(FarmState(state), folder, 1)
    assert (made.digest, made.name) == (school.students()[-1], STUDENT)
    classifier, about = Classifier(made.bundle), made.bundle.about
    assert about.classes == folder.classes
    part = folder.open_test(Purpose.REPORT)
    right = [
        classifier.logits(images.numpy()).argmax(1) == labels.numpy()
        for images, labels in part.batches(about, 32)
    ]
    with school.store() as store:
        report = next(r for r in store.reports(2) if (r.label, r.farm) == ("student", "farm2"))
    assert np.concatenate(right).mean() == pytest.approx(report.accuracy, abs=1e-9)


def test_the_same_student_comes_out_when_the_server_is_killed_in_between(
    school: School, tmp_path: Path
) -> None:
    other = School(tmp_path)

    class Killed(BaseException):
        pass

    def kill(node: int, request: Request, _reply: Reply) -> None:
        if isinstance(request, AlignRequest) and (request.round, node) == (2, 2):
            raise Killed

    with pytest.raises(Killed):
        other.teach(kill)
    again = Heard()
    link = other.teach(again)
    assert other.students() == school.students()
    asked = [request for _, request in link.requests if isinstance(request, AlignRequest)]
    assert {request.round for request in asked} == {2}
    with other.store() as store:
        assert len(store.runs()) == 2, "it is the same run"


def test_a_farm_that_lost_the_teacher_is_sent_it_again(tmp_path: Path) -> None:
    school = School(tmp_path, 2)

    def lose(node: int, request: Request, _reply: Reply) -> None:
        if node == 2 and isinstance(request, AlignRequest) and request.round == 1:
            shutil.rmtree(school.farms[1][1] / "backbones")

    link = school.teach(lose, rounds=3)
    asked = [
        (request.round, request.kind, request.body_kind)
        for node, request in link.requests
        if node == 2 and not isinstance(request, HelloRequest)
    ]
    assert (0, "evaluate", "full") in asked[asked.index((2, "align", "delta")) :]
    with school.store() as store:
        answered = {number: {row.farm for row in store.replies(2, number)} for number in (1, 2, 3)}
        assert not store.pauses(), "nobody is to blame"
    assert answered == {1: {"farm0", "farm1"}, 2: {"farm0"}, 3: {"farm0", "farm1"}}


def test_a_farm_that_came_later_is_sent_the_teacher_first(tmp_path: Path) -> None:
    school = School(tmp_path, 2)
    shutil.rmtree(school.farms[1][1])
    link = school.teach(rounds=1)
    asked = [
        (request.kind, request.base_kind, request.body_kind)
        for node, request in link.requests
        if node == 2 and not isinstance(request, HelloRequest)
    ]
    assert asked[:2] == [("evaluate", "backbone", "full"), ("align", "student", "full")]


def test_a_farm_of_an_older_release_is_not_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    school = School(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "server"):
        link = school.teach(older(2), rounds=1)
    assert {node for node, _ in link.requests} == {1, 3}
    told = "farm farm1 is not asked: its release knows of no students; upgrade it"
    assert caplog.messages.count(told) == 1
    with school.store() as store:
        assert not store.rejections(2)
        assert {row.farm for row in store.replies(2, 1)} == {"farm0", "farm2"}
    with pytest.raises(StateError, match="every farm is too old to teach a student"):
        school.teach(older(1, 2, 3), rounds=1, lr=1e-3)


def test_bad_replies_are_put_into_quarantine(tmp_path: Path) -> None:
    school = School(tmp_path, 3)

    def spoil(node: int, request: Request, reply: Reply) -> Reply | None:
        if not isinstance(reply, AlignReply) or node == 1:
            return None
        update = expand(reply.update, LIMIT)
        header = codec.read_header(update)
        values = codec.decode(update, base=reply.base, count=header.count)
        if node == 2:
            values = values[:-2]
        bad = codec.encode(values, reply.base, bits=32).copy()
        if node == 3:
            bad[-64:] = 255
        return reply.model_copy(update={"update": bad})

    school.teach(spoil, rounds=1)
    with school.store() as store:
        reasons = {row.node: row.reason for row in store.rejections(2)}
        assert [row.farm for row in store.replies(2, 1)] == ["farm0"]
    assert reasons == {2: RejectReason.SHAPE, 3: RejectReason.NOT_FINITE}


def test_updates_are_clipped_and_noised_as_any(tmp_path: Path) -> None:
    school, quiet, noisy = School(tmp_path, 2), Heard(), Heard()
    clip = 0.05
    school.play(school.lesson(PrivacyConfig(clip=clip), rounds=1), quiet)
    school.play(school.lesson(PrivacyConfig(clip=clip, noise=1.0), rounds=1), noisy)
    lengths = []
    for heard in (quiet, noisy):
        update = expand(heard.aligned[0].update, LIMIT)
        header = codec.read_header(update)
        values = codec.decode(update, base=heard.aligned[0].base, count=header.count)
        lengths.append(float(np.linalg.norm(values)))
        assert heard.aligned[0].loss == 0, "nothing depends on it, so it is kept back"
    assert lengths[0] == pytest.approx(clip, rel=0.05)
    assert lengths[1] > 0.5 * clip * np.sqrt(header.count)
    assert snapshot(school.server_dir)["privacy"] is not None


# --- what an operator gets -----------------------------------------------------------------------


def test_it_is_written_under_the_names_of_timm_and_as_a_graph(
    school: School, tmp_path: Path
) -> None:
    with school.store() as store:
        found = last_student(store)
    about = write_student(school.config, Models(school.server_dir), found, tmp_path)
    assert json.loads((tmp_path / "student.json").read_text()) == about
    assert about["student"] == school.students()[-1]
    network: Any = timm.create_model(STUDENT, pretrained=False, num_classes=0).eval()
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not torch.equal(network.bn1.running_mean, torch.zeros_like(network.bn1.running_mean))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(images).numpy()
    graph = (tmp_path / "model-fp32.onnx").read_bytes()
    worst = np.abs(Runtime(graph).features(images.numpy()) - expected).max()
    assert worst <= TOLERANCE * max(1.0, float(np.abs(expected).max()))


def test_the_page_shows_it_and_says_of_no_cut(school: School) -> None:
    with Facts.open(school.server_dir / "fieldfed.db", read_only=True) as facts:
        points = facts.points(2)
        assert [(point.round, point.event) for point in points] == [(1, None), (2, None)]
        assert planned_rounds(facts.run(2)) == 2


def test_without_source_images_it_has_no_statistics(school: School, tmp_path: Path) -> None:
    nowhere = school.config.backbone.model_copy(update={"source": None})
    config = school.config.model_copy(update={"backbone": nowhere})
    with school.store() as store:
        found = last_student(store, 2)
    about = write_student(config, Models(school.server_dir), found, tmp_path)
    assert about["statistics"] == "none"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "student.json"]
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "running" in name]


def test_status_and_report_tell_of_it_and_the_registry_does_not_take_it(
    school: School, tmp_path: Path
) -> None:
    values = snapshot(school.server_dir)
    assert [row["state"] for row in values["rounds"]] == ["committed", "committed"]
    assert {"probe", "student"} == set(values["farms"][0]["reports"])
    with school.store() as store:
        models = Models(school.server_dir)
        story = summarise(store, models, [2], title="T", provenance=provenance("none", 0))
        assert story.macs == store.candidates(2)[2].macs
        assert story.macs_ratio < 0.5
        assert not any(point.event for point in story.rounds), "nothing was pruned"
        with (
            Registry.create(tmp_path, "valley") as registry,
            pytest.raises(ConfigError, match="run 2 has taught a student"),
        ):
            publish_run(registry, store, models, store.run(2))
        with pytest.raises(StateError, match="is a student"):
            models.view(school.students()[0])
        with pytest.raises(StateError, match="is a backbone"):
            models.load_student(store.run(2).base)


# --- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "error", "told"),
    [
        ({"name": "mobilenet_of_mine"}, ModelError, "timm has no 'mobilenet_of_mine'"),
        ({"name": "test_vit"}, ModelError, "no convolutional network"),
        ({"name": "mobilenetv3_large_100"}, ConfigError, "costs as much as its teacher"),
        ({"weights": Path("none.safetensors")}, ModelError, "no weights at 'none.safetensors'"),
    ],
)
def test_students_that_cannot_be_taught(
    school: School, terms: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        school.lesson(**terms)


def test_a_teacher_that_drops_tokens_has_no_map(tmp_path: Path) -> None:
    settings = {"options": {"depth": 4, "embed_dim": 192, "num_heads": 4, "patch_size": 8}}
    lab = Lab(tmp_path, 1, {"backbone": {**settings, "token_macs": 0.7}}, rounds=1)
    model, spec = backbone.load_backbone(lab.server_dir / "base.safetensors")
    models = Models(lab.server_dir)
    teacher = models.save(model, spec)
    config = lab.config.model_copy(
        update={"distil": lab.config.distil.model_copy(update={"name": STUDENT})}
    )
    with pytest.raises(ConfigError, match=r"set distil\.beta = 0"):
        lesson_settings(config, models, teacher)
    blind = config.distil.model_copy(update={"beta": 0.0})
    settings_of = lesson_settings(config.model_copy(update={"distil": blind}), models, teacher)
    assert settings_of.lesson is not None
    assert settings_of.lesson.beta == 0


def test_no_teacher_yet(tmp_path: Path) -> None:
    with Store.open(tmp_path / "fieldfed.db") as store:
        with pytest.raises(StateError, match="no teacher yet: no run has ended with a backbone"):
            last_teacher(store)
        with pytest.raises(StateError, match="no student yet"):
            last_student(store)
    made = CliRunner().invoke(app, ["init", str(tmp_path / "n"), "--backbone", "test_vit"])
    assert made.exit_code == 0, made.output
    for command in (["distil"], ["student", "--out", str(tmp_path / "s")]):
        said = CliRunner().invoke(app, [command[0], str(tmp_path / "n"), *command[1:]])
        assert isinstance(said.exception, StateError)
        assert "yet" in str(said.exception)


def test_a_run_that_distils_teaches_nobody(school: School) -> None:
    with school.store() as store, pytest.raises(StateError, match="run 2 has ended with a"):
        last_teacher(store, 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": TrainConfig(dal_weight=0)}, "train.trainable = 'lora'"),
        ({"train": TrainConfig(trainable="full")}, "train.dal_weight"),
        ({"train": TrainConfig(trainable="full", dal_weight=0, proximal=1)}, "train.proximal"),
        ({"plan": {"prune_macs": 0.5}}, "plan.prune_heads or another budget"),
    ],
)
def test_what_only_a_transformer_can_do_is_not_asked_of_a_student(
    changes: dict[str, Any], told: str
) -> None:
    plain = {"train": TrainConfig(trainable="full", dal_weight=0)}
    taught = {"teacher": "a" * 64, "student": "b" * 64}
    RunSettings.model_validate({"config": ServerConfig.model_validate(plain), "taught": taught})
    config = ServerConfig.model_validate({**plain, **changes})
    with pytest.raises(ValidationError, match=told):
        RunSettings.model_validate({"config": config, "taught": taught})
    with pytest.raises(ValidationError, match="local-only"):
        RunSettings.model_validate(
            {"config": ServerConfig.model_validate(plain), "taught": taught, "local_rounds": 1}
        )


def test_a_centre_teaches_no_student_yet(tmp_path: Path) -> None:
    plain = {"train": {"trainable": "full", "dal_weight": 0}}
    taught = {"teacher": "a" * 64, "student": "b" * 64}
    settings = RunSettings.model_validate({"config": plain, "taught": taught})

    def reach(_orders: object) -> Any:
        raise AssertionError("nobody is reached")

    with pytest.raises(ConfigError, match="teach a student yet"):
        run_centre(reach, tmp_path, settings)


def test_a_farm_refuses_what_makes_no_sense(school: School, heard: Heard) -> None:
    farm, asked = Farm.open(*school.farms[0]), heard.asked[-1]
    assert asked.lesson is not None
    base = {"round": 99, "body_kind": "none", "body": None}
    for changes, told in (
        ({"lesson": None}, "is a student: it can only be taught and evaluated"),
        ({"criterion": "taylor"}, "is a student"),
        ({"train": TrainConfig(dal_weight=0)}, "only a transformer has layers"),
        (
            {"base": asked.lesson.teacher, "base_kind": "backbone"},
            "is a backbone: it is not taught",
        ),
    ):
        reply = farm.handle(asked.model_copy(update={**base, **changes}))
        assert isinstance(reply, Refusal)
        assert reply.reason == "bad_request"
        assert told in reply.detail
    unknown = asked.lesson.model_copy(update={"teacher": "c" * 64})
    reply = farm.handle(asked.model_copy(update={**base, "lesson": unknown}))
    assert isinstance(reply, Refusal)
    assert reply.reason == "missing_base"
    assert "does not hold the teacher cccc" in reply.detail
