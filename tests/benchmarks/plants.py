"""Ten farms of real photographs in the lab: runs of the product's own rounds, judged on test parts.

Farms work in two processes of one thread each, or in as many as ``PROCESSES`` in the environment
says. Images, weights and splits are those beside the project; ``SHARED`` names another place.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from common.config import (
    BackboneConfig,
    FarmConfig,
    FarmSection,
    RecoveryConfig,
    RoundConfig,
    ServerConfig,
    TrainConfig,
)
from common.mask import Mask
from common.plan import PlanConfig
from server.begin import run_rounds
from server.models import Models
from server.pretrain import ANCHORS_FILE, BASE_FILE, pretrain, shape_of
from server.removals import newest_whole
from server.rounds import WallClock
from server.search import planned
from server.settings import RunSettings
from server.store import opened_run
from tests.lab.link import LabLink

SHARED = Path(os.environ.get("SHARED", "../shared"))
WEIGHTS = SHARED / "weights" / "vit_small_p14_tomato.safetensors"
NAME, SIDE, PER_CLASS = "vit_small_patch14_dinov2", 112, 40
PROCESSES = int(os.environ.get("PROCESSES", "2"))

Flags: TypeAlias = npt.NDArray[np.bool_]
"""Which images were classified correctly, (N,)."""
Correct: TypeAlias = Mapping[str, Flags]
"""By farm."""
Seeds: TypeAlias = Mapping[str, Sequence[Flags]]
"""By farm, a vector per seed."""


def farm_names() -> list[str]:
    """The farms, by name."""
    return sorted(path.name for path in (SHARED / "data" / "farms").iterdir() if path.is_dir())


def require() -> None:
    """End with a clear line where there are no photographs or weights."""
    if not WEIGHTS.is_file():
        raise SystemExit(f"no weights at '{WEIGHTS}'; set SHARED to the folder that holds them")


def source() -> Path:
    """The folder of the species that the server owns."""
    folders = sorted((SHARED / "data" / "source").iterdir())
    return next(path for path in folders if path.is_dir()).resolve()


def settings_of(
    seed: int,
    plan: PlanConfig,
    train: TrainConfig,
    farms: int,
    weights: Path = WEIGHTS,
    side: int = SIDE,
    recovery: RecoveryConfig | None = None,
) -> ServerConfig:
    """A server for these farms, which waits for all of them in every round."""
    return ServerConfig(
        seed=seed,
        backbone=BackboneConfig(
            name=NAME, image_size=side, weights=str(weights.resolve()), source=source()
        ),
        plan=plan,
        rounds=RoundConfig(deadline_seconds=36_000, grace_seconds=0, min_farms=farms, attempts=1),
        train=train,
        recovery=recovery,
    )


def farm_config(root: Path, name: str, seed: int, per_class: int) -> tuple[FarmConfig, Path]:
    """A farm's settings and its state folder."""
    data = (SHARED / "data" / "farms" / name).resolve()
    section = FarmSection(name=name, data=data, per_class=per_class, seed=seed, threads=1)
    return FarmConfig(farm=section), root / "farms" / name


@dataclass(frozen=True)
class Judged:
    """Per farm: which test images the reported models classified correctly, by label.

    ``mask`` is the last one of the run.
    """

    reports: Mapping[str, Correct]
    mask: Mask

    def packed(self) -> dict[str, dict[str, str]]:
        """As JSON: bits of every farm in hexadecimal, behind their number."""
        return packed_by(self.reports)


def packed_by(reports: Mapping[str, Correct]) -> dict[str, dict[str, str]]:
    """Outcomes by label and farm as text, for a cell."""
    return {
        label: {farm: f"{len(c)}:{np.packbits(c).tobytes().hex()}" for farm, c in one.items()}
        for label, one in reports.items()
    }


def by_farm(found: Seeds) -> dict[str, list[float]]:
    """Accuracy of every farm in each seed."""
    return {farm: [float(one.mean()) for one in seeds] for farm, seeds in found.items()}


def by_seed(found: Seeds) -> list[float]:
    """Accuracy of each seed, mean over farms."""
    return [fmean(seed) for seed in zip(*by_farm(found).values(), strict=True)]


def unpacked(cell: Mapping[str, str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Inverse of one label of :meth:`Judged.packed`."""
    found = {}
    for farm, text in cell.items():
        count, bits = text.split(":")
        found[farm] = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[: int(count)] > 0
    return found


def play(
    train: TrainConfig,
    rounds: int,
    seed: int,
    *,
    farms: Sequence[str] | None = None,
    per_class: int = PER_CLASS,
    probe: bool = False,
    local_rounds: int = 0,
    plan: PlanConfig | None = None,
    weights: Path | None = None,
    base: Path | None = None,
    keep: Path | None = None,
    side: int = SIDE,
    recovery: RecoveryConfig | None = None,
) -> Judged:
    """One run to its end; reports "model" and, where asked for, "probe" and "local".

    ``weights`` are those to begin with, by default the shared ones; ``base`` is a backbone, pruned
    perhaps, that farms begin with instead, its anchors beside it; ``keep`` is a folder for the last
    backbone (model.safetensors), the newest that nothing was cut from (dense.safetensors) and the
    anchors of the last mask. ``side`` is that of images, in pixels, and ``recovery`` says how farms
    train after a cut, where not as before.
    """
    names = list(farms or farm_names())
    chosen = (plan or PlanConfig()).model_copy(update={"rounds": rounds})
    start = weights or WEIGHTS
    config = settings_of(seed, chosen, train, len(names), start, side, recovery)
    planned(config.plan, shape_of(config.backbone), [])  # said before minutes have passed
    with tempfile.TemporaryDirectory() as folder, workers() as pool:
        root = Path(folder)
        if base is None:
            pretrain(config, root / "server")
        else:
            (root / "server").mkdir()
            shutil.copy(base, root / "server" / BASE_FILE)
            shutil.copy(base.with_name(ANCHORS_FILE), root / "server" / ANCHORS_FILE)
        made = [farm_config(root, name, seed, per_class) for name in names]
        settings = RunSettings(config=config, probe=probe, local_rounds=local_rounds)
        (root / "run.json").write_text(settings.model_dump_json())
        run_rounds(LabLink(made, pool=pool), root / "server", root / "run.json", WallClock())
        mask = _keep(root / "server", keep)
        labels = ["model", *(["probe"] if probe else []), *(["local"] if local_rounds else [])]
        return Judged(
            {
                label: {n: _correct(s, label) for n, (_, s) in zip(names, made, strict=True)}
                for label in labels
            },
            mask,
        )


def _keep(server: Path, folder: Path | None) -> Mask:
    """The last mask of a run; its backbone and anchors go into ``folder``, if there is one."""
    with opened_run(server) as (store, run):
        last = store.last_committed(run.run)
        assert last is not None
        _, candidate = last
        mask = Mask.from_json(store.mask(candidate.mask))
        whole = newest_whole(store, run)
    if folder is None:
        return mask
    anchors = Models(server).anchors(candidate.mask)
    assert anchors is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANCHORS_FILE).write_bytes(anchors.tobytes())
    shutil.copy(candidate.path, folder / "model.safetensors")
    shutil.copy(Models(server).path(whole), folder / "dense.safetensors")
    return mask


def _correct(state: Path, label: str) -> npt.NDArray[np.bool_]:
    report = json.loads((state / "reports" / f"{label}.json").read_text())
    return np.array(report["correct"], dtype=np.bool_)


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """Processes that farms work in."""
    with ProcessPoolExecutor(
        PROCESSES, get_context("spawn"), initializer=partial(torch.set_num_threads, 1)
    ) as pool:
        yield pool
