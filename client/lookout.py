"""What a device does about its channel, without torch: it asks, and has a process try what is new.

    STATE/serving/offer.json   signed documents, for the process that tries them
    STATE/serving/tried.json   what came of it, until that is told
    STATE/serving/offered.json the version that was named last

The process that tries (client/attempt.py) takes torch's hundreds of megabytes and gives them back
when it ends. It is started when the channel names a version that this device has not decided on,
when images were labelled since the last try, and once after each start: then it also finds what the
disk has damaged.
"""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from client.bell import Bell
from client.hub import Offer
from client.member import Member
from common.errors import AbsentError, ConfigError, FieldfedError, LaunchError, RefusalError
from common.files import write_atomically
from common.manifest import Outcome
from common.processes import Child, stop_all
from common.programs import child_environment, logs_of, programs_of, python_command
from common.signing import Document
from common.topics import Event

log = logging.getLogger(__name__)

TRY_SECONDS = 12 * 3600.0
"""Most that a try may take: a slow link, a slow machine, many images."""
STOP_SECONDS = 4.0


class Tried(Document):
    """What came of a try; ``outcome`` is None when nothing has changed."""

    outcome: Outcome | None
    version: Annotated[int, Field(ge=0)]
    words: Annotated[str, Field(max_length=500)]
    gain: Annotated[float, Field(ge=-1, le=1)] | None = None


class Offered(Document):
    """The version that the channel named last, and by how much it was more often right here."""

    version: Annotated[int, Field(ge=1)] | None = None
    gain: Annotated[float, Field(ge=-1, le=1)] | None = None


_Tries = TypeAdapter(list[Tried])
Tell = Callable[[Event], None]


def offer_file(state_dir: Path) -> Path:
    """Where an offer waits for the process that tries it."""
    return state_dir / "serving" / "offer.json"


def tried_file(state_dir: Path) -> Path:
    """Where the process that tries says what came of it."""
    return state_dir / "serving" / "tried.json"


class Lookout:
    """The channel of one device.

    Args:
        member: whose device it is.
        config_path: of its settings.
        state_dir: of the farm.
        tell: gets what came of a try, the answer to each order, and that tries fail.
    """

    def __init__(self, member: Member, config_path: Path, state_dir: Path, tell: Tell) -> None:
        self._member, self._tell = member, tell
        self._config_path, self._state_dir = config_path, state_dir
        self._ended, self._first, self._labels = threading.Event(), True, 0
        self._refused, self._failing, self._waiting = "", False, False
        self._offered_file = state_dir / "serving" / "offered.json"
        self.offered = self._read_offered()

    @property
    def seen(self) -> int:
        """Counter of the newest state of the channel that was believed; 0: none."""
        try:
            return self._member.trust().seen(self._member.farm.channel)
        except FieldfedError:
            return 0

    def has_hub(self) -> bool:
        """Whether the farm has joined a network that delivers versions."""
        try:
            return self._member.joined and self._member.membership().hub is not None
        except ConfigError as error:
            log.error("%s", error)
            return False

    def stop(self) -> None:
        """End a try that is going on, soon."""
        self._ended.set()

    def watch(self, bell: Bell) -> bool:
        """Wait until the channel has changed, or the bell rings; returns whether either was so.

        Raises:
            FieldfedError: the hub cannot be reached, or may not be asked.
        """
        with self._member.hub() as hub:
            for _ in hub.watch(self._member.farm.channel, self.seen, bell):
                return True
        return bell.rung

    def look(self, version: int | None = None) -> None:
        """Ask the hub once, and have tried what is new.

        Args:
            version: that was ordered: another one is not tried, and the order is answered.

        Raises:
            FieldfedError: the hub cannot be reached, or the try did not come to its end.
        """
        try:
            self._look(version)
        except FieldfedError as error:
            if version is not None:
                self._answer(version, f"version {version} was ordered, but: {error}")
            elif isinstance(error, LaunchError) and not self._ended.is_set():
                self._fail(error)
            raise
        self._failing = False

    def _look(self, version: int | None) -> None:
        self._tell_tried()  # of a life that ended before it could
        channel = self._member.farm.channel
        try:
            with self._member.hub() as hub:
                offer = hub.latest(channel)
        except AbsentError as error:
            if version is not None:
                raise
            self._wait_for(error)
            return
        self._waiting = False
        try:
            digest, manifest = self._member.trust().accept(
                offer.keys, offer.channel, offer.manifest, channel, datetime.now(UTC)
            )
        except RefusalError as error:
            self._refuse(error, version)
            return
        self._refused = ""
        if manifest.counter != self.offered.version:
            self._keep_offered(Offered(version=manifest.counter))
        known = self._member.served.known(digest, manifest.counter)
        if version is not None and version != manifest.counter:
            words = f"channel '{channel}' names version {manifest.counter}: nothing is installed"
            self._answer(version, f"version {version} was ordered, but {words}")
        elif version is not None and known is not None:
            self._tell(Event(kind="update", version=version, words=known))
        elif known is None or self._first or self._labelled():
            self._try(offer)

    def _wait_for(self, error: AbsentError) -> None:
        """The channel names nothing yet, as in a new network: no fault; said once."""
        if not self._waiting:
            log.info("%s; this device takes the first version when it comes", error)
        self._waiting = True

    def _answer(self, version: int, words: str) -> None:
        log.warning("%s", words)
        self._tell(Event(kind="update", outcome="refused", version=version, words=words[:500]))

    def _fail(self, error: LaunchError) -> None:
        """Say once that tries fail, until one does not."""
        if not self._failing:
            self._tell(Event(kind="fault", words=str(error)[:500]))
        self._failing = True

    def _refuse(self, error: RefusalError, version: int | None) -> None:
        """Say that what the hub shows is not believed; the same words once, but to each order."""
        words = f"{error.reason}: {error}"
        if words != self._refused:
            log.error("refused: %s", error)
        if words != self._refused or version is not None:
            event = Event(kind="update", outcome="refused", version=version, words=words[:500])
            self._tell(event)
        self._refused = words

    # --- the try -----------------------------------------------------------------------------

    def _labelled(self) -> bool:
        return self._labels != self._labels_now()

    def _labels_now(self) -> int:
        try:
            return (self._state_dir / "labels.jsonl").stat().st_mtime_ns
        except OSError:
            return 0

    def _try(self, offer: Offer) -> None:
        labels = self._labels_now()
        write_atomically(offer_file(self._state_dir), json.dumps(asdict(offer)).encode())
        self._run()
        self._first, self._labels = False, labels
        self._tell_tried()

    def _run(self) -> None:
        """Raises LaunchError when the process fails, or is stopped."""
        command = [*python_command("client.attempt"), str(self._config_path), str(self._state_dir)]
        log_file = logs_of(self._state_dir) / "update.log"
        env = child_environment(programs_of(self._state_dir))
        if threads := self._member.farm.threads:
            env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
        child = Child("the try", lambda: command, log_file, env)
        child.start()
        try:
            self._wait(child)
        finally:
            stop_all([child], STOP_SECONDS)

    def _wait(self, child: Child) -> None:
        left = TRY_SECONDS
        while child.returncode is None:
            if self._ended.wait(0.5):
                raise LaunchError("the try of a version was stopped")
            left -= 0.5
            if left < 0:
                raise LaunchError(f"a version was tried for {TRY_SECONDS / 3600:.0f} h in vain")
        if child.returncode != 0:
            status = f"the try of a version ended with status {child.returncode}"
            raise LaunchError(f"{status}; {child.last_words()}")

    def _tell_tried(self) -> None:
        path = tried_file(self._state_dir)
        try:
            tries = _Tries.validate_json(path.read_bytes())
        except (OSError, ValidationError):
            tries = []
        for tried in tries:
            log.info("%s", tried.words)
            self._tell(Event(kind="update", **tried.model_dump(exclude={"gain"})))
            if tried.version == self.offered.version and tried.outcome == "rejected":
                self._keep_offered(Offered(version=tried.version, gain=tried.gain))
        path.unlink(missing_ok=True)

    # --- the version that was offered last ---------------------------------------------------

    def _keep_offered(self, offered: Offered) -> None:
        self.offered = offered
        write_atomically(self._offered_file, offered.model_dump_json().encode(), durable=False)

    def _read_offered(self) -> Offered:
        try:
            return Offered.model_validate_json(self._offered_file.read_bytes())
        except (OSError, ValidationError):
            return Offered()
