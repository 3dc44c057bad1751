"""The dashboard of the fleet: farms, how well each does, what they send, what ends soon."""

from grafana_foundation_sdk.builders import bargauge, stat, table, timeseries
from grafana_foundation_sdk.models import dashboard as parts
from grafana_foundation_sdk.models import units

from deploy.grafana import boards
from deploy.grafana.names import Prometheus, Recorded, Server
from deploy.grafana.panels import (
    DAY,
    HALF,
    WHOLE,
    WIDE,
    Query,
    Size,
    Words,
    age,
    bars,
    increase,
    left,
    lines,
    number,
    of,
    override,
    rows,
    steps,
)

GOOD = ((0.5, "orange"), (0.7, "green"))
"""Of accuracy and macro-F1; below the first it is red."""
DECIDE = of(Server.ACCURACY, part="decide")


def fleet() -> parts.Dashboard:
    """Farms active and paused, their accuracy over time, bytes, rejections, what expires."""
    part = boards.one_of("part", "Part", "decide", "test")
    sections: list[boards.Section] = [
        ("Now", [active(), paused(), worst(), mean(), silent(), firing()]),
        ("How well farms do", [accuracy(), f1(), smoothed(), farms()]),
        ("What farms send", [messages(), links(), rejected(), bad()]),
        ("What ends, and what cannot be read", [certificates(), channels(), sources()]),
    ]
    return boards.board(
        "fieldfed-fleet",
        "fieldfed: fleet",
        "The farms of the newest run: who takes part, how well each does, what they send.",
        [boards.source(), boards.instance(), part],
        sections,
        since="now-7d",
    )


# --- now -----------------------------------------------------------------------------------------


def active() -> stat.Panel:
    """Farms that are asked."""
    words = Words(
        "Farms active",
        "Farms of the newest run that are asked in rounds.",
        units.Short,
        steps=((1, "green"),),
        low="red",
        alerts=["FieldfedTooFewFarms"],
    )
    return number(words, Query(of(Server.FARMS, state="active")))


def paused() -> stat.Panel:
    """Farms that are not."""
    words = Words(
        "Farms paused",
        "Farms whose replies were bad several times in a row. 'fieldfed-server readmit' ends it.",
        units.Short,
        steps=((1, "orange"),),
        alerts=["FieldfedRepliesRejected"],
    )
    return number(words, Query(of(Server.FARMS, state="paused")))


def worst() -> stat.Panel:
    """The farm that is classified worst."""
    words = Words(
        "Worst farm",
        "The farm with the lowest accuracy on its decide part.",
        units.PercentUnit,
        steps=GOOD,
        low="red",
        alerts=["FieldfedAccuracyDrops"],
        decimals=1,
    )
    return number(words, Query(f"bottomk(1, {DECIDE})", "{{farm}}"))


def mean() -> stat.Panel:
    """All farms alike."""
    words = Words(
        "Mean accuracy",
        "Mean over farms of the accuracy on their decide parts; every farm counts the same.",
        units.PercentUnit,
        steps=GOOD,
        low="red",
        decimals=1,
    )
    return number(words, Query(f"avg({DECIDE})"))


def silent() -> stat.Panel:
    """The farm that was not heard of for longest."""
    words = Words(
        "Longest silence",
        "The farm that was heard of least recently. Metered farms sleep for hours.",
        units.DurationSeconds,
        steps=((DAY, "orange"), (7 * DAY, "red")),
        alerts=["FieldfedFleetSilent"],
    )
    return number(words, Query(f"topk(1, {age(of(Server.FARM_SEEN))})", "{{farm}}"))


def firing() -> stat.Panel:
    """Alerts of this server."""
    words = Words(
        "Alerts firing",
        "Alerts of this server that fire now; the dashboard of runbooks says which.",
        units.Short,
        steps=((1, "red"),),
        alerts=["FieldfedServerDown"],
    )
    alerts = of(Prometheus.ALERTS, alertstate="firing")
    return number(words, Query(f"count({alerts}) or vector(0)"))


# --- how well farms do ---------------------------------------------------------------------------


def accuracy() -> timeseries.Panel:
    """By farm, over time."""
    words = Words(
        "Accuracy by farm",
        "Newest accuracy of a shared backbone with the farm's own classifier, on the part chosen "
        "above. The round behind a cut is worse.",
        units.PercentUnit,
        alerts=["FieldfedAccuracyDrops"],
    )
    return lines(words, Query(of(Server.ACCURACY, part="$part"), "{{farm}}"))


def f1() -> timeseries.Panel:
    """By farm, over time."""
    words = Words(
        "Macro-F1 by farm",
        "Mean over classes of F1, each class counting the same, on the part chosen above.",
        units.PercentUnit,
    )
    return lines(words, Query(of(Server.F1, part="$part"), "{{farm}}"))


def smoothed() -> timeseries.Panel:
    """What the alert on accuracy looks at."""
    words = Words(
        "Accuracy by farm, mean of six hours",
        "On the decide part. An alert fires when it is more than 0.1 below that of the six days "
        "that ended a day ago.",
        units.PercentUnit,
        alerts=["FieldfedAccuracyDrops"],
    )
    return lines(words, Query(of(Recorded.ACCURACY), "{{farm}}"), size=WHOLE)


def farms() -> table.Panel:
    """A row for each farm."""
    words = Words(
        "Farms",
        "Accuracy and macro-F1 on the part chosen above, and when the farm was last heard of.",
        units.PercentUnit,
        decimals=1,
        alerts=["FieldfedFleetSilent"],
    )
    panel = rows(
        words,
        Query(f"max by (farm) ({of(Server.ACCURACY, part='$part')})", "Accuracy"),
        Query(f"max by (farm) ({of(Server.F1, part='$part')})", "Macro-F1"),
        Query(f"max by (farm) (1000 * {of(Server.FARM_SEEN)})", "Last heard of"),
    )
    return panel.override_by_name(*override("Last heard of", {"unit": units.DateTimeFromNow}))


# --- what farms send -----------------------------------------------------------------------------


def messages() -> timeseries.Panel:
    """Bytes of messages."""
    words = Words(
        "Bytes of messages in an hour",
        "What rounds cost: messages up from farms and down to them, without what is around them.",
        units.BytesIEC,
    )
    return lines(words, Query(increase(of(Server.MESSAGE_BYTES), "1h"), "{{direction}}"))


def links() -> timeseries.Panel:
    """Bytes at sockets."""
    words = Words(
        "Bytes at farms' sockets in an hour",
        "What farms that count it sent (up) and received (down), with TLS and Flower's own calls.",
        units.BytesIEC,
    )
    return lines(words, Query(increase(of(Server.LINK_BYTES), "1h"), "{{direction}}"))


def rejected() -> bargauge.Panel:
    """Rejections by reason."""
    words = Words(
        "Replies rejected, by reason",
        "Within the time shown. Lost, late and doubled ones are the link's; the others the farm's.",
        units.Short,
        steps=((1, "orange"),),
        alerts=["FieldfedRepliesRejected"],
    )
    counts = f"sort_desc(sum by (reason) ({increase(of(Server.REJECTED))}))"
    return bars(words, Query(counts, "{{reason}}"), size=HALF)


def bad() -> timeseries.Panel:
    """The share of replies that farms are to blame for."""
    words = Words(
        "Share of bad replies in a day",
        "Replies that a farm is to blame for, of all that came. An alert fires above a fifth.",
        units.PercentUnit,
        steps=((0.2, "red"),),
        alerts=["FieldfedRepliesRejected"],
    )
    return lines(words, Query(of(Recorded.BAD_SHARE), "bad replies"))


# --- what ends -----------------------------------------------------------------------------------


def certificates() -> bargauge.Panel:
    """How long certificates hold."""
    words = Words(
        "Certificates end in",
        "The server's, the authority's, and the next of the farms' to end. Alerts fire at 21 days, "
        "for the authority at 90.",
        units.Seconds,
        low="red",
        steps=((21 * DAY, "orange"), (30 * DAY, "green")),
        alerts=["FieldfedCertificateExpires"],
    )
    panel = bars(words, Query(left(of(Server.CERTIFICATE_ENDS)), "{{holder}}"))
    late = steps("red", ((90 * DAY, "orange"), (120 * DAY, "green")))
    return panel.override_by_name(*override("authority", {"thresholds": late}))


def channels() -> bargauge.Panel:
    """How long devices believe a channel."""
    words = Words(
        "Channels are believed for",
        "Devices believe what a channel names for so long. The hub signs again at 15 days; an "
        "alert fires at 10.",
        units.Seconds,
        low="red",
        steps=((10 * DAY, "orange"), (15 * DAY, "green")),
        alerts=["FieldfedChannelExpires"],
    )
    return bars(words, Query(left(of(Server.CHANNEL_ENDS)), "{{channel}}"))


def sources() -> bargauge.Panel:
    """What can be read."""
    words = Words(
        "Sources that can be read",
        "1: the figures of this source could be read. 0: it is damaged, or not there yet.",
        units.Short,
        low="red",
        steps=((1, "green"),),
        alerts=["FieldfedSourceUnreadable"],
    )
    return bars(words, Query(of(Server.UP_SOURCE), "{{source}}"), size=Size(8, WIDE.height))
