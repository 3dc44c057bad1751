"""Figures for Prometheus, read from what is on disk whenever they are asked for.

    python -P -m server.metrics FOLDER

    /metrics    the families of server/families.py, as text or OpenMetrics
    /healthz    200 while this process answers
    /readyz     200 when the store can be opened and its newest commit read, else 503 and why

A process of its own that only reads: nothing else has to count, and a restart loses nothing. A
source that cannot be read is left out and named by ``fieldfed_up_source``; the others are shown.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common import exposition
from common.config import ServerConfig
from common.errors import ConfigError, FieldfedError
from common.processes import terminate_like_interrupt
from common.services import MetricsConfig
from common.settings import load_settings
from server import families, telemetry
from server.figures import Figures, RegistryFigures, reading
from server.identity import expiries
from server.service import run_service
from server.telemetry import TelemetryStore

log = logging.getLogger("server.metrics")  # also where this module is the program

STORE: Mapping[str, Callable[[Figures], Iterable[Metric]]] = {
    "runs": families.of_runs,
    "replies": families.of_replies,
    "farms": families.of_farms,
    "model": families.of_model,
    "store": families.of_store,
}
"""Sources that lie in the store: a damaged table takes away no more than what it tells."""

Read = TypeVar("Read")


# --- what is shown -------------------------------------------------------------------------------


class StateCollector(Collector):
    """Every family of a server's folder."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._faults: dict[str, str] = {}

    def collect(self) -> list[Metric]:
        """Read everything now; what cannot be read is logged and left out."""
        found: dict[str, list[Metric] | None] = {}
        with contextlib.ExitStack() as opened:
            store = self._tried("database", lambda: opened.enter_context(self._figures()))
            for name, read in STORE.items():
                found[name] = (
                    None if store is None else self._tried(name, partial(_all, read, store))
                )
        found["registry"] = self._tried("registry", self._registry)
        found["telemetry"] = self._tried("telemetry", self._telemetry)
        found["certificates"] = self._tried("certificates", self._certificates)
        shown = [family for source in found.values() for family in source or ()]
        up = {name: source is not None for name, source in found.items()}
        return [families.build_info(), *shown, families.sources_up(up)]

    def require_ready(self) -> None:
        """Raises StateError when there is no store, or its newest commit cannot be read."""
        with self._figures() as figures:
            figures.last_commit()
            run = figures.newest_run()
            if run is not None:
                figures.mask_now(run)

    def _figures(self) -> contextlib.AbstractContextManager[Figures]:
        return reading(Figures, self._state_dir / "fieldfed.db")

    def _registry(self) -> list[Metric]:
        with reading(RegistryFigures, self._state_dir / "registry" / "registry.db") as figures:
            return list(families.of_registry(figures))

    def _telemetry(self) -> list[Metric]:
        with reading(TelemetryStore, self._state_dir / telemetry.NAME) as told:
            return list(families.of_devices(told))

    def _certificates(self) -> list[Metric]:
        return list(families.of_certificates(expiries(self._state_dir / "identity")))

    def _tried(self, name: str, read: Callable[[], Read]) -> Read | None:
        """What ``read`` yields; None where it raises, which is logged when it is news."""
        try:
            value = read()
        except Exception as error:  # whatever damage does to one source, the others are shown
            known = isinstance(error, FieldfedError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
            if self._faults.get(name) != why:
                log.warning("no figures of '%s': %s", name, why)
            self._faults[name] = why
            return None
        if self._faults.pop(name, None) is not None:
            log.info("figures of '%s' can be read again", name)
        return value


def _all(read: Callable[[Figures], Iterable[Metric]], figures: Figures) -> list[Metric]:
    return list(read(figures))


# --- over HTTP -----------------------------------------------------------------------------------


class MetricsServer(exposition.MetricsServer):
    """The figures of a server's folder; ``serve_forever`` answers until ``shutdown``."""

    def __init__(self, config: MetricsConfig, state_dir: Path) -> None:
        collector = StateCollector(state_dir)
        super().__init__(config, collector, collector.require_ready)


def _main(folder: Path) -> None:
    config = load_settings(ServerConfig, folder / "server.toml").metrics
    if config is None:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [metrics]; add that line there")
    with (
        contextlib.suppress(KeyboardInterrupt),
        terminate_like_interrupt(),
        MetricsServer(config, folder) as server,
    ):
        server.serve_forever()


if __name__ == "__main__":
    run_service(_main, log)
