"""How a run begins, or goes on where an earlier process left it."""

import logging
from pathlib import Path

from common import backbone
from common.files import only_one
from common.mask import Mask
from server.distil import DistilLoop
from server.link import Clock, FarmLink
from server.models import Models
from server.rounds import RoundLoop, WallClock
from server.settings import RunSettings
from server.store import Store

log = logging.getLogger(__name__)


def run_rounds(
    link: FarmLink, state_dir: Path, run_settings: Path, clock: Clock | None = None
) -> int:
    """Run, or continue, what the settings file says; returns the run's number.

    Raises:
        FieldfedError: the run cannot go on; it is marked failed with the reason.
    """
    settings = RunSettings.model_validate_json(run_settings.read_text())
    # a server process that outlived its SuperLink must not write beside the one that replaces it
    with only_one(state_dir / "run.lock"), Store.open(state_dir / "fieldfed.db") as store:
        models = Models(state_dir)
        models.sweep()
        run = start_or_resume(settings, store, models, state_dir)
        loop = RoundLoop if settings.taught is None else DistilLoop
        loop(run, settings, link, clock or WallClock(), store, models, state_dir).go()
    return run


def start_or_resume(settings: RunSettings, store: Store, models: Models, state_dir: Path) -> int:
    """The run to work on: the last one when it is unfinished and the same, else a new one."""
    last = store.latest_run()
    if last is not None and last.state == "running" and settings.are_those_of(last.config_json):
        log.info("run %d continues", last.run)
        return last.run
    base, mask = _first_base(settings, models, state_dir)
    text = settings.model_dump_json()
    run = store.start_run(text, settings.config.seed, base, mask.to_json(), settings.label)
    log.info("run %d starts from backbone %s", run, base[:12])
    return run


def _first_base(settings: RunSettings, models: Models, state_dir: Path) -> tuple[str, Mask]:
    """Of a run that distils the teacher, with all that is left of it; else the network's first."""
    if settings.taught is not None:
        _, spec = models.view(settings.taught.teacher)
        return settings.taught.teacher, Mask.dense(spec)
    model, spec = backbone.load_backbone(state_dir / "base.safetensors")
    base, mask = models.save(model, spec), Mask.dense(spec)
    models.import_anchors(mask.digest, state_dir / "anchors.safetensors")
    return base, mask
