"""The schedule of a run: which rounds score, which end with a prune event, and how far each cuts.

    keep(t) = target + (1 - target) * (1 - t)^3,  t = i / E for events i = 1..E

the cubic schedule of Zhu and Gupta (2017, arXiv:1710.01878): most goes first, while the backbone
is redundant, and the last cuts are small. With R rounds and a first event after round f, events
follow each other every s = floor((R - f) / E) rounds, so at least s rounds of recovery follow the
last one.

A cut is judged by the replies of the round that ends with the next event, the last one by an
evaluation after the last round (server/guard.py). When it is not accepted, half of that step is
tried a round later; when no round of recovery would be left, nothing more is removed.
"""

from dataclasses import dataclass, replace

from common.budget import Budget
from common.costs import CostTable
from common.errors import ConfigError
from common.plan import Compensation, PlanConfig
from common.spec import ModelSpec


@dataclass(frozen=True)
class CutRule:
    """How much a prune event leaves, of what, and how what goes is made up for."""

    budget: Budget
    compensation: Compensation

    def __str__(self) -> str:
        """For people: what tells it from others of the same event."""
        if self.budget.heads_kept is not None:
            return self.compensation
        return f"{self.budget.heads_per_neurons:g} heads per neurons and {self.compensation}"


class Plan:
    """The schedule of one run.

    Args:
        config: rounds, events and targets.
        dense: the backbone that the targets refer to.

    Raises:
        ConfigError: too few rounds for the events, a target below what every block keeps,
            events that remove nothing, or costs of another backbone; says what to change.
    """

    def __init__(self, config: PlanConfig, dense: ModelSpec) -> None:
        self._config, self._dense = config, dense
        self._shares: dict[int, float] = {}
        self._rounds = config.rounds
        self._table = _table(config, dense)
        if not config.prunes:
            return
        rounds = self._event_rounds()
        shares = _schedule(_target(config), config.prune_events)
        self._require_cuts(shares)
        self._shares = dict(zip(rounds, shares, strict=True))

    @property
    def rounds(self) -> int:
        """Rounds of alignment; they are numbered from 1."""
        return self._rounds

    @property
    def events(self) -> tuple[int, ...]:
        """The rounds that end with a prune event, ascending."""
        return tuple(self._shares)

    def event_after(self, number: int) -> Budget | None:
        """The budget of the prune event that ends this round; None when it ends without one."""
        return self._budget(self._shares[number]) if number in self._shares else None

    def rules_after(self, number: int) -> tuple[CutRule, ...]:
        """The rules of which that event follows one, which farms choose; none without an event."""
        budget, config = self.event_after(number), self._config
        if budget is None:
            return ()
        return tuple(
            CutRule(replace(budget, heads_per_neurons=split), compensation)
            for split in config.try_splits or (budget.heads_per_neurons,)
            for compensation in config.try_compensations or (config.compensation,)
        )

    def scores_in(self, number: int) -> bool:
        """Whether farms score their units in this round.

        They do where an event follows, and in round 1 of a run that prunes: the scale of the
        invariance is frozen there, before any alignment has hidden how far a species is.
        """
        return self._config.prunes and (number == 1 or number in self._shares)

    def judged_in(self, number: int) -> int | None:
        """The event whose cut the replies of this round judge; None when they judge none.

        Number ``rounds + 1`` stands for the evaluation after the last round.
        """
        if number not in self._shares and number <= self.rounds:
            return None
        return max((event for event in self._shares if event < number), default=None)

    def compared_with(self, event: int) -> int:
        """The round whose replies tell how good the backbone was before this event's cut."""
        return event

    def accept(self, event: int, judged: int) -> None:
        """The cut after round ``event`` was accepted in round ``judged``."""

    def reject(self, event: int, judged: int) -> None:
        """The cut after round ``event`` was undone in round ``judged``: plan half of the step."""
        share = self._shares.pop(event)
        before = max((number for number in self._shares if number < event), default=None)
        parent = 1.0 if before is None else self._shares[before]
        retry, again = judged + 1, (share + parent) / 2
        self._shares = {n: s for n, s in self._shares.items() if n < event or n > retry}
        if retry < self.rounds and self._units(again) < self._units(parent):
            later = {n: s for n, s in self._shares.items() if n < event or s < again}
            self._shares = dict(sorted((later | {retry: again}).items()))

    def end_after(self, number: int) -> None:
        """The run ends early, with this round; what was planned behind it does not take place."""
        self._rounds = number
        self._shares = {event: share for event, share in self._shares.items() if event <= number}

    def _event_rounds(self) -> list[int]:
        config = self._config
        # a run without warm-up still needs one round to score in
        first, events = max(config.warmup, 1), config.prune_events
        step = self._spacing()
        if step < 1 or first + events * step > config.rounds:
            least = first + events * max(step, 1)
            raise ConfigError(
                f"plan.rounds={config.rounds} is too few for plan.prune_events={events} after "
                f"plan.warmup={config.warmup}; set plan.rounds to at least {least}, or "
                "lower the events or the warm-up"
            )
        return [first + event * step for event in range(events)]

    def _spacing(self) -> int:
        """Rounds from one event to the next: all that are left after the warm-up are shared out."""
        return (self._config.rounds - max(self._config.warmup, 1)) // self._config.prune_events

    def _units(self, share: float) -> float:
        """Heads, MACs or seconds that a share of the dense backbone comes to."""
        if self._config.prune_heads is not None:
            return round(share * sum(self._dense.heads))
        return share * self._budget(share).costs_of(self._dense).total

    def _budget(self, share: float) -> Budget:
        if self._config.prune_heads is not None:
            return Budget(heads_kept=share, whole_attention=self._config.whole_attention)
        return Budget(
            macs_kept=share if self._table is None else None,
            time_kept=None if self._table is None else share,
            table=self._table,
            whole_attention=self._config.whole_attention,
            heads_per_neurons=self._config.heads_per_neurons,
            neuron_multiple=self._config.neuron_multiple,
        )

    def _require_cuts(self, shares: list[float]) -> None:
        """Every event removes something, and the last leaves every block its minimum."""
        least = self._budget(shares[-1])
        heads, neurons = self._dense.heads, self._dense.neurons
        cuts = [self._units(share) for share in shares]
        floor = self._dense.with_units(
            tuple(min(count, least.heads_per_block) for count in heads),
            tuple(min(count, least.neurons_per_block) for count in neurons),
        )
        total: float = sum(heads)
        bottom: float = max(sum(floor.heads), 1)
        if self._config.prune_heads is None:
            costs = least.costs_of(self._dense)
            total, bottom = costs.total, costs.of(floor, self._dense)
        if cuts[-1] < bottom:
            most = int((1 - bottom / total) * 1000) / 1000
            remedy = f"lower it to at most {most:g}"
            if self._config.targets is not None:
                remedy = f"raise it to at least {1 - most:g}"
            raise ConfigError(
                f"{self._setting()} would leave less than one head and a few neurons "
                f"per block; {remedy}"
            )
        if any(after >= before for before, after in zip([total, *cuts], cuts, strict=False)):
            raise ConfigError(
                f"plan.prune_events={len(shares)} is too many for {self._setting()}: an event "
                "would remove nothing; lower the number of events"
            )

    def _setting(self) -> str:
        """What the operator has set, in the words of the settings file."""
        config = self._config
        if config.targets is not None:
            return f"plan.targets.macs_ratio={config.targets.macs_ratio:g}"
        if config.prune_heads is not None:
            return f"plan.prune_heads={config.prune_heads:g}"
        if config.prune_time is not None:
            return f"plan.prune_time={config.prune_time:g}"
        return f"plan.prune_macs={config.prune_macs:g}"


def _table(config: PlanConfig, dense: ModelSpec) -> CostTable | None:
    """Of a budget of time; raises ConfigError naming the file that is no table of this backbone."""
    if config.prune_time is None or config.costs is None:
        return None
    return CostTable.load(config.costs, dense)


def _target(config: PlanConfig) -> float:
    """The share that is kept in the end."""
    if config.targets is not None:
        return config.targets.macs_ratio
    shares = (config.prune_heads, config.prune_macs, config.prune_time)
    return 1 - next(one for one in shares if one is not None)


def _schedule(target: float, events: int) -> list[float]:
    """Shares kept after each event, strictly decreasing; the last is ``target`` exactly."""
    times = [event / events for event in range(1, events + 1)]
    return [target + (1 - target) * (1 - t) ** 3 for t in times]
