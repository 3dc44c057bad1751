"""The updater: from what a channel names to what this device serves with.

    offer    believed only if its signatures, counters and dates hold      (client/trust.py)
    refuse   what cannot be built here, or has no room in memory or on disk, before it is fetched
    fetch    the objects that no other version has brought, from where the last try was cut off
    shadow   fitted and judged on this farm's own images, beside what serves  (client/shadow.py)
    commit   backbone, classifier, temperature, threshold, class names, as one (client/serving.py)

A version that was worse is never tried again; what serves goes on serving. A version that turns bad
on images labelled since is given up for the one before it. Nothing of this touches training.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import psutil

from client.hub import Fetched, HubClient, Offer
from client.labels import Labels
from client.served import About
from client.serving import Bundle, Serving
from client.shadow import MAX_DROP, Judged, Trial, judge, try_out
from client.trust import Trust
from common.assembly import assemble, require_buildable
from common.errors import LinkError, RefusalError, RefuseReason
from common.images import FarmFolder
from common.manifest import InstallReport, Manifest, Outcome

log = logging.getLogger(__name__)

MEMORY_PER_PARAMETER = 12
"""Bytes: the tensors as they are read, as fp32, and room to run them."""
WINDOW, LEAST_LABELS, LEAST_ERRORS = 40, 8, 2


@dataclass(frozen=True)
class Done:
    """What came of one look at the channel; ``outcome`` is None when there was nothing new."""

    outcome: Outcome | None
    version: int
    words: str
    fetched: Fetched | None = None
    before: Judged | None = None
    after: Judged | None = None


class Updater:
    """The updater of one device.

    Args:
        device: its name.
        channel: that it follows.
        folder: opens the farm's images.
        serving: what it serves with.
        trust: what it believes.
        labels: what was labelled in the field.
        clock: its time.
    """

    def __init__(
        self,
        *,
        device: str,
        channel: str,
        folder: Callable[[], FarmFolder],
        serving: Serving,
        trust: Trust,
        labels: Labels,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._device, self.channel, self._folder = device, channel, folder
        self._serving, self._trust, self._labels = serving, trust, labels
        self._clock = clock

    def update(self, hub: HubClient, *, compress: bool = False, offer: Offer | None = None) -> Done:
        """Look at the channel once and do what follows from it.

        Args:
            hub: a connection.
            compress: for links on which bytes are dear.
            offer: what the hub has said already, and need not be asked for again.

        Raises:
            LinkError: the hub cannot be reached; what has come is kept.
            DiskError: the disk is full; what has come is kept.
            DataError: this farm's images cannot be used.
        """
        offer = offer or hub.latest(self.channel)
        digest, manifest = "", None
        try:
            digest, manifest = self._trust.accept(
                offer.keys, offer.channel, offer.manifest, self.channel, self._clock()
            )
            bundle = self._serving.current()  # not what is named only: it may be damaged
            known = self._known(bundle, digest, manifest)
            if known is not None:
                return known
            done = self._install(hub, bundle, digest, manifest, compress)
        except RefusalError as error:
            version = 0 if manifest is None else manifest.counter
            done = Done("refused", version, f"{error.reason}: {error}")
            log.error("refused: %s", error)
            if manifest is None:
                return done  # nothing that can be named to the hub was offered
        self._report(hub, done)
        return done

    def _known(self, bundle: Bundle | None, digest: str, manifest: Manifest) -> Done | None:
        """What to say of a version that this device has decided on already."""
        if bundle is not None and bundle.about.digest == digest:
            return Done(None, manifest.counter, f"version {manifest.counter} is in use")
        reason = self._serving.rejected(digest)
        if reason is not None:
            return Done(None, manifest.counter, f"version {manifest.counter} stays out: {reason}")
        return None

    def _install(
        self,
        hub: HubClient,
        before: Bundle | None,
        digest: str,
        manifest: Manifest,
        compress: bool,
    ) -> Done:
        require_buildable(manifest)
        require_memory(manifest)
        fetched = hub.fetch(manifest.weights, self._serving.objects, compress=compress)
        folder = self._folder()
        model = assemble(manifest, self._serving.objects)
        trial = try_out(model, manifest.spec, folder)
        serving = None if before is None else judge(before, folder.decide, folder.classes)
        worse = compared(serving, trial.judged)
        if worse is not None:
            self._serving.reject(digest, worse)
            return self._done("rejected", manifest, worse, serving, trial, fetched)
        self._serving.commit(self._about(digest, manifest, folder, trial), trial.classifier)
        words = f"version {manifest.counter} is in use"
        return self._done("committed", manifest, words, serving, trial, fetched)

    def _about(self, digest: str, manifest: Manifest, folder: FarmFolder, trial: Trial) -> About:
        return About(
            digest=digest,
            manifest=manifest,
            classes=folder.classes,
            temperature=trial.temperature,
            threshold=trial.threshold,
            accuracy=trial.judged.accuracy,
            f1=trial.judged.f1,
            committed=self._clock(),
        )

    def _done(
        self,
        outcome: Outcome,
        manifest: Manifest,
        words: str,
        serving: Judged | None,
        trial: Trial,
        fetched: Fetched,
    ) -> Done:
        beside = "" if serving is None else f", what served before {serving.f1:.3f}"
        log.info(
            "version %d %s: macro-F1 %.3f%s, %.0f ms an image, %.2f MB fetched",
            *(manifest.counter, outcome, trial.judged.f1, beside),
            *(1000 * trial.latency_seconds, fetched.bytes / 1e6),
        )
        return Done(outcome, manifest.counter, words, fetched, serving, trial.judged)

    # --- the way back ------------------------------------------------------------------------

    def check(self, hub: HubClient | None = None) -> Done | None:
        """Give up what serves if it does worse on images labelled since than the bundle before it.

        Returns:
            None when there is nothing to compare, or no reason to go back.
        """
        now, before = self._serving.current(), self._serving.previous()
        if now is None or before is None:
            return None
        part, classes = self._labels.since(now.about.committed, WINDOW)
        if len(part) < LEAST_LABELS:
            return None
        worse = turned_bad(judge(before, part, classes), judge(now, part, classes), len(part))
        return None if worse is None else self.roll_back(now, worse, hub)

    def roll_back(self, now: Bundle, reason: str, hub: HubClient | None = None) -> Done | None:
        """Go back to the bundle before, whatever the reason; None when there is none."""
        back = self._serving.roll_back(reason)
        if back is None:
            return None
        version = now.about.manifest.counter
        log.warning("version %d is given up: %s", version, reason)
        done = Done(
            "rolled_back", version, f"{reason}; version {back.manifest.counter} is in use again"
        )
        if hub is not None:
            self._report(hub, done)
        return done

    def _report(self, hub: HubClient, done: Done) -> None:
        if done.outcome is None:
            return
        try:
            hub.report(
                InstallReport(
                    device=self._device,
                    version=done.version,
                    outcome=done.outcome,
                    detail=done.words[:500],
                    accuracy_before=None if done.before is None else done.before.accuracy,
                    accuracy_after=None if done.after is None else done.after.accuracy,
                )
            )
        except LinkError as error:
            log.warning("the hub does not know of it: %s", error)


def require_memory(manifest: Manifest) -> None:
    """Refuse a version that this machine has no memory for; raises RefusalError (TOO_LARGE)."""
    needed, free = MEMORY_PER_PARAMETER * manifest.params, psutil.virtual_memory().available
    if needed > free:
        raise RefusalError(
            f"version {manifest.counter} needs some {needed / 1e6:.0f} MB of memory, this device "
            f"has {free / 1e6:.0f} MB free; it needs a smaller version",
            RefuseReason.TOO_LARGE,
        )


def compared(serving: Judged | None, trial: Judged) -> str | None:
    """Why a version is not taken, or None when it is."""
    if serving is None or trial.f1 >= serving.f1 - MAX_DROP:
        return None
    return f"macro-F1 {trial.f1:.3f} on this farm's images, {serving.f1:.3f} before"


def turned_bad(before: Judged, now: Judged, images: int) -> str | None:
    """Why a bundle is given up, or None: one image more or less is no reason."""
    errors = round((before.accuracy - now.accuracy) * images)
    if before.f1 - now.f1 <= MAX_DROP or errors < LEAST_ERRORS:
        return None
    return (
        f"macro-F1 {now.f1:.3f} on the last {images} labelled images, {before.f1:.3f} with the "
        "version before"
    )
