"""Writes the dashboards for Grafana beside this file, from what is said here in Python.

    python -m deploy.grafana.dashboards

The files are kept in the repository, and a test says when they are not what this makes of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as parts
from grafana_foundation_sdk.models import units

from deploy.grafana import boards, runbooks
from deploy.grafana.device import device
from deploy.grafana.fleet import fleet
from deploy.grafana.names import Prometheus
from deploy.grafana.panels import Query, Size, Words, lines, of, page
from deploy.grafana.rounds import rounds

FOLDER: Final = Path(__file__).parent


def books() -> parts.Dashboard:
    """Which alerts fire, and what to do about each."""
    words = Words(
        "Alerts",
        "1 while an alert waits for its time, or fires; nothing while all is well.",
        units.Short,
    )
    alerts = Query(of(Prometheus.ALERTS), "{{alertname}} ({{alertstate}})")
    texts = [page(name, text, runbooks.number(name)) for name, text in runbooks.sections().items()]
    return boards.board(
        runbooks.UID,
        "fieldfed: runbooks",
        "What each alert means, where to look, how to mend it: deploy/runbooks.md.",
        [boards.source(), boards.instance()],
        [("Now", [lines(words, alerts, size=Size(24, 6))]), ("When an alert fires", texts)],
    )


def files() -> Mapping[str, str]:
    """Every file by name."""
    made = {"fleet": fleet(), "rounds": rounds(), "device": device(), "runbooks": books()}
    return {f"{name}.json": written(one) for name, one in made.items()}


def written(found: parts.Dashboard) -> str:
    """A dashboard as a file holds it."""
    return json.dumps(found, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
