"""What a farm keeps of its training bases."""

import os
from pathlib import Path

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from client.state import BACKBONES_KEPT, STUDENTS_KEPT, FarmState
from common import backbone
from common.spec import ModelSpec
from common.student import Student, student_spec
from tests.lab.school import STUDENT
from tests.lab.versions import model_of, pruned

Model = tuple[VisionTransformer, ModelSpec]


@pytest.fixture
def state(tmp_path: Path) -> FarmState:
    return FarmState(tmp_path)


def save(state: FarmState, model: Model, *numbers: int) -> None:
    for number in numbers:
        digest = f"{number:064x}"
        state.save_backbone(digest, *model)
        path = state.folder / "backbones" / f"{digest}.safetensors"
        os.utime(path, (number, number))


def held(state: FarmState) -> list[int]:
    return [int(digest, 16) for digest in state.held()]


def test_the_newest_stay(state: FarmState) -> None:
    save(state, model_of(), 1, 2, 3, 4, 5)
    assert held(state) == [5, 4, 3]
    assert len(held(state)) == BACKBONES_KEPT


def test_the_one_before_the_last_cut_stays_until_the_next(state: FarmState) -> None:
    dense = model_of()
    smaller = pruned(*model_of())
    save(state, dense, 1, 2)
    save(state, smaller, 3, 4, 5, 6, 7)
    assert held(state) == [7, 6, 5, 2]
    smallest = pruned(*pruned(*model_of()))
    save(state, smallest, 8, 9, 10)
    assert held(state) == [10, 9, 8, 7]


def test_a_damaged_one_is_not_taken_for_it(state: FarmState) -> None:
    (state.folder / "backbones" / f"{1:064x}.safetensors").write_bytes(b"half")
    os.utime(state.folder / "backbones" / f"{1:064x}.safetensors", (1, 1))
    save(state, model_of(), 2, 3, 4)
    assert held(state) == [4, 3, 2]


def test_students_push_nothing_out_but_older_students(state: FarmState) -> None:
    save(state, model_of(), 1, 2)
    spec = student_spec(Student(STUDENT), model_of()[1])
    digests = []
    for seed in range(STUDENTS_KEPT + 1):
        student = Student(STUDENT, seed=seed).eval()
        digests.append(backbone.digest(student, spec))
        state.save_student(digests[-1], student, spec)
        state.save_classifier(digests[-1], nn.Linear(spec.width, 2), ("a", "b"))
        path = state.folder / "students" / f"{digests[-1]}.safetensors"
        os.utime(path, (seed, seed))
    kept = tuple(reversed(digests))[:STUDENTS_KEPT]
    assert state.students() == kept
    assert state.held() == (f"{2:064x}", f"{1:064x}", *kept)
    assert state.load_classifier(digests[0]) is None
    assert state.load_classifier(digests[1]) is not None


def test_a_damaged_student_counts_as_absent(state: FarmState) -> None:
    student = Student(STUDENT).eval()
    spec = student_spec(student, model_of()[1])
    digest = backbone.digest(student, spec)
    path = state.folder / "students" / f"{digest}.safetensors"
    whole = backbone.pack(student, spec)
    flipped = whole[:-4] + bytes(byte ^ 255 for byte in whole[-4:])
    for body in (b"", whole[:-4], flipped):
        state.save_student(digest, student, spec)
        assert state.load_student(digest) is not None
        path.write_bytes(body)
        assert state.load_student(digest) is None
        assert state.students() == ()
