"""The dashboard of rounds and of the mask: how rounds go, and what is left of the backbone."""

from grafana_foundation_sdk.builders import bargauge, heatmap, stat, table, timeseries
from grafana_foundation_sdk.models import dashboard as parts
from grafana_foundation_sdk.models import units

from deploy.grafana import boards
from deploy.grafana.names import Server
from deploy.grafana.panels import (
    Query,
    Size,
    Words,
    age,
    bars,
    increase,
    left,
    lines,
    matrix,
    number,
    of,
    spread,
)

HOUR = 3600.0


def rounds() -> parts.Dashboard:
    """Rounds by outcome, how long they take, who takes part; the mask; the store."""
    sections: list[boards.Section] = [
        ("Now", [run(), newest(), replies(), remaining(), committed(), size()]),
        ("Rounds", [taking_part(), outcomes(), quantiles(), seconds(), late(), runs()]),
        ("Mask", [macs(), cuts(), heads(), neurons(), scores(), agreement()]),
        ("Versions", [versions(), shares(), installs()]),
    ]
    return boards.board(
        "fieldfed-rounds",
        "fieldfed: rounds and mask",
        "How rounds of alignment go, and what is left of the shared backbone.",
        [boards.source(), boards.instance()],
        sections,
    )


# --- now -----------------------------------------------------------------------------------------


def run() -> stat.Panel:
    """The newest run."""
    words = Words(
        "Newest run",
        "Its number, and the state that it is in.",
        units.Short,
        low="text",
        alerts=["FieldfedRunStopped"],
    )
    state = f"{of(Server.RUN)} * on (instance) group_left (state) ({of(Server.RUN_STATE)} == 1)"
    return number(words, Query(state, "{{state}}"))


def newest() -> stat.Panel:
    """The newest round."""
    words = Words(
        "Newest round",
        "Number of the newest round of alignment in the newest run.",
        units.Short,
        low="text",
    )
    return number(words, Query(of(Server.ROUND)))


def replies() -> stat.Panel:
    """How complete the newest round is."""
    words = Words(
        "Replies of it",
        "Replies of the newest round, of those that make it complete.",
        units.PercentUnit,
        low="red",
        steps=((0.5, "orange"), (1, "green")),
        alerts=["FieldfedTooFewFarms", "FieldfedFleetSilent"],
    )
    return number(words, Query(f"{of(Server.ROUND_REPLIES)} / {of(Server.ROUND_QUORUM)}"))


def remaining() -> stat.Panel:
    """Until the deadline."""
    words = Words(
        "Until its deadline",
        "How long farms asked at the beginning of the open round are still waited for; below zero "
        "it is over. 0 where no round is open.",
        units.DurationSeconds,
        low="red",
        steps=((-HOUR, "orange"), (0, "green")),
        alerts=["FieldfedRunStopped"],
    )
    wait = f"({left(of(Server.ROUND_DEADLINE))}) * {of(Server.ROUND_OPEN)}"
    return number(words, Query(wait))


def committed() -> stat.Panel:
    """Since the last commit."""
    words = Words(
        "Last commit",
        "How long ago a round was last committed, in any run.",
        units.DurationSeconds,
        low="text",
        alerts=["FieldfedRunStopped"],
    )
    return number(words, Query(age(of(Server.COMMITTED))))


def size() -> stat.Panel:
    """Of the store."""
    words = Words(
        "Store",
        "Size of fieldfed.db with its log. Candidates and replies lie beside it.",
        units.BytesIEC,
        low="text",
    )
    return number(words, Query(of(Server.STORE_BYTES)))


# --- rounds --------------------------------------------------------------------------------------


def taking_part() -> timeseries.Panel:
    """Replies against what makes a round complete."""
    words = Words(
        "Replies of the newest round",
        "So far, beside the number that makes the round complete. It begins anew in every round.",
        units.Short,
        alerts=["FieldfedTooFewFarms", "FieldfedFleetSilent"],
    )
    return lines(
        words,
        Query(of(Server.ROUND_REPLIES), "replies"),
        Query(of(Server.ROUND_QUORUM), "quorum"),
    )


def outcomes() -> timeseries.Panel:
    """Rounds by outcome."""
    words = Words(
        "Rounds in an hour, by outcome",
        "Committed; open when their run failed; begun again after a crash.",
        units.Short,
        alerts=["FieldfedRunStopped"],
    )
    counts = f"sum by (outcome) ({increase(of(Server.ROUNDS), '1h')})"
    return lines(words, Query(counts, "{{outcome}}"), stacked=True)


def quantiles() -> timeseries.Panel:
    """How long rounds of a day took."""
    words = Words(
        "Duration of rounds within a day",
        "From the first beginning of a round to its commit. Estimated from a histogram.",
        units.Seconds,
    )
    counts = f"sum by (le) ({increase(of(Server.ROUND_SECONDS), '1d')})"
    shares = ((0.5, "half of them"), (0.9, "nine of ten"), (1.0, "the longest"))
    queries = [Query(f"histogram_quantile({share}, {counts})", name) for share, name in shares]
    return lines(words, *queries)


def seconds() -> heatmap.Panel:
    """How durations are spread."""
    words = Words(
        "Duration of rounds",
        "How many rounds of an hour took how long.",
        units.Seconds,
    )
    counts = f"sum by (le) ({increase(of(Server.ROUND_SECONDS), '1h')})"
    return spread(words, Query(counts, "{{le}}"))


def late() -> timeseries.Panel:
    """Replies by how late they were."""
    words = Words(
        "Replies in time, and late ones",
        "Of the replies of rounds committed within a day: those to the round itself, and those at "
        "most one, or three, rounds late.",
        units.PercentUnit,
    )
    total = f"sum({increase(of(Server.STALENESS_COUNT), '1d')})"
    bounds = (("0.0", "in time"), ("1.0", "one round late or less"), ("3.0", "three or less"))
    queries = [
        Query(f"sum({increase(of(Server.STALENESS, le=bound), '1d')}) / {total}", name)
        for bound, name in bounds
    ]
    return lines(words, *queries)


def runs() -> bargauge.Panel:
    """Runs that ended."""
    words = Words(
        "Runs that ended, by how",
        "Over the life of the store.",
        units.Short,
        low="text",
        alerts=["FieldfedRunStopped"],
    )
    return bars(words, Query(of(Server.RUNS), "{{state}}"), size=Size(12, 8))


# --- mask ----------------------------------------------------------------------------------------


def macs() -> timeseries.Panel:
    """What is left of the work."""
    words = Words(
        "Work left",
        "MACs of the newest candidate over those of the backbone that the run began with.",
        units.PercentUnit,
    )
    return lines(words, Query(of(Server.MACS), "MACs"))


def cuts() -> timeseries.Panel:
    """Prune events that were judged."""
    words = Words(
        "Cuts in an hour, by what was said of them",
        "Accepted, or undone because farms lost more accuracy than they may.",
        units.Short,
        alerts=["FieldfedAccuracyDrops"],
    )
    return lines(words, Query(increase(of(Server.CUTS), "1h"), "{{outcome}}"), stacked=True)


def heads() -> bargauge.Panel:
    """By block."""
    words = Words("Heads kept", "Attention heads that are left in each block.", units.Short)
    return bars(words, Query(of(Server.HEADS), "block {{block}}"), size=Size(12, 9))


def neurons() -> bargauge.Panel:
    """By block."""
    words = Words("Neurons kept", "MLP neurons that are left in each block.", units.Short)
    return bars(words, Query(of(Server.NEURONS), "block {{block}}"), size=Size(12, 9))


def scores() -> table.Panel:
    """Blocks across heads."""
    words = Words(
        "Head scores, blocks by heads",
        "Consensus of the farms on every head in the newest round with scores. Heads are numbered "
        "as in the dense backbone; where nothing stands the head was gone.",
        units.Number,
        decimals=4,
    )
    query = Query(f"max by (block, head) ({of(Server.HEAD_SCORE)})")
    return matrix(words, query, "block", "head", size=Size(12, 10))


def agreement() -> timeseries.Panel:
    """Between farms."""
    words = Words(
        "Agreement of farms on heads",
        "Mean rank correlation between farms of head scores: 1 means the same order, 0 none. "
        "The nearer to 0, the more a common mask costs some of them.",
        units.Short,
        low="red",
        steps=((0, "green"),),
        decimals=2,
    )
    panel = lines(words, Query(of(Server.CORRELATION), "correlation"), size=Size(12, 10))
    return panel.min(-1).max(1)


# --- versions ------------------------------------------------------------------------------------


def versions() -> stat.Panel:
    """The newest, and what channels name."""
    words = Words(
        "Versions",
        "The newest version, and the one that each channel names.",
        units.Short,
        low="text",
    )
    return number(
        words,
        Query(of(Server.VERSION), "newest"),
        Query(of(Server.CHANNEL_VERSION), "{{channel}}"),
        size=Size(8, 8),
    )


def shares() -> bargauge.Panel:
    """How far rollouts are."""
    words = Words(
        "Rollouts",
        "Share of the farms that a channel's version on its way is shown to; 1 once it is done.",
        units.PercentUnit,
        alerts=["FieldfedRolloutStuck"],
    )
    return bars(words, Query(of(Server.ROLLOUT_SHARE), "{{channel}}"), size=Size(8, 8)).max(1)


def installs() -> bargauge.Panel:
    """What devices made of versions."""
    words = Words(
        "Reports of devices within a day",
        "Committed: in use. Rejected: no better than what serves, which is no fault. Refused and "
        "rolled back: something is wrong with the version or the device.",
        units.Short,
        alerts=["FieldfedDevicesGoBack"],
    )
    counts = increase(of(Server.INSTALLS), "1d")
    return bars(words, Query(counts, "{{outcome}}"), size=Size(8, 8))
