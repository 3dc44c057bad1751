"""A crowd of farms that train nothing: replies of a given size for the server's memory.

``python -m tests.lab.crowd FOLDER FARMS`` runs one real round and prints the peak resident bytes.
"""

import resource
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from common import backbone, codec
from common.config import BackboneConfig, RoundConfig, ServerConfig, TrainConfig
from common.messages import AlignRequest, EvaluateReply, HelloReply, Reply, Request
from common.plan import PlanConfig
from server.begin import run_rounds
from server.link import Delivery, Sent
from server.settings import RunSettings
from tests.lab.link import LabClock
from tests.lab.replies import align_reply

# every parameter of a ViT-Ti as fp32: 21 MB a reply
NAME, SIDE = "vit_tiny_patch16_224", 32


class Crowd:
    """A FarmLink whose farms answer at once, with random updates, one reply a poll."""

    def __init__(self, farms: int, count: int) -> None:
        self._farms, self._count = farms, count
        self._rng = np.random.default_rng(0)
        self._waiting: dict[str, tuple[int, Request]] = {}
        self._sent = 0

    def online(self) -> Sequence[int]:
        """All of them."""
        return range(1, self._farms + 1)

    def send(self, node: int, request: Request, ttl_seconds: float) -> Sent:
        """Queue a request."""
        self._sent += 1
        self._waiting[str(self._sent)] = (node, request)
        return Sent(str(self._sent), 0)

    def poll(self, message_ids: Collection[str]) -> list[Delivery]:
        """One reply."""
        name = next(iter(message_ids), None)
        if name is None:
            return []
        reply = self._answer(*self._waiting.pop(name))
        return [Delivery(name, reply, getattr(reply, "update", np.zeros(0)).nbytes)]

    def _answer(self, node: int, request: Request) -> Reply:
        farm = f"farm{node}"
        if isinstance(request, AlignRequest):
            values = self._rng.standard_normal(self._count, dtype=np.float32)
            update = codec.encode(values, request.base, bits=32)
            return align_reply(update, **request.identity(), farm=farm)
        if request.kind == "evaluate":
            return EvaluateReply(
                **request.identity(),
                farm=farm,
                label=request.label,
                examples=10,
                accuracy=0.5,
                f1=0.5,
                seconds=1.0,
            )
        return HelloReply(farm=farm, examples=10, classes=2)


def main(folder: Path, farms: int) -> None:
    """One round with ``farms`` replies; prints the peak resident bytes of this process."""
    spec = backbone.dense_spec(NAME, SIDE)
    model = backbone.build(spec)
    backbone.save_backbone(folder / "base.safetensors", model, spec)
    config = ServerConfig(
        backbone=BackboneConfig(name=NAME, image_size=SIDE),
        plan=PlanConfig(rounds=1),
        rounds=RoundConfig(grace_seconds=0, max_in_flight=64),
        train=TrainConfig(trainable="full", update_bits=32),
    )
    settings = folder / "run.json"
    settings.write_text(RunSettings(config=config).model_dump_json())
    crowd = Crowd(farms, backbone.parameters(model))
    run_rounds(crowd, folder, settings, LabClock())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
