"""Candidates on disk: what is missing or damaged is made again from the parent and the step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common import backbone, codec
from common.catchup import replace, steps_of
from common.compress import expand
from common.errors import StateError
from common.layout import add
from common.step import MAX_BYTES, Step
from common.trainable import trainable_set
from server.models import Models
from tests.lab.network import SIDE, TINY


@pytest.fixture
def chain(tmp_path: Path) -> list[str]:
    """Digests of a base and two candidates, each a step from the one before."""
    spec = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
    torch.manual_seed(0)
    models = Models(tmp_path)
    digests = [models.save(backbone.build(spec), spec)]
    for number in range(2):
        model, _ = models.load(digests[-1])
        layout = trainable_set(model, "bias").layout
        values = np.random.default_rng(number).standard_normal(layout.count, dtype=np.float32)
        step = codec.encode(values * np.float32(0.01), digests[-1])
        add(model, layout, codec.decode(step, base=digests[-1], count=layout.count))
        digests.append(models.save(model, spec, step))
    models.settle()
    return digests


def whole(folder: Path, digest: str) -> Path:
    return Models(folder).path(digest)


def test_a_candidate_is_on_disk_whole_and_as_a_step(tmp_path: Path, chain: list[str]) -> None:
    for digest in chain:
        model, spec = backbone.load_backbone(whole(tmp_path, digest))
        assert backbone.digest(model, spec) == digest
    models = Models(tmp_path)
    assert [models.step(digest) is None for digest in chain] == [True, False, False]
    body = expand(models.body(chain[2]), MAX_BYTES)
    assert bytes(body) == whole(tmp_path, chain[2]).read_bytes()


@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_what_a_crash_left_behind_is_made_again(
    tmp_path: Path, chain: list[str], harm: str
) -> None:
    for digest in chain[1:]:
        path = whole(tmp_path, digest)
        data = bytearray(path.read_bytes())
        path.unlink()
        if harm == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif harm == "changed":
            data[-5] ^= 0x40
            path.write_bytes(data)
    models = Models(tmp_path)
    model, spec = models.load(chain[2])
    assert backbone.digest(model, spec) == chain[2]
    again, _ = backbone.load_backbone(whole(tmp_path, chain[2]))
    assert backbone.digest(again, spec) == chain[2]


def test_a_damaged_step_is_named(tmp_path: Path, chain: list[str]) -> None:
    whole(tmp_path, chain[2]).unlink()
    step = tmp_path / "models" / f"{chain[2]}.delta"
    data = bytearray(step.read_bytes())
    data[-5] ^= 0x40
    step.write_bytes(data)
    with pytest.raises(StateError, match="delta' is damaged; restore it"):
        Models(tmp_path).load(chain[2])


def test_what_has_no_step_cannot_be_made_again(tmp_path: Path, chain: list[str]) -> None:
    whole(tmp_path, chain[0]).write_bytes(b"half")
    with pytest.raises(StateError, match="is damaged; restore it from a backup"):
        Models(tmp_path).load(chain[0])


def test_a_loaded_candidate_may_be_changed_without_harm(tmp_path: Path, chain: list[str]) -> None:
    models = Models(tmp_path)
    model, spec = models.load(chain[1])
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert backbone.digest(*models.load(chain[1])) == chain[1]
    assert backbone.digest(model, spec) != chain[1]


def test_files_half_written_are_swept(tmp_path: Path, chain: list[str]) -> None:
    half = tmp_path / "models" / f".{chain[1]}.safetensors.x1"
    half.write_bytes(b"half")
    Models(tmp_path).sweep()
    assert not half.exists()
    assert whole(tmp_path, chain[1]).is_file()


def longer(folder: Path, chain: list[str], steps: int) -> list[str]:
    """The chain with so many further small steps."""
    models = Models(folder)
    digests = list(chain)
    for number in range(steps):
        model, spec = models.load(digests[-1])
        trained = trainable_set(model, "bias")
        values = np.random.default_rng(number).standard_normal(trained.layout.count)
        update = codec.encode(values.astype(np.float32) * np.float32(0.01), digests[-1])
        step = Step(update)
        model, spec = step.apply(model, spec)
        digests.append(models.save(model, spec, step.to_bytes()))
    models.settle()
    return digests


def test_a_farm_gets_the_shortest_way(tmp_path: Path, chain: list[str]) -> None:
    digests = longer(tmp_path, chain, 6)
    models, newest = Models(tmp_path), digests[-1]
    kinds = []
    for behind in range(1, len(digests)):
        way = models.way({digests[-1 - behind]}, newest)
        assert way is not None
        assert way.start == digests[-1 - behind]
        kinds.append(way.kind)
        sizes = sum(models._known_step(one).size for one in digests[-behind:])
        assert way.body.size <= sizes + 1000
    assert kinds[0] == "delta"
    assert kinds[1] == "chain"
    assert kinds[-1] == "tensors"
    assert models.way({digests[0], digests[-3]}, newest).start == digests[-3]  # type: ignore[union-attr]
    assert models.way(set(), newest) is None
    assert models.way({"f" * 64}, newest) is None


@pytest.mark.parametrize("behind", [1, 2, 8])
def test_every_way_leads_to_the_candidate(tmp_path: Path, chain: list[str], behind: int) -> None:
    digests = longer(tmp_path, chain, 6)
    models = Models(tmp_path)
    way = models.way({digests[-1 - behind]}, digests[-1])
    assert way is not None
    model, spec = Models(tmp_path).load(way.start)
    if way.kind == "tensors":
        replace(model, way.body)
    else:
        steps = steps_of(way.body) if way.kind == "chain" else [Step.from_bytes(way.body)]
        for step in steps:
            model, spec = step.apply(model, spec)
    assert backbone.digest(model, spec) == digests[-1]
