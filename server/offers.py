"""What channels name, in memory, as the hub hands it to devices; one thread reads the registry."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from common import hub_pb2
from common.errors import FieldfedError
from common.manifest import InstallReport
from server.registry import Registry
from server.rollout import offered, step
from server.versions import InstallRow, RolloutRow

log = logging.getLogger(__name__)

LOOK_SECONDS, RENEW_SECONDS = 1.0, 3600.0


@dataclass(frozen=True, eq=False)
class Offer:
    """What a channel names, ready to be sent."""

    counter: int
    message: hub_pb2.Offer


class Offers:
    """The offers of all channels. For one event loop; the registry is touched by its own thread."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._offers: dict[str, Offer] = {}
        self._coming: dict[str, tuple[RolloutRow, Offer]] = {}
        self._state: object = None
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "registry")
        self._registry: Registry | None = None
        self._renewed = -RENEW_SECONDS

    @classmethod
    @contextlib.asynccontextmanager
    async def watching(cls, state_dir: Path) -> AsyncIterator[Self]:
        """Offers that follow the registry while the context is open.

        Raises:
            StateError: the registry cannot be read.
        """
        offers = cls(state_dir)
        loop = asyncio.get_running_loop()
        await offers._look()
        follower = loop.create_task(offers._follow())
        try:
            yield offers
        finally:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower
            await loop.run_in_executor(offers._thread, offers._close)
            offers._thread.shutdown()

    def of(self, channel: str, farm: str) -> Offer | None:
        """What a channel names now for a farm."""
        coming = self._coming.get(channel)
        if coming is not None and offered(coming[0], farm):
            return coming[1]
        return self._offers.get(channel)

    def unknown(self, channel: str) -> str:
        """What to say of a channel that does not exist."""
        known = ", ".join(sorted(self._offers)) or "none yet"
        return f"no channel '{channel[:40]}'; there are: {known}"

    def changed(self) -> asyncio.Event:
        """Set when any channel has changed since this call."""
        return self._changed

    async def record(self, farm: str, report: InstallReport) -> None:
        """Keep what a device reported."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._record, farm, report)

    # --- the follower ------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except FieldfedError as error:
                log.error("%s; what was read before is offered on", error)

    async def _look(self) -> None:
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        if found is not None:
            self._offers, self._coming = found
            self._changed.set()
            self._changed = asyncio.Event()

    # --- in the thread of the registry -------------------------------------------------------

    def _read(self) -> "tuple[dict[str, Offer], dict[str, tuple[RolloutRow, Offer]]] | None":
        """What channels name, and what is on its way to them; None where nothing has changed."""
        if self._registry is None:
            self._registry = Registry.open(self._state_dir)
        if time.monotonic() - self._renewed >= RENEW_SECONDS:
            for row in self._registry.renew():
                log.info("channel %s is signed again", row.name)
            self._renewed = time.monotonic()
        step(self._registry)
        rows, rollouts = self._registry.rows.channels(), self._registry.rows.rollouts()
        state = [(row.name, row.counter) for row in rows], rollouts
        if state == self._state:
            return None
        self._registry.close()
        self._registry = Registry.open(self._state_dir)  # the keys may be others now
        self._state = state
        named = {row.name: self._offer(row.counter, row.document, row.version) for row in rows}
        coming = {
            row.channel: (row, self._offer(row.counter, row.document, row.version))
            for row in rollouts
            if row.going
        }
        return named, coming

    def _offer(self, counter: int, document: str, version: int) -> Offer:
        assert self._registry is not None
        manifest = self._registry.row(version).document
        message = hub_pb2.Offer(keys=self._registry.keys.text, channel=document, manifest=manifest)
        return Offer(counter, message)

    def _record(self, farm: str, report: InstallReport) -> None:
        assert self._registry is not None
        self._registry.rows.record_install(
            InstallRow(farm=farm, received=time.time(), **report.model_dump())
        )

    def _close(self) -> None:
        if self._registry is not None:
            self._registry.close()
