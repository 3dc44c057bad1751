"""The pieces that dashboards are made of: queries, panels with their words, links, variables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Final, TypeAlias, TypeVar

from grafana_foundation_sdk.builders import bargauge, heatmap, stat, table, text, timeseries
from grafana_foundation_sdk.builders import common as made
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import prometheus as ask
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as parts
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

from deploy.grafana.runbooks import address

Panel = TypeVar("Panel", bargauge.Panel, heatmap.Panel, stat.Panel, table.Panel, timeseries.Panel)
Steps: TypeAlias = Sequence[tuple[float, str]]
"""Colours from a value on; what lies below the first is the colour of :class:`Words`."""

DAY: Final = 86_400.0
SOURCE: Final = parts.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True)
class Query:
    """What is asked; ``legend`` names labels in ``{{}}``, or the series where there is one."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Words:
    """What a panel says beside its figures.

    ``unit`` is one of ``grafana_foundation_sdk.models.units``, ``alerts`` are those whose runbooks
    the panel links to, ``low`` is the colour below the first of ``steps``.
    """

    title: str
    description: str
    unit: str
    steps: Steps = ()
    low: str = "green"
    alerts: Sequence[str] = ()
    decimals: int | None = None


@dataclass(frozen=True)
class Size:
    """Of 24 columns, and rows of 30 pixels."""

    width: int
    height: int


SMALL, WIDE, HALF, WHOLE = Size(4, 4), Size(8, 8), Size(12, 8), Size(24, 9)


# --- expressions ---------------------------------------------------------------------------------


def of(name: str, **labels: str) -> str:
    """A series of the server that is looked at."""
    return among(name, instance="$instance", **labels)


def among(name: str, **labels: str) -> str:
    """A series by labels alone."""
    matchers = [f'{label}="{value}"' for label, value in labels.items()]
    return f"{name}{{{', '.join(matchers)}}}"


def age(series: str) -> str:
    """Seconds since a time."""
    return f"time() - {series}"


def left(series: str) -> str:
    """Seconds until a time."""
    return f"{series} - time()"


def increase(series: str, window: str = "$__range") -> str:
    """By how much a counter rose."""
    return f"increase({series}[{window}])"


# --- panels --------------------------------------------------------------------------------------


def number(words: Words, *queries: Query, size: Size = SMALL) -> stat.Panel:
    """The newest value of each query, large; named where there is more than one series."""
    named = len(queries) > 1 or "{{" in queries[0].legend
    mode = kinds.BigValueTextMode.VALUE_AND_NAME if named else kinds.BigValueTextMode.VALUE
    panel = stat.Panel().text_mode(mode).graph_mode(kinds.BigValueGraphMode.NONE)
    panel.color_mode(kinds.BigValueColorMode.VALUE).reduce_options(_newest())
    return _filled(panel, words, queries, size, instant=True)


def bars(words: Words, *queries: Query, size: Size = WIDE) -> bargauge.Panel:
    """The newest value of each series as a bar."""
    panel = bargauge.Panel().display_mode(kinds.BarGaugeDisplayMode.BASIC).show_unfilled(True)
    panel.orientation(kinds.VizOrientation.HORIZONTAL).reduce_options(_newest()).min(0)
    return _filled(panel, words, queries, size, instant=True)


def lines(
    words: Words, *queries: Query, size: Size = HALF, stacked: bool = False
) -> timeseries.Panel:
    """Values over time; ``stacked`` draws bars on top of each other."""
    legend = made.VizLegendOptions().show_legend(True).placement(kinds.LegendPlacement.BOTTOM)
    legend.display_mode(kinds.LegendDisplayMode.LIST)
    hint = made.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI)
    panel = timeseries.Panel().legend(legend).tooltip(hint.sort(kinds.SortOrder.DESCENDING))
    if stacked:
        panel.draw_style(kinds.GraphDrawStyle.BARS).fill_opacity(80)
        panel.stacking(made.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if words.steps:
        dashed = kinds.GraphThresholdsStyleMode.DASHED
        panel.thresholds_style(made.GraphThresholdsStyleConfig().mode(dashed))
    _filled(panel, words, queries, size)
    return panel.color_scheme(_scheme(parts.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))


def spread(words: Words, query: Query, size: Size = HALF) -> heatmap.Panel:
    """How the values of a histogram are spread, over time."""
    panel = heatmap.Panel().calculate(False)
    panel.y_axis(heatmap.YAxisConfig().unit(words.unit))
    return _filled(panel, words, [query], size, form=PromQueryFormat.HEATMAP)


def rows(words: Words, *queries: Query, size: Size = WHOLE) -> table.Panel:
    """A row for each set of labels that the queries share, with a column for each query's legend.

    The queries yield one label apart from their value, so that rows of different queries meet.
    """
    columns = {f"Value #{ascii_uppercase[at]}": one.legend for at, one in enumerate(queries)}
    panel = table.Panel().transformations(
        [
            transformed("merge"),
            transformed("organize", excludeByName={"Time": True}, renameByName=columns),
        ]
    )
    asked = [Query(one.expression) for one in queries]
    return _filled(panel, words, asked, size, instant=True, form=PromQueryFormat.TABLE)


def matrix(words: Words, query: Query, row: str, column: str, size: Size = WHOLE) -> table.Panel:
    """Two labels that are numbers across each other, and the value as a colour."""
    corner = f"{row}\\{column}"
    numbers = [{"targetField": name, "destinationType": "number"} for name in (row, column)]
    panel = table.Panel().transformations(
        [
            transformed("convertFieldType", conversions=numbers),
            transformed("sortBy", sort=[{"field": column}]),
            transformed(
                "groupingToMatrix",
                rowField=row,
                columnField=column,
                valueField="Value",
                emptyValue="null",
            ),
            transformed("sortBy", sort=[{"field": corner}]),
        ]
    )
    solid = kinds.TableCellBackgroundDisplayMode.BASIC
    panel.cell_options(kinds.TableColoredBackgroundCellOptions(mode=solid))
    plain = {"custom.cellOptions": {"type": "auto"}, "decimals": 0}
    panel.override_by_name(*override(corner, plain))
    _filled(panel, words, [query], size, instant=True, form=PromQueryFormat.TABLE)
    return panel.color_scheme(_scheme(parts.FieldColorModeId.CONTINUOUS_YL_BL))


def page(title: str, markdown: str, number: int, size: Size = HALF) -> text.Panel:
    """Words alone; ``number`` is by which links find it."""
    panel = text.Panel().title(title).mode(TextMode.MARKDOWN).content(markdown).id(number)
    return panel.span(size.width).height(size.height)


def transformed(name: str, **options: object) -> parts.DataTransformerConfig:
    """What Grafana does with the answers before they are shown."""
    return parts.DataTransformerConfig(id_val=name, options=options)


def override(
    name: str, properties: Mapping[str, object]
) -> tuple[str, list[parts.DynamicConfigValue]]:
    """Other properties of the column or series of that name."""
    return name, [parts.DynamicConfigValue(key, value) for key, value in properties.items()]


def steps(low: str, found: Steps) -> parts.ThresholdsConfig:
    """Colours from a value on."""
    base = parts.Threshold(value=None, color=low)
    above = [parts.Threshold(value=value, color=colour) for value, colour in found]
    return parts.ThresholdsConfig(mode=parts.ThresholdsMode.ABSOLUTE, steps=[base, *above])


# --- what panels share ---------------------------------------------------------------------------


def _filled(
    panel: Panel,
    words: Words,
    queries: Sequence[Query],
    size: Size,
    instant: bool = False,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Panel:
    panel.title(words.title).description(words.description).unit(words.unit).datasource(SOURCE)
    panel.span(size.width).height(size.height)
    limits = board.ThresholdsConfig().mode(parts.ThresholdsMode.ABSOLUTE)
    panel.thresholds(limits.steps(steps(words.low, words.steps).steps))
    panel.color_scheme(_scheme(parts.FieldColorModeId.THRESHOLDS))
    if words.decimals is not None:
        panel.decimals(words.decimals)
    for letter, query in zip(ascii_uppercase, queries, strict=False):
        one = ask.Dataquery().ref_id(letter).expr(query.expression).format(form)
        one.datasource(SOURCE).legend_format(query.legend or "__auto")
        panel.with_target(one.instant() if instant else one.range())
    return panel.links([_runbook(alert) for alert in words.alerts])


def _runbook(alert: str) -> board.DashboardLink:
    title = f"Runbook: {alert}"
    return board.DashboardLink(title).type(parts.DashboardLinkType.LINK).url(address(alert))


def _newest() -> made.ReduceDataOptions:
    return made.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _scheme(mode: parts.FieldColorModeId) -> board.FieldColor:
    return board.FieldColor().mode(mode)
