"""What dashboards have in common: variables, links, rows, and a number for every panel."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Final, TypeAlias

from grafana_foundation_sdk.builders import dashboard as made
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as parts

from deploy.grafana.names import SERVER_JOB, Server
from deploy.grafana.panels import SOURCE, among

Section: TypeAlias = tuple[str, Sequence[Builder[parts.Panel]]]
"""A title and the panels below it."""
Variable: TypeAlias = Builder[parts.VariableModel]

TAG: Final = "fieldfed"


def source() -> Variable:
    """Which Prometheus is asked."""
    return made.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def instance() -> Variable:
    """Which server is looked at."""
    return values("instance", "Server", among(Server.BUILD, job=SERVER_JOB))


def values(label: str, shown: str, series: str) -> made.QueryVariable:
    """The values that a label of these series has."""
    variable = made.QueryVariable(label).label(shown).datasource(SOURCE)
    variable.query(f"label_values({series}, {label})")
    variable.refresh(parts.VariableRefresh.ON_TIME_RANGE_CHANGED)
    return variable.sort(parts.VariableSort.NATURAL_ASC)


def one_of(name: str, shown: str, *choices: str) -> Variable:
    """One of a few words, at first the first."""
    options = [parts.VariableOption(text=one, value=one, selected=False) for one in choices]
    options[0].selected = True
    variable = made.CustomVariable(name).label(shown).values(",".join(choices))
    return variable.options(options).current(options[0])


def board(
    uid: str,
    title: str,
    description: str,
    variables: Iterable[Variable],
    sections: Iterable[Section],
    since: str = "now-24h",
) -> parts.Dashboard:
    """A dashboard; its rows are open."""
    every = made.DashboardLink("fieldfed").type(parts.DashboardLinkType.DASHBOARDS).tags([TAG])
    found = made.Dashboard(title).uid(uid).description(description).tags([TAG]).readonly()
    found.link(every.keep_time(True).include_vars(True)).time(since, "now").refresh("1m")
    found.timezone("browser").tooltip(parts.DashboardCursorSync.CROSSHAIR)
    found.variables(list(variables))
    for name, panels in sections:
        found.with_row(made.Row(name))
        for panel in panels:
            found.with_panel(panel)
    return _numbered(found.build())


def _numbered(found: parts.Dashboard) -> parts.Dashboard:
    panels = found.panels or []
    taken = {panel.id_val for panel in panels}
    free = (number for number in count(1) if number not in taken)
    for panel in panels:
        if not panel.id_val:
            panel.id_val = next(free)
    return found
