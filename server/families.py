"""The metric families of a server: each source on disk yields its families.

Names begin with ``fieldfed_``, units are seconds, bytes and ratios, times are unix seconds. Values
of labels are bounded: by an enum, by the blocks and heads of the backbone, by ``MOST_FARMS``, of
farms and of devices, and ``MOST_CHANNELS``. No label is a path, a class or a text that a farm may
choose.
"""

import math
import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar, get_args

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from common.errors import RejectReason
from common.manifest import Outcome
from common.mask import Blocks, Mask
from common.scores import UnitScores
from server.consensus import rank_correlation
from server.figures import MOST_FARMS, Figures, RegistryFigures, RoundNow
from server.rollout import RolloutPlan
from server.rows import RunState, ScoreRow
from server.telemetry import TelemetryStore
from server.versions import RolloutRow, RolloutState

Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels, and what was measured."""
Row = TypeVar("Row")
Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)

PREFIX = "fieldfed_"
MOST_CHANNELS = 100
"""Shown: the first by name."""
ROUND_SECONDS = (1, 10, 30, 60, 300, 600, 1800, 3600, 10_800, 43_200, 86_400)
ROUNDS_LATE = (0, 1, 2, 3, 5, 10, 30, 100)
ENDED: tuple[RunState, ...] = ("done", "stopped", "failed")


def build_info() -> Metric:
    """Which release shows the figures."""
    values = {"version": version("fieldfed"), "python": platform.python_version()}
    return InfoMetricFamily(f"{PREFIX}build", "The release that shows these figures", values)


def sources_up(up: Mapping[str, bool]) -> Metric:
    """Which sources could be read."""
    what = "Whether the figures of a source could be read"
    return _gauges("up_source", what, ["source"], _each(up, up))


# --- the store -----------------------------------------------------------------------------------


def of_runs(figures: Figures) -> Iterable[Metric]:
    """Runs, their rounds and their prune events."""
    run, sums = figures.newest_run(), figures.round_sums()
    verdicts = figures.verdicts_by_outcome()
    cuts = {"accepted": verdicts.get(1, 0), "undone": verdicts.get(0, 0)}
    number, state = _of(run, lambda row: row.run), None if run is None else run.state
    yield _gauge("run_number", "Number of the newest run", number)
    states = _which(state, get_args(RunState))
    yield _gauges("run_state", "1 for the state that the newest run is in", ["state"], states)
    ended = _each(figures.runs_by_state(), ENDED)
    yield _counters("runs", "Runs that ended, by how", ["state"], ended)
    rounds = {"committed": sums.committed, "failed": sums.failed, "reopened": sums.reopened}
    what = "Rounds committed, open when their run failed, or begun again after a crash"
    yield _counters("rounds", what, ["outcome"], _each(rounds, rounds))
    seconds = Counter(figures.round_seconds())
    what = "From the first beginning of a round to its commit"
    yield _histogram("round_duration_seconds", what, ROUND_SECONDS, seconds)
    yield _counters("cuts", "Prune events that were judged", ["outcome"], _each(cuts, cuts))
    yield from _newest_round(figures.newest_round())


def _newest_round(row: RoundNow | None) -> Iterable[Metric]:
    what = "Number of the newest round in the newest run"
    yield _gauge("round_number", what, _of(row, lambda it: it.round))
    yield _gauge("round_open", "Whether that round is open", _of(row, lambda it: it.open))
    what = "Replies in that round, so far"
    yield _gauge("round_participants", what, _of(row, lambda it: it.replies))
    what = "Replies that make that round complete"
    yield _gauge("round_quorum", what, _of(row, lambda it: it.quorum))
    what = "When farms asked at the beginning of that round are waited for no longer"
    yield _gauge("round_deadline_timestamp_seconds", what, _of(row, lambda it: it.deadline))


def of_replies(figures: Figures) -> Iterable[Metric]:
    """What farms sent and were sent, over all runs."""
    yield _counter("replies", "Replies that committed rounds count", figures.round_sums().replies)
    reasons = _each(figures.rejected(), RejectReason)
    what = "Replies put into quarantine, or that never came"
    yield _counters("replies_rejected", what, ["reason"], reasons)
    what = "Rounds by which the replies of committed rounds were late"
    yield _histogram("reply_staleness_rounds", what, ROUNDS_LATE, figures.rounds_late())
    what = "Bytes of messages up from farms and down to them"
    yield _counters("message_bytes", what, ["direction"], _both_ways(figures.message_bytes()))
    what = "Bytes at the sockets of farms that count them, with all that is around messages"
    yield _counters("link_bytes", what, ["direction"], _both_ways(figures.socket_bytes()))


def of_farms(figures: Figures) -> Iterable[Metric]:
    """The farms of the newest run."""
    run = figures.newest_run()
    seen = {} if run is None else figures.last_seen(run.run)
    quality = [] if run is None else figures.quality(run.run)
    shown = [row for row in quality if row.farm in seen]
    active = 0 if run is None else figures.active_farms(run.run)
    counts = {"active": active, "paused": len(figures.pauses())}
    what = "Farms of the newest run, also those not shown one by one, and those asked no more"
    yield _gauges("farms", what, ["state"], _each(counts, counts))
    labels = ["farm", "part"]
    accuracy = (((row.farm, row.part), row.accuracy) for row in shown)
    what = "Newest accuracy of a shared backbone at a farm, on its decide or test part"
    yield _gauges("farm_accuracy_ratio", what, labels, accuracy)
    f1 = (((row.farm, row.part), row.f1) for row in shown)
    yield _gauges("farm_f1_ratio", "Macro-F1 that goes with that accuracy", labels, f1)
    what = "When a farm was last heard of"
    yield _gauges("farm_last_seen_timestamp_seconds", what, ["farm"], _each(seen, seen))


def of_model(figures: Figures) -> Iterable[Metric]:
    """What is left of the backbone in the newest run, and what farms say of its heads."""
    run = figures.newest_run()
    mask = None if run is None else Mask.from_json(figures.mask_now(run))
    scores = [] if run is None else figures.last_scores(run.run)
    heads = () if mask is None else mask.heads
    neurons = () if mask is None else mask.neurons
    yield _gauges("heads_kept", "Heads left in a block", ["block"], _sizes(heads))
    yield _gauges("neurons_kept", "MLP neurons left in a block", ["block"], _sizes(neurons))
    macs = _of(run, lambda row: figures.macs_ratio(row.run))
    yield _gauge("macs_ratio", "MACs of the newest candidate over those of the first", macs)
    what = "Consensus on a head in the newest round with scores; heads as in the dense backbone"
    samples = [one for row in scores if row.farm is None for one in _head_scores(figures, row)]
    yield _gauges("head_score", what, ["block", "head"], samples)
    what = "Mean rank correlation between farms of head scores in that round, -1 to 1"
    yield _gauge("score_rank_correlation", what, _one(_agreement(scores)))


def of_store(figures: Figures) -> Iterable[Metric]:
    """The store itself."""
    what = "When a round was last committed"
    yield _gauge("last_commit_timestamp_seconds", what, _one(figures.last_commit()))
    yield _gauge("store_size_bytes", "Size of the store with its log", _one(figures.size_bytes()))


def _head_scores(figures: Figures, row: ScoreRow) -> Samples:
    scored = Mask.from_json(figures.mask(row.mask)).heads
    units = [(str(block), str(head)) for block, heads in enumerate(scored) for head in heads]
    return list(zip(units, row.heads.tolist(), strict=True))


def _agreement(rows: Sequence[ScoreRow]) -> float | None:
    farms = [UnitScores((row.heads,), ()) for row in rows if row.farm is not None]
    return rank_correlation(farms) if len(farms) > 1 else None


# --- devices -------------------------------------------------------------------------------------


def of_devices(told: TelemetryStore) -> Iterable[Metric]:
    """What devices told over MQTT, beside their results, which are for the operator's page."""
    presence = told.presence()
    shown = told.devices(MOST_FARMS)
    what = "Devices that the broker knows to be there or not, also those not shown one by one"
    yield _gauges("devices", what, ["state"], _each(presence, ("online", "offline")))
    seen = [((row.name,), row.seen) for row in shown if row.seen is not None]
    what = "When a message last came from a device"
    yield _gauges("device_last_seen_timestamp_seconds", what, ["device"], seen)
    waiting = [((row.name,), row.outbox) for row in shown if row.outbox is not None]
    what = "Messages that waited on a device for its broker, by its newest telemetry"
    yield _gauges("device_outbox_messages", what, ["device"], waiting)
    counts = told.counts()
    what = "Messages that came over MQTT, by what became of them"
    yield _counters("telemetry_messages", what, ["outcome"], _each(counts, counts))


# --- registry and certificates -------------------------------------------------------------------


def of_registry(figures: RegistryFigures) -> Iterable[Metric]:
    """Versions, the channels that name them, and what devices said."""
    channels = figures.channels()[:MOST_CHANNELS]
    rollouts = figures.rollouts()[:MOST_CHANNELS]
    newest = _one(figures.newest_version())
    yield _gauge("newest_version", "Number of the newest version", newest)
    named = [((row.name,), row.version) for row in channels]
    yield _gauges("channel_version", "Version that a channel names", ["channel"], named)
    ends = [((row.name,), row.expires) for row in channels]
    what = "When devices stop to believe what a channel names, unless it is signed again"
    yield _gauges("channel_expiry_timestamp_seconds", what, ["channel"], ends)
    states = [
        ((row.channel, *state), value)
        for row in rollouts
        for state, value in _which(row.state, get_args(RolloutState))
    ]
    what = "1 for the state that a channel's last rollout is in"
    yield _gauges("rollout_state", what, ["channel", "state"], states)
    shares = [((row.channel,), _share(row)) for row in rollouts]
    what = "Share of the farms that its version is shown to, beside those named"
    yield _gauges("rollout_share_ratio", what, ["channel"], shares)
    outcomes = _each(figures.outcomes(), get_args(Outcome))
    what = "Reports of devices on versions, by what became of them"
    yield _counters("installs", what, ["outcome"], outcomes)


def _share(row: RolloutRow) -> float:
    if not row.going:
        return float(row.state == "done")
    return RolloutPlan.model_validate_json(row.plan).shares[row.stage]


def of_certificates(ends: Mapping[str, datetime]) -> Iterable[Metric]:
    """When certificates end, by whose they are."""
    samples = [((holder,), end.timestamp()) for holder, end in ends.items()]
    what = "When a certificate ends; of the farms', the first, each farm's newest counting"
    yield _gauges("certificate_expiry_timestamp_seconds", what, ["holder"], samples)


# --- one family ----------------------------------------------------------------------------------


def _gauge(name: str, what: str, samples: Samples) -> Metric:
    return _gauges(name, what, [], samples)


def _gauges(name: str, what: str, labels: Sequence[str], samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(f"{PREFIX}{name}", what, labels=labels), samples)


def _counter(name: str, what: str, value: float) -> Metric:
    return _counters(name, what, [], _one(value))


def _counters(name: str, what: str, labels: Sequence[str], samples: Samples) -> Metric:
    """``_total`` is added to the name where it is written."""
    return _filled(CounterMetricFamily(f"{PREFIX}{name}", what, labels=labels), samples)


def _filled(family: Family, samples: Samples) -> Family:
    for values, value in samples:
        family.add_metric(values, float(value))
    return family


def _histogram(name: str, what: str, bounds: Sequence[float], counts: Mapping[Any, int]) -> Metric:
    """``counts`` says how often each value (a number) was seen."""
    inside = [0] * (len(bounds) + 1)
    for value, count in counts.items():
        inside[bisect_left(bounds, value)] += count
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    buckets = [(name, float(sofar)) for name, sofar in zip(names, accumulate(inside), strict=True)]
    total = math.fsum(value * count for value, count in counts.items())
    return HistogramMetricFamily(f"{PREFIX}{name}", what, buckets=buckets, sum_value=total)


def _one(value: float | None) -> Samples:
    """A sample without labels; none where nothing is known."""
    return [] if value is None else [((), value)]


def _of(row: Row | None, value: Callable[[Row], float]) -> Samples:
    """The same, of a row that may not be there."""
    return [] if row is None else [((), value(row))]


def _each(counts: Mapping[Any, float], values: Iterable[str]) -> Samples:
    """A sample for every value that a label may have; what did not occur counts 0."""
    return [((str(value),), counts.get(value, 0)) for value in values]


def _which(value: str | None, values: Iterable[str]) -> Samples:
    """1 for the value that holds, 0 for the others."""
    return [((one,), one == value) for one in values]


def _both_ways(sizes: tuple[int, int]) -> Samples:
    return list(zip((("up",), ("down",)), sizes, strict=True))


def _sizes(blocks: Blocks) -> Samples:
    return [((str(block),), len(kept)) for block, kept in enumerate(blocks)]
