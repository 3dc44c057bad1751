"""A small network for tests: drawn images, a tiny vision transformer, farms in the lab."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from common.config import (
    BackboneConfig,
    FarmConfig,
    FarmSection,
    NetworkConfig,
    RoundConfig,
    ServerConfig,
    TrainConfig,
)
from common.messages import Reply, Request, from_parts, to_parts
from common.plan import PlanConfig
from server.begin import run_rounds
from server.pretrain import pretrain
from server.settings import RunSettings
from server.store import Store
from tests.lab.link import Fault, LabClock, LabLink, work
from tests.lab.simulation import SimClock, SimFarm, SimLink

Outages = Sequence[tuple[float, float]]
NONE: Mapping[int, Outages] = MappingProxyType({})

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 4, "patch_size": 8}
SIDE = 32
# a few drawn images judge nothing: only tests of the accuracy guard set a limit
PLAN = {"rounds": 2, "warmup": 0, "prune_events": 1, "max_drop_ratio": 1.0}


def draw_folder(root: Path, classes: int, per_class: int, seed: int) -> Path:
    """Images of stripes whose angle is the class; the seed shifts colours (another species)."""
    rng = np.random.default_rng(seed)
    tint = rng.uniform(0.3, 1.0, 3)
    y, x = np.mgrid[0 : SIDE + 4, 0 : SIDE + 4] / (SIDE + 4)
    for part, share in (("train", 1.0), ("test", 0.6)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            angle = np.pi * label / classes
            for number in range(int(per_class * share)):
                phase, turn = rng.uniform(0, 7), rng.normal(0, 0.15)
                wave = np.sin(20 * (x * np.cos(angle + turn) + y * np.sin(angle + turn)) + phase)
                picture = (wave[..., None] * 0.4 + 0.5) * tint + rng.normal(0, 0.15, (*x.shape, 3))
                pixels = (picture.clip(0, 1) * 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return root


def farms(root: Path, count: int = 3, per_class: int = 15) -> list[tuple[FarmConfig, Path]]:
    """Farms with their own drawn species and label sets, and their state folders."""
    made = []
    for number in range(count):
        name = f"farm{number}"
        data = draw_folder(root / "data" / name, 2 + number % 3, per_class, 100 + number)
        section = FarmSection(name=name, data=data, threads=1, precision="fp32")
        made.append((FarmConfig(farm=section), root / "state" / name))
    return made


def server_config(root: Path, **plan: Any) -> ServerConfig:
    """Settings of a server for these farms, with a source species of its own."""
    source = root / "data" / "source"
    if not source.exists():
        draw_folder(source, 3, 16, 7)
    return ServerConfig(
        seed=3,
        server=NetworkConfig(name="lab"),
        backbone=BackboneConfig(
            name="vit_tiny_patch16_224",
            image_size=SIDE,
            options=TINY,
            source=source,
            epochs=2,
            anchor_images=32,
        ),
        plan=PlanConfig(**(PLAN | plan)),
        train=TrainConfig(epochs=1, batch_size=16),
    )


class Lab:
    """A network in a folder: pre-trained once, then run as often as a test likes."""

    def __init__(
        self,
        root: Path,
        count: int = 3,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        **plan: Any,
    ) -> None:
        self.root, self.server_dir = root, root / "server"
        self.farms = farms(root, count)
        rules = RoundConfig(deadline_seconds=60, grace_seconds=0, min_farms=count)
        config = server_config(root, **plan)
        changed = {
            section: getattr(config, section).model_copy(update=dict(values))
            for section, values in (settings or {}).items()
        }
        self.config = config.model_copy(update={"rounds": rules, **changed})
        pretrain(self.config, self.server_dir)

    def run(
        self,
        order: int = 0,
        fault: Fault | None = None,
        label: str = "model",
        local_rounds: int = 0,
        **changes: Any,
    ) -> LabLink:
        """One run to its end; returns the link with the requests it carried."""
        link = LabLink(self.farms, order, fault)
        path = self._settings(label=label, local_rounds=local_rounds, **changes)
        run_rounds(link, self.server_dir, path, LabClock())
        return link

    def simulate(
        self, seconds: Sequence[float], outages: Mapping[int, Outages] = NONE, **rules: Any
    ) -> tuple[SimLink, SimClock]:
        """One run on simulated time, with farms that take so many seconds for a round."""
        clock = SimClock()
        farms = [
            SimFarm(config.farm.name, takes, outages=outages.get(node, ()))
            for node, ((config, _), takes) in enumerate(
                zip(self.farms, seconds, strict=True), start=1
            )
        ]

        def answer(node: int, _farm: SimFarm, request: Request) -> Reply:
            return from_parts(*work(*self.farms[node - 1], to_parts(request)))  # type: ignore[return-value]

        link = SimLink(clock, farms, answer)
        changed = self.config.rounds.model_copy(update=rules)
        run_rounds(link, self.server_dir, self._settings(rounds=changed), clock)
        return link, clock

    def _settings(self, label: str = "model", local_rounds: int = 0, **changes: Any) -> Path:
        config = self.config.model_copy(update=changes)
        settings = RunSettings(config=config, label=label, local_rounds=local_rounds)
        path = self.root / "run.json"
        path.write_text(settings.model_dump_json())
        return path

    def store(self) -> Store:
        """The server's store, read-only."""
        return Store.open(self.server_dir / "fieldfed.db", read_only=True)
