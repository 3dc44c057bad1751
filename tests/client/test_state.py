"""What a farm keeps of its training bases."""

import os
from pathlib import Path

import pytest
from timm.models.vision_transformer import VisionTransformer

from client.state import BACKBONES_KEPT, FarmState
from common.spec import ModelSpec
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
