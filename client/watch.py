"""Classify whatever a camera drops into a folder, and keep the results as JSON lines.

    results.jsonl, results.1.jsonl   a line per image, the newer and the older file
    DIR/*.jpg                        as the camera left them

Lines are numbered; numbers rise, so that a reader knows which lines it has had.

A photograph is looked at once it has stayed the same from one look to the next, since cameras and
copies write slowly; what has a line already is not looked at again, also after a restart. One that
cannot be read gets a line that says so. With a quota the oldest photographs that have a line are
removed first; without one nothing is ever removed.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from client.infer import Classifier, Guess, failed, images_in
from common.duplicates import UNREADABLE
from common.errors import DiskError
from common.files import append, make_folder

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
RESULT_BYTES = 10_000_000
"""Of a file of results; then it becomes the older one."""
MARKED_SIDE = 1024
MOST_UNKEPT = 1000
"""Lines that wait in memory for room on the disk."""

State = tuple[int, int]
"""mtime in ns and bytes of a file: the same twice, it is complete."""


class Watcher:
    """Watches one folder.

    Args:
        classifier: ready to classify.
        folder: where photographs appear; folders in it count.
        results: where lines are appended.
        marked: a folder for copies with the result written on them, or None.
        quota: bytes of photographs that may stay, or None.
        sleep: waits; another in tests.
    """

    def __init__(
        self,
        classifier: Classifier,
        folder: Path,
        results: Path,
        *,
        marked: Path | None = None,
        quota: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._classifier, self._folder, self._results = classifier, folder, results
        self._marked, self._quota, self._sleep = marked, quota, sleep
        self._seen: dict[Path, State] = {}
        self._number, self._unkept = 0, list[bytes]()
        self._done = self._known()

    def run(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Look, tell what was found, wait, look again; until Ctrl-C."""
        while True:
            for line in self.look():
                tell(line)
            self._sleep(LOOK_SECONDS)

    def use(self, classifier: Classifier) -> None:
        """Classify with another bundle from now on."""
        self._classifier = classifier

    def look(self) -> Iterator[dict[str, Any]]:
        """The lines of the photographs that are complete and new.

        Raises:
            ModelError, QualityError: the bundle cannot be run.
        """
        before, self._seen = self._seen, self._states()
        self._keep_waiting()
        for image, state in sorted(self._seen.items(), key=lambda item: item[1]):
            if self._done.get(image) == state or before.get(image) != state:
                continue
            line = self._line(image, state)
            self._done[image] = state
            self._keep(line)
            yield line
        self._make_room()

    def _line(self, image: Path, state: State) -> dict[str, Any]:
        self._number = max(self._number + 1, time.time_ns() // 1000)
        named: dict[str, Any] = {
            "image": str(image.relative_to(self._folder)),
            "state": list(state),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "number": self._number,
        }
        try:
            guess = self._classifier.classify(image)
            if self._marked is not None:
                mark(guess, self._marked)
        except UNREADABLE as error:
            return failed(image, error) | named
        return guess.fields() | named | {"version": self._classifier.about.version}

    def _states(self) -> dict[Path, State]:
        found = {}
        for image in images_in(self._folder):
            if self._marked is not None and image.is_relative_to(self._marked):
                continue
            try:
                status = image.stat()
            except OSError:
                continue  # it has gone since
            found[image] = status.st_mtime_ns, status.st_size
        return found

    # --- results -----------------------------------------------------------------------------

    def _keep(self, line: dict[str, Any]) -> None:
        # a line of its own, also where a power cut has left half of one
        self._unkept.append(b"\n" + json.dumps(line).encode())
        self._keep_waiting(line["image"])

    def _keep_waiting(self, image: str = "") -> None:
        """Write what waits, in order; the oldest are given up when the disk stays full."""
        try:
            while self._unkept:
                if self._results.is_file() and self._results.stat().st_size > RESULT_BYTES:
                    self._results.replace(self._older())
                append(self._results, self._unkept[0])
                del self._unkept[0]
        except (DiskError, OSError) as error:
            if image:
                log.error("%s; '%s' is not kept until there is room", error, image)
            del self._unkept[:-MOST_UNKEPT]

    def _older(self) -> Path:
        return self._results.with_name(f"{self._results.stem}.1{self._results.suffix}")

    def _known(self) -> dict[Path, State]:
        """What has a line already; lines that are damaged are left out."""
        found: dict[Path, State] = {}
        for path in (self._older(), self._results):
            for text in path.read_bytes().split(b"\n") if path.is_file() else []:
                try:
                    line = json.loads(text or b"null")
                    if line is not None:
                        mtime, size = line["state"]
                        self._number = max(self._number, int(line.get("number", 0)))
                        found[self._folder / line["image"]] = int(mtime), int(size)
                except (ValueError, KeyError, TypeError, AttributeError):
                    log.warning("a line of '%s' is damaged and is left out", path)
        return found

    # --- room --------------------------------------------------------------------------------

    def _make_room(self) -> None:
        if self._quota is None:
            return
        over = sum(size for _, size in self._seen.values()) - self._quota
        for image, state in sorted(self._seen.items(), key=lambda item: item[1]):
            if over <= 0:
                return
            if self._done.get(image) == state:
                image.unlink(missing_ok=True)
                log.info("'%s' is removed: the photographs have more than the quota", image)
                over -= state[1]


def mark(guess: Guess, folder: Path) -> Path:
    """Write a smaller copy of a photograph with the result on it; returns its path.

    Raises:
        OSError, SyntaxError, ValueError: the file is not a readable image.
        DiskError: the folder cannot be made.
    """
    make_folder(folder)
    with Image.open(guess.image) as opened:
        opened.draft("RGB", (MARKED_SIDE, MARKED_SIDE))
        copy = ImageOps.exif_transpose(opened).convert("RGB")
    copy.thumbnail((MARKED_SIDE, MARKED_SIDE))
    draw, words = ImageDraw.Draw(copy), guess.words()
    left, top, right, bottom = draw.textbbox((6, 6), words, font_size=18)
    draw.rectangle((left - 6, top - 6, right + 6, bottom + 6), fill=(0, 0, 0))
    draw.text((6, 6), words, fill=(255, 255, 255), font_size=18)
    path = folder / f"{guess.image.stem}.jpg"
    copy.save(path, quality=85)
    return path
