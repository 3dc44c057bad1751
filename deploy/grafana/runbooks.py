"""Runbooks as a dashboard, so that an alert's page is a click away and needs no host of its own."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

UID: Final = "fieldfed-runbooks"
_FILE: Final = Path(__file__).parents[1] / "runbooks.md"


@cache
def sections() -> Mapping[str, str]:
    """What ``deploy/runbooks.md`` says of each alert, in its order, with links to dashboards."""
    found = re.split(r"^## (.+)\n", _FILE.read_text(), flags=re.MULTILINE)[1:]
    texts = dict(zip(found[::2], found[1::2], strict=True))
    places = {name.lower(): _place(at) for at, name in enumerate(texts, start=1)}
    return {name: _linked(text.strip(), places) for name, text in texts.items()}


def number(alert: str) -> int:
    """Its panel on the dashboard of runbooks; raises KeyError for an alert without a runbook."""
    return {name: at for at, name in enumerate(sections(), start=1)}[alert]


def address(alert: str) -> str:
    """Where its runbook is, within Grafana."""
    return _place(number(alert))


def _place(at: int) -> str:
    return f"/d/{UID}?viewPanel={at}"


def _linked(text: str, places: Mapping[str, str]) -> str:
    return re.sub(r"\]\(#([^)]+)\)", lambda found: f"]({places[found[1]]})", text)
