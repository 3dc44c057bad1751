"""A run that looks for the smallest backbone inside a tolerance.

It cuts along the schedule of server/plan.py towards ``macs_ratio``. Every cut recovers for
``recovery_rounds`` and is judged against the backbone of before the *first* cut. One that loses
more than ``max_drop_ratio`` is undone; from there the run bisects between the smallest backbone
that was accepted and the largest that was not, until their difference is below ``STEP_RATIO`` of
the dense MACs or the rounds are over. What it saw is in the verdicts.
"""

from collections.abc import Sequence

from common.plan import PlanConfig
from common.spec import ModelSpec
from server.plan import Plan
from server.rows import VerdictRow

STEP_RATIO = 0.01


class Search(Plan):
    """The schedule of one run with ``plan.targets``; raises as :class:`Plan` does."""

    def __init__(self, config: PlanConfig, dense: ModelSpec) -> None:
        assert config.targets is not None
        self._recovery = config.targets.recovery_rounds
        super().__init__(config, dense)
        self._first = self.events[0]
        self._rejected: float | None = None

    def _spacing(self) -> int:
        return self._recovery

    def scores_in(self, number: int) -> bool:
        """Also where a cut may follow that is not planned yet: where one is judged."""
        return super().scores_in(number) or self.judged_in(number) is not None

    def judged_in(self, number: int) -> int | None:
        """As for any plan, and once a cut has recovered although no other is planned there."""
        event = max((event for event in self._shares if event < number), default=None)
        over = number in self._shares or number > self.rounds
        return event if over or event == number - self._recovery else None

    def compared_with(self, event: int) -> int:
        """The tolerance is for all cuts together."""
        return min(self._first, event)

    def accept(self, event: int, judged: int) -> None:
        """Go on towards what was too much, unless a cut is planned here anyway."""
        share = self._shares[event]
        if self._rejected is None or judged in self._shares or judged >= self.rounds:
            return
        if share - self._rejected >= 2 * STEP_RATIO:
            self._shares[judged] = (share + self._rejected) / 2

    def reject(self, event: int, judged: int) -> None:
        """Half of the step a round later; nothing as small as this is tried again."""
        share = self._shares[event]
        self._rejected = share if self._rejected is None else max(share, self._rejected)
        super().reject(event, judged)
        self._shares = {n: s for n, s in self._shares.items() if n < event or s > share}


def planned(config: PlanConfig, dense: ModelSpec, verdicts: Sequence[VerdictRow]) -> Plan:
    """The schedule of a run, as far as its verdicts have brought it.

    Raises:
        ConfigError: the settings cannot be met, as for :class:`Plan`.
    """
    plan = Plan(config, dense) if config.targets is None else Search(config, dense)
    for verdict in verdicts:
        (plan.accept if verdict.accepted else plan.reject)(verdict.event, verdict.judged)
    return plan
