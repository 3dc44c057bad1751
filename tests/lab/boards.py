"""What the dashboards of deploy/grafana ask Prometheus, read from the files that Grafana reads."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

GRAFANA: Final = Path(__file__).parents[2] / "deploy" / "grafana"


@dataclass(frozen=True)
class Asked:
    """One query of a panel, or that of a variable."""

    board: str
    panel: str
    expression: str
    legend: str = ""

    @property
    def shown(self) -> set[str]:
        """Labels that the legend shows."""
        return set(re.findall(r"\{\{(\w+)\}\}", self.legend))

    def __str__(self) -> str:
        return f"{self.board}: {self.panel}"


def boards() -> dict[str, dict[str, Any]]:
    """Every dashboard by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Its panels, but not the titles of its rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def asked() -> list[Asked]:
    """Every query of every panel."""
    return [
        Asked(name, panel["title"], target["expr"], target["legendFormat"])
        for name, board in boards().items()
        for panel in panels(board)
        for target in panel.get("targets", ())
    ]


def chosen_from() -> list[Asked]:
    """The series whose labels may be chosen above a dashboard; the legend is the label."""
    found = []
    for name, board in boards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                series, label = re.fullmatch(
                    r"label_values\((.+), (\w+)\)", variable["query"]
                ).groups()  # type: ignore[union-attr]
                found.append(Asked(name, variable["name"], series, f"{{{{{label}}}}}"))
    return found
