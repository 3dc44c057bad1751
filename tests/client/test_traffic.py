"""Replies carry the bytes at the socket as they stand when they are sent."""

from pathlib import Path
from typing import Any, cast

from client import traffic
from client.farm import Farm
from client.state import FarmState
from client.traffic import Counters
from common.config import FarmConfig
from common.images import FarmFolder
from common.messages import EvaluateReply, EvaluateRequest

DIGEST = "d" * 64
ASKED: dict[str, Any] = {"run": 1, "round": 4, "seed": 0, "base": DIGEST, "mask": DIGEST}


class Reporter(Farm):
    """A farm that reports without an image; ``asked`` counts how often it had to."""

    asked = 0

    def _evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        self.asked += 1
        shared: dict[str, Any] = {**request.identity(), "farm": self.name, "label": request.label}
        return EvaluateReply(**shared, examples=1, accuracy=1.0, f1=1.0, seconds=0.0)


def ask(farm: Farm, attempt: int) -> EvaluateReply:
    request = EvaluateRequest(**ASKED, attempt=attempt, label="probe", train=cast(Any, {}))
    reply = farm.handle(request)
    assert isinstance(reply, EvaluateReply)
    return reply


def test_a_reply_has_the_counters_and_another_attempt_has_newer_ones(tmp_path: Path) -> None:
    config = FarmConfig.model_validate({"farm": {"name": "oak", "data": "none"}})
    farm = Reporter(config, cast(FarmFolder, None), FarmState(tmp_path))
    reply = ask(farm, 1)
    assert (reply.link_sent, reply.link_received) == (None, None), "nobody counts"
    traffic.keep(tmp_path, Counters(sent=100, received=2000))
    reply = ask(farm, 2)
    assert (reply.attempt, reply.link_sent, reply.link_received) == (2, 100, 2000)
    traffic.keep(tmp_path, Counters(sent=150, received=2500))
    reply = ask(farm, 3)
    assert (reply.attempt, reply.link_sent, reply.link_received) == (3, 150, 2500)
    assert farm.asked == 1, "worked again on what it has answered"
