"""The step back has as few bits as an update, and nothing of it is lost in the long run."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from common import codec
from common.codec import Floats
from common.compress import expand
from common.messages import AlignReply, Reply, Request
from common.step import Step
from server.residual import Residuals
from tests.lab.network import Lab

LIMIT, ROUNDS = 10_000_000, 3


def means_of(sent: dict[int, list[AlignReply]]) -> dict[str, Floats]:
    """Mean of the decoded updates of a round, weighed by examples, by base."""
    means = {}
    for replies in sent.values():
        total = sum(reply.examples for reply in replies)
        decoded = []
        for reply in replies:
            payload = expand(reply.update, LIMIT)
            count = codec.read_header(payload).count
            change = codec.decode(payload, base=reply.base, count=count)
            decoded.append(change * np.float32(reply.examples / total))
        means[replies[0].base] = np.stack(decoded).sum(axis=0)
    return means


@pytest.mark.parametrize("train", [{"update_bits": 2}, {"trainable": "lora", "rank": 1}])
def test_steps_and_what_is_left_are_what_farms_sent(
    tmp_path: Path, train: dict[str, object]
) -> None:
    lab = Lab(tmp_path, rounds=ROUNDS, warmup=ROUNDS, settings={"train": train | {"epochs": 1}})
    config = lab.config.rounds.model_copy(update={"clip": 1000.0})
    sent: dict[int, list[AlignReply]] = defaultdict(list)

    def look(_node: int, _request: Request, reply: Reply) -> None:
        if isinstance(reply, AlignReply):
            sent[reply.round].append(reply)

    lab.run(fault=look, rounds=config)
    residuals, steps = Residuals(lab.server_dir), {}
    for path in (lab.server_dir / "models").glob("*.delta"):
        update = Step.from_bytes(np.frombuffer(path.read_bytes(), np.uint8)).update
        steps[codec.read_header(update).base] = path.stem, update
    means = means_of(sent)
    assert len(means) == len(steps) == ROUNDS
    seen = 0
    for base, mean in means.items():
        candidate, update = steps[base]
        rest = residuals.load(1, base, mean.size)
        left = residuals.load(1, candidate, mean.size)
        assert left is not None
        seen += rest is not None
        owed = mean if rest is None else mean + rest
        step = codec.decode(update, base=base, count=mean.size)
        np.testing.assert_allclose(step + left, owed, atol=1e-6 + 1e-4 * np.abs(owed).max())
        assert np.abs(left).max() > 0.01 * np.abs(owed).max(), "coding lost nothing worth keeping"
    assert seen == ROUNDS - 1, "the first step has nothing to make up for"


def test_what_is_left_is_of_its_run_and_survives_damage(tmp_path: Path) -> None:
    residuals, candidate = Residuals(tmp_path), "a" * 64
    residuals.save(1, candidate, np.ones(5, np.float32))
    kept = residuals.load(1, candidate, 5)
    assert kept is not None
    assert kept.tolist() == [1] * 5
    assert residuals.load(2, candidate, 5) is None
    assert residuals.load(1, candidate, 6) is None
    assert residuals.load(1, "b" * 64, 5) is None
    (tmp_path / "models" / f"{candidate}.residual").write_bytes(b"half")
    assert residuals.load(1, candidate, 5) is None
