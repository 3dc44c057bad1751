"""The farms of a run: wait for them, ask who they are, and draw those of a round."""

import logging
from functools import partial

import numpy as np

from common.config import RoundConfig, ServerConfig
from common.errors import StateError
from server.collect import Collector, Exchange, Owed, greeting_rules
from server.intake import Intake
from server.link import Clock, FarmLink
from server.requests import Requests

log = logging.getLogger(__name__)


class Participants:
    """Who takes part.

    Args:
        config: how many there must be, how many are asked, and for how long they are waited for.
        link: to the farms.
        clock: of the waiting.
        intake: knows the farms that have said who they are.
        requests: makes the question.
    """

    def __init__(
        self,
        config: ServerConfig,
        link: FarmLink,
        clock: Clock,
        intake: Intake,
        requests: Requests,
    ) -> None:
        self._rules, self._seed = config.rounds, config.seed
        self._link, self._clock = link, clock
        self._intake, self._requests = intake, requests

    def wait(self) -> None:
        """Wait until enough farms are online, then ask each who it is.

        Raises:
            StateError: too few came in time, or none answered.
        """
        rules = self._rules
        limit = self._clock.now() + rules.deadline_seconds
        if len(self._link.online()) < rules.min_farms:
            log.info("waiting for %d farms", rules.min_farms)
        while len(self._link.online()) < rules.min_farms:
            if self._clock.now() > limit:
                raise StateError(
                    f"only {len(self._link.online())} of {rules.min_farms} farms came online "
                    f"within {rules.deadline_seconds:.0f} s; start the farms or lower "
                    "rounds.min_farms"
                )
            self._clock.sleep(1.0)
        self.meet()
        if not self._intake.farms:
            raise StateError("no farm answered; 'fieldfed-server status' shows why")

    def meet(self) -> None:
        """Ask farms that we do not know yet who they are and what they hold.

        A farm whose SuperNode starts again meanwhile has a new number, and is asked by that too.
        """
        if strangers := self._strangers():
            exchange = Exchange(
                nodes=strangers,
                request=self._requests.hello,
                accept=self._intake.hello(),
                sent=lambda _node, _attempt, _size: None,
                fault=partial(self._intake.quarantine, 0),
                joining=self._strangers,
            )
            known = len(self._intake.farms)
            self.ask(exchange, greeting_rules(self._rules, known, len(strangers)), 0)

    def _strangers(self) -> list[int]:
        return [node for node in self._link.online() if node not in self._intake.farms]

    def of_round(self, number: int) -> list[int]:
        """The farms of a round: all that are not paused, or a sample of those online.

        Raises:
            StateError: every farm is paused.
        """
        farms, size = self._intake.active(), self._rules.sample
        if not farms:
            raise StateError(
                "every farm is paused; 'fieldfed-server status' shows why, "
                "'fieldfed-server readmit' asks one again"
            )
        if size is None:
            return farms
        online = set(self._link.online())
        present = [node for node in farms if node in online] or farms
        drawn = np.random.default_rng([self._seed, number]).permutation(len(present))
        return [present[index] for index in sorted(drawn[:size])]

    def ask(
        self,
        exchange: Exchange,
        rules: RoundConfig,
        number: int,
        owed: dict[str, Owed] | None = None,
    ) -> int:
        """Have an exchange with farms; returns what the collector does.

        Args:
            exchange: what is asked of whom.
            rules: of waiting.
            number: of the round; the jitter follows from it.
            owed: answers of earlier exchanges, taken along.
        """
        jitter = self._seed + number
        return Collector(self._link, self._clock, rules, jitter).run(exchange, owed)
