"""Students: what of them is shared, what follows from a place's own images, and what is refused."""

from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import backbone, codec, networks
from common.cost import cost_of
from common.errors import DataError, ModelError, ProtocolError
from common.export import exported
from common.mask import Mask
from common.spec import StudentSpec, spec_of_text
from common.step import Cut, Step
from common.student import Student, recalibrate, student_macs, student_spec, unpack_student
from common.trainable import trainable_set
from tests.lab.network import SIDE
from tests.lab.versions import model_of

NAME = "test_efficientnet"


def made(seed: int = 0) -> tuple[Student, StudentSpec]:
    student = Student(NAME, seed=seed).eval()
    return student, student_spec(student, model_of()[1])


def images(seed: int, batches: int = 3, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, 3, SIDE, SIDE, generator=generator) * (1 + seed) for _ in range(batches)
    ]


def statistics(student: Student) -> list[Tensor]:
    norms = [one for one in student.modules() if isinstance(one, _BatchNorm)]
    assert norms
    found = [tensor for one in norms for tensor in (one.running_mean, one.running_var)]
    return [tensor.clone() for tensor in found if tensor is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_statistics_are_no_part_of_what_is_shared() -> None:
    student, spec = made()
    digest, packed = backbone.digest(student, spec), backbone.pack(student, spec)
    before = statistics(student)
    recalibrate(student, images(1))
    assert not same(before, statistics(student))
    assert backbone.digest(student, spec) == digest
    assert backbone.pack(student, spec) == packed
    assert set(load(packed)) == {name for name, _ in student.named_parameters()}
    count = trainable_set(student, "full").layout.count
    assert count == sum(one.numel() for one in student.parameters())


def test_statistics_follow_from_parameters_and_images_alone() -> None:
    student, spec = made()
    recalibrate(student, images(1))
    first = statistics(student)
    recalibrate(student, images(2))  # as if it had been at another farm before
    assert not same(first, statistics(student))
    arrived, _ = unpack_student(backbone.pack(student, spec))
    for one in (student, arrived):
        recalibrate(one, images(1))
        assert same(first, statistics(one))


def test_statistics_are_the_means_of_the_batches_own() -> None:
    student, _ = made()
    norm = next(one for one in student.modules() if isinstance(one, _BatchNorm))
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    recalibrate(student, [*images(0), torch.zeros(1, 3, SIDE, SIDE)])
    hook.remove()
    assert len(seen) == 3, "an image alone has no variance"
    mean = torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0)
    variance = torch.stack([one.var((0, 2, 3)) for one in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_afterwards_a_student_trains_and_judges_as_before() -> None:
    student, _ = made()
    momenta = [one.momentum for one in student.modules() if isinstance(one, nn.BatchNorm2d)]
    recalibrate(student, images(0))
    assert not any(one.training for one in student.modules())
    after = [one.momentum for one in student.modules() if isinstance(one, nn.BatchNorm2d)]
    assert after == momenta
    with pytest.raises(DataError, match="fewer than two images"):
        recalibrate(student, images(0, size=1))
    assert not any(one.training for one in student.modules())


def test_what_is_packed_comes_back_as_what_it_was() -> None:
    student, spec = made(1)
    found, found_spec = networks.unpack(backbone.pack(student, spec))
    assert isinstance(found, Student)
    assert found_spec == spec == spec_of_text(spec.to_json())
    assert backbone.digest(found, found_spec) == backbone.digest(student, spec)
    model, dense = model_of()
    again, again_spec = networks.unpack(backbone.pack(model, dense))
    assert (type(again), again_spec) == (type(model), dense)


def damaged_bodies() -> Iterator[tuple[bytes, str]]:
    student, spec = made()
    body = backbone.pack(student, spec)
    yield b"", "cannot be read"
    yield body[:-4], "cannot be read"
    yield backbone.pack(*model_of()), "cannot be read"
    yield backbone.pack(student, spec.model_copy(update={"name": "test_resnet"})), "not those of"
    yield backbone.pack(student, spec.model_copy(update={"name": "hf-hub:x/y"})), "timm has no"


@pytest.mark.parametrize(("body", "told"), list(damaged_bodies()))
def test_a_body_that_is_no_student_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        unpack_student(body)


def test_a_student_has_nothing_to_cut_and_no_place_for_factors() -> None:
    student, spec = made()
    with pytest.raises(ModelError, match="only a transformer has layers to put lora factors"):
        trainable_set(student, "lora")
    model, dense = model_of()
    count = trainable_set(student, "full").layout.count
    update = codec.encode(np.zeros(count, np.float32), "0" * 64)
    keep = Mask.dense(dense).keep_in(Mask.dense(dense))
    cut = Cut.between(model, model, keep, "0" * 64)
    with pytest.raises(ProtocolError, match="a cut of a student"):
        Step(update, cut).apply(student, spec)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mobilenet_of_mine", "timm has no 'mobilenet_of_mine'"),
        ("test_vit", "'test_vit' is no convolutional network"),
    ],
)
def test_what_cannot_be_a_student(name: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        student_spec(Student(name), model_of()[1])


def test_macs_are_those_of_its_graph() -> None:
    student, spec = made()
    assert student_macs(spec) == cost_of(exported(student, SIDE), SIDE).macs


def test_its_parameters_have_the_names_of_timm() -> None:
    student, _ = made()
    network = timm.create_model(NAME, pretrained=False, num_classes=0)
    names = [name for name, _ in network.named_parameters()]
    assert [name for name, _ in student.network.named_parameters()] == names
