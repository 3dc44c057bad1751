"""The same backbone for images of another side."""

from pathlib import Path

import pytest
import torch

from common.backbone import load_pretrained, save_backbone
from common.errors import ModelError
from common.resize import at_size, spec_at
from tests.common.test_efficient import KINDS, spec_of, twins


def test_its_own_side_changes_nothing() -> None:
    model, _ = twins()
    assert at_size(model, spec_of(), 32) == (model, spec_of())


def test_only_the_positions_are_others() -> None:
    model, _ = twins()
    larger, spec = at_size(model, spec_of(), 64)
    assert spec == spec_of().model_copy(update={"image_size": 64})
    before, after = model.state_dict(), larger.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"pos_embed"}
    with torch.inference_mode():
        assert torch.isfinite(larger(torch.zeros(1, 3, 64, 64))).all()


def test_it_is_what_weights_from_a_file_become(tmp_path: Path) -> None:
    model, _ = twins()
    path = tmp_path / "weights.safetensors"
    save_backbone(path, model, spec_of())
    larger, spec = at_size(model, spec_of(), 64)
    loaded = load_pretrained(spec, str(path))
    for name, one in loaded.state_dict().items():
        assert torch.equal(one, larger.state_dict()[name]), name


def test_the_same_shares_of_tokens_stay() -> None:
    model, _ = twins(**KINDS["both"])
    larger, spec = at_size(model, spec_of(**KINDS["both"]), 64)
    assert spec.kept_tokens == (64, 32, 32, 32)
    with torch.inference_mode():
        assert larger(torch.zeros(1, 3, 64, 64)).shape == (1, 48)
    assert spec_at(spec, 32).kept_tokens == spec_of(**KINDS["both"]).kept_tokens


def test_a_side_that_it_cannot_take() -> None:
    model, _ = twins()
    with pytest.raises(ModelError, match="cannot be built at 8 px"):
        at_size(model, spec_of(), 8)
