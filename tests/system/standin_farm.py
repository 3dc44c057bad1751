"""Takes the place of client.farm in tests: a farm that needs no images.

Asked to align with seed 1 it adds a classifier to its reply, with seed 2 it sends a JPEG as its
update, with seed 99 it is at work for a long time.
"""

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

import client.app
from common.config import FarmConfig
from common.messages import (
    AlignReply,
    AlignRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Reply,
    Request,
)
from common.wire import to_record

JPEG = bytes.fromhex("ffd8ffe000104a4649460001") + bytes(range(256)) * 40
BLOCKS, BLOCK = 1600, 256

LEAKY = 1001
"""Steps of a reply that leaks."""


class Farm:
    """Takes the place of client.farm.Farm."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def open(cls, config: FarmConfig, _state_dir: Path) -> "Farm":
        """A farm with nothing but its name."""
        return cls(config.farm.name)

    def handle(
        self, request: HelloRequest | AlignRequest | EvaluateRequest
    ) -> HelloReply | AlignReply | EvaluateReply:
        """An answer of the right form."""
        if isinstance(request, HelloRequest):
            return HelloReply(farm=self.name, examples=10, classes=3)
        identity: dict[str, Any] = request.model_dump(
            include={"run", "round", "attempt", "base", "mask"}
        )
        judged: dict[str, Any] = {"examples": 10, "accuracy": 0.5, "f1": 0.4, "seconds": 0.1}
        shared = {"farm": self.name, **identity, **judged}
        if isinstance(request, EvaluateRequest):
            return EvaluateReply(label=request.label, **shared)
        if request.seed == 99:
            time.sleep(120)
        update = JPEG if request.seed == 2 else self.update(request.base)
        return AlignReply(
            loss=1.0,
            dal=0.1,
            steps=LEAKY if request.seed == 1 else 1,
            train_seconds=0.1,
            update=np.frombuffer(update, np.uint8),
            head_importance=np.ones(12, np.float32),
            **shared,
        )

    def update(self, base: str) -> bytes:
        """A coded update put together by hand, because common.codec would import torch."""
        count = BLOCKS * BLOCK
        head = (b"FFUP", 2, 8, 0, BLOCK, count, count, bytes.fromhex(base))
        header = struct.pack("<4sHBBIQQ32s", *head)
        numbers = np.random.default_rng(len(self.name)).integers(-127, 128, count, np.int8)
        return header + np.ones(BLOCKS, "<f4").tobytes() + numbers.tobytes()


def leaky(message: Request | Reply) -> RecordDict:
    """A message as Flower carries it, with more in it than there should be."""
    record = to_record(message)
    if isinstance(message, AlignReply) and message.steps == LEAKY:
        leak = Array(np.ones((3, 384), np.float32))
        record["arrays"] = ArrayRecord({"classifier.weight": leak})
    return record


client.app.to_record = leaky  # type: ignore[attr-defined]
