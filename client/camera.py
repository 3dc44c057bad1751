"""The process that watches a farm's camera folder, with whatever version the farm serves with.

    STATE/camera/ID.bundle   what serves, in the form that needs no torch (common/portable.py)
    STATE/results.jsonl      what was seen (client/watch.py)

That form is made once for each bundle, by a process of its own that takes torch's memory and gives
it back. Until it is made, the one before goes on being used. A folder that is not there is waited
for.
"""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from client.served import Served
from common.config import FarmConfig, WatchConfig
from common.errors import ConfigError, FieldfedError, LaunchError
from common.files import make_folder
from common.logs import start_logging
from common.processes import Child, stop_all, terminate_like_interrupt
from common.programs import child_environment, logs_of, programs_of, python_command
from common.settings import load_settings

if TYPE_CHECKING:
    from client.watch import Watcher

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
MAKE_SECONDS, RETRY_SECONDS = 3600.0, 600.0


def camera(config_path: Path, state_dir: Path) -> Child:
    """The process, ready to start."""
    command = [*python_command("client.camera"), str(config_path), str(state_dir)]
    env = child_environment(programs_of(state_dir))
    return Child("camera", lambda: command, logs_of(state_dir) / "camera.log", env)


def results_file(state_dir: Path) -> Path:
    """Where its results lie."""
    return state_dir / "results.jsonl"


def main() -> int:
    """The program ``camera SETTINGS STATE``: returns its exit status."""
    start_logging()
    try:
        with terminate_like_interrupt():
            config = load_settings(FarmConfig, Path(sys.argv[1]))
            if config.watch is None:
                raise ConfigError("no [watch] in the settings of this farm; add 'folder' to it")
            made = Camera(config.watch, Path(sys.argv[2]), config.farm.threads)
            while True:
                made.look()
                time.sleep(LOOK_SECONDS)
    except FieldfedError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 0


class Camera:
    """Looks at one folder.

    Args:
        watch: which one, and how much may lie there.
        state_dir: of the farm.
        threads: 0: as many as there are cores.
    """

    def __init__(self, watch: WatchConfig, state_dir: Path, threads: int = 0) -> None:
        self._watch, self._state_dir, self._threads = watch, state_dir, threads
        self._served = Served(state_dir / "serving")
        self._folder = state_dir / "camera"
        self._used, self._retry, self._there = "", 0.0, True
        self._stamp: object = None
        self._wanted: str | None = None
        self._watcher: Watcher | None = None

    def look(self) -> None:
        """Classify what is new, with what serves now.

        Raises:
            ModelError, QualityError: what serves cannot be run here.
        """
        if (stamp := self._served.stamp) != self._stamp:
            self._stamp, self._wanted = stamp, self._served.current_id
        name = self._wanted
        if name is not None and name != self._used and time.monotonic() >= self._retry:
            self._change(name)
        if self._watch.folder.is_dir() != self._there:
            self._there = not self._there
            words = "is there again" if self._there else "is not there; it is waited for"
            log.warning("the folder '%s' %s", self._watch.folder, words)
        if self._watcher is not None:
            for _ in self._watcher.look():
                pass

    def _change(self, name: str) -> None:
        """Use another bundle; when that cannot be made, go on and try again later."""
        try:
            self._use(self._made(name))
        except (FieldfedError, OSError) as error:
            log.error("what serves cannot be used for the camera yet: %s", error)
            self._retry = time.monotonic() + RETRY_SECONDS
            return
        self._used = name

    def _use(self, bundle: Path) -> None:
        # now, and not before there is a version: they take memory
        from client.infer import Classifier
        from client.watch import Watcher
        from common.portable import PortableBundle

        try:
            classifier = Classifier(PortableBundle.read(bundle), self._threads)
        except FieldfedError:
            bundle.unlink(missing_ok=True)  # damaged: it is made again
            raise
        log.info("photographs are classified by version %d", classifier.about.version)
        if self._watcher is not None:
            self._watcher.use(classifier)
            return
        results, quota = results_file(self._state_dir), self._watch.quota_bytes
        self._watcher = Watcher(classifier, self._watch.folder, results, quota=quota)

    def _made(self, name: str) -> Path:
        """The bundle of this name in the form that needs no torch."""
        path = self._folder / f"{name}.bundle"
        if not path.is_file():
            make_folder(self._folder)
            self._make(path)
            for other in self._folder.glob("*.bundle"):
                if other != path:
                    other.unlink(missing_ok=True)
        return path

    def _make(self, path: Path) -> None:
        """Raises LaunchError when it cannot be made."""
        command = [*python_command("client.portable"), str(self._served.folder), str(path)]
        log_file = logs_of(self._state_dir) / "bundle.log"
        child = Child("bundle", lambda: command, log_file)
        child.start()
        try:
            until = time.monotonic() + MAKE_SECONDS
            while child.returncode is None and time.monotonic() < until:
                time.sleep(0.2)
        finally:
            stop_all([child])
        if child.returncode != 0 or not path.is_file():
            raise LaunchError(f"no bundle was made; {child.last_words()}")
