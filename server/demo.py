"""The whole story with real processes on this machine, on drawn plants or on real folders.

Data -> pre-training -> SuperLink and one SuperNode per farm -> runs -> table, report, result.json.
Farms are started with the farm's own command; the server side never looks into a farm's folder
but for the closing comparison, which pairs each farm's test results image by image.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from rich.console import Console

from common.command import replace_folder
from common.config import BackboneConfig, ServerConfig
from common.errors import ConfigError, DataError, QualityError
from common.files import write_atomically
from common.plan import BUDGETS
from common.processes import Child, free_port, stop_all
from common.settings import load_settings, validate
from server.compare import Interval, paired_bootstrap, verdict
from server.follow import progress_bar
from server.launch import Network, serve
from server.models import Models
from server.plants import draw_dataset
from server.pretrain import pretrain, shape_of
from server.provenance import provenance
from server.report import write_report
from server.runs import play
from server.search import planned
from server.settings import RunSettings
from server.store import Store
from server.story import Story, terminal_table
from server.summary import summarise

SAMPLES = 6
WORST_DROP = 0.05
AT_WORK_AT_ONCE = 2
DRAWN_ROUNDS = 3
CHANGEABLE = {"backbone", "plan", "privacy", "recovery", "rounds", "train"}
"""Sections of server.toml that a file of settings may have."""

# A tiny vision transformer that learns the drawn plants from nothing in a minute.
DRAWN_BACKBONE = BackboneConfig(
    name="vit_tiny_patch16_224",
    image_size=64,
    options={"depth": 4, "embed_dim": 96, "num_heads": 6, "patch_size": 8},
    epochs=16,
    lr=1e-3,
    anchor_images=256,
)


@dataclass(frozen=True)
class DemoOptions:
    """What ``fieldfed-server demo`` was asked for."""

    out: Path
    data: Path | None = None
    weights: str | None = None
    backbone: str = "vit_small_patch14_dinov2"
    image_size: int = 112
    compare: bool = False
    per_class: int | None = None
    rounds: int | None = None
    prune_heads: float | None = None
    prune_macs: float | None = None
    criterion: str | None = None
    settings: Path | None = None
    seed: int = 0
    command: str = "fieldfed-server demo"

    @property
    def drawn(self) -> bool:
        """Whether the demo draws its own plants; then it always compares."""
        return self.data is None


@dataclass
class Stage:
    """The folders of a demo and what was learnt on the way."""

    options: DemoOptions
    console: Console
    runs: list[int] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """Source and farms."""
        return self.options.data or self.options.out / "data"

    @property
    def server_dir(self) -> Path:
        """The server's state."""
        return self.options.out / "server"

    def farm_dir(self, farm: str) -> Path:
        """A farm's settings and state."""
        return self.options.out / "farms" / farm

    def say(self, text: str) -> None:
        """One line for the reader."""
        self.console.print(text, highlight=False, soft_wrap=True)


def run_demo(options: DemoOptions, console: Console) -> Story:
    """Play the whole story; writes ``report.html`` and ``result.json`` into ``options.out``.

    Raises:
        QualityError: pruned ended more than 5 points below the probe (after writing both).
        FieldfedError: anything that could not be done, in one line.
    """
    started = monotonic()
    stage = Stage(options, console)
    farms = _prepare(stage)
    config = _settings(stage, len(farms))
    _pretrain(stage, config)
    with serve(config, stage.server_dir) as network, _farms_running(stage, farms, config):
        compare = options.compare or options.drawn
        if compare:
            dense = config.plan.uncut()
            _run(
                stage,
                network,
                RunSettings(
                    config=config.model_copy(update={"plan": dense}),
                    label="dense",
                    local_rounds=config.plan.rounds,
                ),
            )
        _run(stage, network, RunSettings(config=config, label="pruned", probe=not compare))
    story = _tell(stage, farms, config, monotonic() - started)
    console.print(terminal_table(story))
    stage.say(f"report: {options.out / 'report.html'}    figures: {options.out / 'result.json'}")
    if story.mean.pruned < story.mean.probe - WORST_DROP:
        raise QualityError(
            f"pruned accuracy {story.mean.pruned:.3f} is more than 5 points below the probe's "
            f"{story.mean.probe:.3f}"
        )
    return story


# --- before ------------------------------------------------------------------------------------


def _prepare(stage: Stage) -> list[str]:
    """Data in place, old state gone; returns the farms' names."""
    options = stage.options
    for name in ("server", "farms"):
        replace_folder(options.out / name)
    unwanted = options.out / ".gitignore"
    if not unwanted.exists():
        write_atomically(unwanted, b"*\n")  # a run is no source, wherever it is written
    if options.drawn:
        stage.say("drawing plants ...")
        draw_dataset(stage.data, seed=options.seed)
    root = stage.data / "farms"
    farms = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not farms:
        raise DataError(f"no farms in '{root}'; it must hold one image folder per farm")
    return farms


def _source(stage: Stage) -> Path:
    """The one source species below ``source/``, or ``source`` itself."""
    root = stage.data / "source"
    species = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not species:
        raise DataError(f"no source species in '{root}'; give one image folder there")
    return species[0] if len(species) == 1 else root


def _settings(stage: Stage, farms: int) -> ServerConfig:
    """What the demo sets by itself, changed by the file of settings, changed by options."""
    options = stage.options
    values: dict[str, Any] = {
        "seed": options.seed,
        "server": {"name": "demo", "port": free_port()},
        "backbone": _backbone(options) | {"source": _source(stage)},
        "plan": {"rounds": DRAWN_ROUNDS} if options.drawn else {},
        "rounds": {
            # more than work at once: while two train, the next two start and wait for their turn
            "min_farms": farms,
            "max_in_flight": farms if options.drawn else 2 * AT_WORK_AT_ONCE,
        },
    }
    for section, changes in _changes(options).items():
        values[section] = values.get(section, {}) | changes
    if values["plan"].keys().isdisjoint(BUDGETS):
        values["plan"]["prune_heads"] = 0.4
    # whoever runs the demo is operator and all farms: nobody has to be asked
    if "privacy" not in values and values["rounds"].get("aggregation", "mean") == "mean":
        values["plan"].setdefault("moments", "farms")
    config = validate(ServerConfig, values, str(options.settings or "the options"))
    planned(config.plan, shape_of(config.backbone), [])  # said now, not after pre-training
    return config


def _backbone(options: DemoOptions) -> dict[str, Any]:
    if options.drawn:
        return DRAWN_BACKBONE.model_dump(exclude_unset=True)
    return {
        "name": options.backbone,
        "image_size": options.image_size,
        "weights": options.weights,
    }


def _changes(options: DemoOptions) -> dict[str, dict[str, Any]]:
    """What the file of settings says, and then the options, by section."""
    found: dict[str, dict[str, Any]] = {}
    if options.settings is not None:
        found = load_settings(ServerConfig, options.settings).model_dump(exclude_unset=True)
        if others := found.keys() - CHANGEABLE:
            raise ConfigError(
                f"'{options.settings}' has '{min(others)}', which the demo sets by itself or has "
                f"no use for; it may have sections {', '.join(sorted(CHANGEABLE))}"
            )
    plan = {
        "rounds": options.rounds,
        "prune_heads": options.prune_heads,
        "prune_macs": options.prune_macs,
        "criterion": options.criterion,
    }
    given = {key: value for key, value in plan.items() if value is not None}
    kept = found.get("plan", {})
    if not given.keys().isdisjoint(BUDGETS):  # an option replaces whatever budget the file has
        kept = {key: value for key, value in kept.items() if key not in BUDGETS}
    return found | {"plan": kept | given}


def _pretrain(stage: Stage, config: ServerConfig) -> None:
    stage.say(
        f"pre-training {config.backbone.name} on the source species ..."
        if config.backbone.epochs
        else f"loading {config.backbone.name}, describing its heads on the source species ..."
    )
    with progress_bar(stage.console) as tell:
        pretrain(config, stage.server_dir, tell)


# --- during ------------------------------------------------------------------------------------


@contextmanager
def _farms_running(stage: Stage, farms: Sequence[str], config: ServerConfig) -> Iterator[None]:
    """One real SuperNode per farm, all gone afterwards."""
    children = []
    try:
        for farm in farms:
            folder = stage.farm_dir(farm)
            _write_farm(stage, farm, folder, config)
            program = str(Path(sys.executable).parent / "fieldfed-client")
            command = [program, "run", str(folder)]
            child = Child(f"farm-{farm}", partial(list, command), folder / "farm.log")
            child.start()
            children.append(child)
        yield
    finally:
        stop_all(children)


def _write_farm(stage: Stage, farm: str, folder: Path, config: ServerConfig) -> None:
    values: dict[str, str | int] = {
        "name": farm,
        "data": str((stage.data / "farms" / farm).resolve()),
        "superlink": f"{config.server.host}:{config.server.port}",
        "seed": stage.options.seed,
        "threads": max(1, (os.cpu_count() or 1) // AT_WORK_AT_ONCE),
        "turns": str((stage.options.out / "turns").resolve()),
        "places": AT_WORK_AT_ONCE,
    }
    if stage.options.per_class is not None:
        values["per_class"] = stage.options.per_class
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    write_atomically(folder / "farm.toml", f"[farm]\n{lines}".encode())


def _run(stage: Stage, network: Network, settings: RunSettings) -> None:
    stage.runs.append(play(network, settings, stage.console).run)


# --- after -------------------------------------------------------------------------------------


def _tell(stage: Stage, farms: Sequence[str], config: ServerConfig, seconds: float) -> Story:
    options = stage.options
    store = Store.open(stage.server_dir / "fieldfed.db", read_only=True)
    try:
        interval = _compare(stage, farms, "dense", "pruned")
        story = summarise(
            store,
            Models(stage.server_dir),
            stage.runs,
            title="Drawn plants" if options.drawn else f"Real plants: {stage.data}",
            provenance=provenance(options.command, options.seed, config),
            interval=None if interval is None else (interval.low, interval.high),
            seconds=seconds,
        )
        rejected = {
            str(reason): count
            for run in stage.runs
            for reason, count in store.rejection_counts(run).items()
            if count
        }
    finally:
        store.close()
    if rejected:
        stage.say(f"replies that did not count, by reason: {rejected}")
    _say_verdicts(stage, farms)
    samples = {farm: _samples(stage.data / "farms" / farm) for farm in farms}
    write_report(story, options.out / "report.html", samples)
    text = json.dumps(story.result(), indent=2, sort_keys=True)
    write_atomically(options.out / "result.json", (text + "\n").encode())
    return story


def _compare(stage: Stage, farms: Sequence[str], first: str, second: str) -> Interval | None:
    """Accuracy of one report minus another's, on the same test images of every farm."""
    outcomes: dict[str, dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]] = {}
    for label in (first, second):
        for farm in farms:
            path = stage.farm_dir(farm) / "state" / "reports" / f"{label}.json"
            if not path.is_file():
                return None
            correct = json.loads(path.read_text())["correct"]
            outcomes.setdefault(label, {})[farm] = np.array(correct, dtype=bool)
    return paired_bootstrap(outcomes[first], outcomes[second], seed=stage.options.seed)


def _say_verdicts(stage: Stage, farms: Sequence[str]) -> None:
    for first, second in (("dense", "probe"), ("dense", "local"), ("pruned", "dense")):
        interval = _compare(stage, farms, first, second)
        if interval is not None:
            stage.say(
                f"{first} against {second}: {100 * interval.point:+.2f} points "
                f"[{100 * interval.low:+.2f}, {100 * interval.high:+.2f}] (95 %), "
                f"{verdict(interval)}"
            )


def _samples(folder: Path) -> list[bytes]:
    """One picture of each class, as it lies on disk."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    first = [min(path.glob("*.jpg"), default=None) for path in classes]
    return [path.read_bytes() for path in first if path is not None][:SAMPLES]
