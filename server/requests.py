"""Requests made to measure: each farm gets the smallest body that brings it up to date.

A whole backbone is left at the hub for a farm that can fetch from it, and only named here.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from common.config import ServerConfig
from common.messages import (
    AlignRequest,
    AnyMessage,
    EvaluateRequest,
    HelloRequest,
    Lesson,
    spoken,
)
from common.protocols import PROTOCOL, SCHEMAS, has
from server.bodies import Bodies
from server.close import Base, Work
from server.models import Models


class Requests:
    """Makes requests and remembers which backbones each farm holds.

    With a ``lesson`` they are of a run that distils, where all but the teacher are students.
    """

    def __init__(
        self, run: int, config: ServerConfig, models: Models, lesson: Lesson | None = None
    ) -> None:
        self._run, self._config, self._models = run, config, models
        self._lesson = lesson
        self._bodies = Bodies(models.state_dir, models.body) if config.hub is not None else None
        self._fetching: set[int] = set()
        self._held: dict[int, set[str]] = {}
        self._anchored: dict[int, str] = {}
        self._folded: dict[int, int] = {}
        self._speaks: dict[int, int] = {}

    def farm_speaks(self, node: int, protocol: int) -> bool:
        """A farm refused our protocol and named its own; whether it can be asked again in that."""
        known = self._speaks.get(node, PROTOCOL)
        if protocol == known or protocol not in SCHEMAS:
            return False
        self._speaks[node] = protocol
        self._fetching.discard(node)  # it says so anew, if it still can
        return True

    def can_learn(self, node: int) -> bool:
        """Whether a farm's protocol knows of students."""
        return has("align", "lesson", self._speaks.get(node, PROTOCOL))

    def _sends_moments(self, node: int) -> bool:
        return has("align", "moments", self._speaks.get(node, PROTOCOL))

    def holds(self, node: int, digest: str) -> bool:
        """Whether a farm is known to hold this backbone."""
        return digest in self._held.get(node, ())

    def farm_holds(self, node: int, digests: Iterable[str]) -> None:
        """A farm said, or showed by its reply, that it holds these backbones."""
        self._held.setdefault(node, set()).update(digests)

    def farm_fetches(self, node: int) -> None:
        """A farm said that it can fetch from the hub."""
        self._fetching.add(node)

    def farm_has_anchors(self, node: int, mask: str) -> None:
        """A farm showed by its reply that it holds the anchors of this mask."""
        self._anchored[node] = mask

    def counts(self, folded: Mapping[int, int]) -> None:
        """Which replies count: the newest round that was answered, by node."""
        self._folded = dict(folded)

    def farm_lost(self, node: int) -> None:
        """A farm said that it lacks what we thought it holds: the next body is whole, and here."""
        self._held[node] = set()
        self._fetching.discard(node)  # the hub may be what failed
        self._anchored.pop(node, None)

    def hello(self, node: int, _attempt: int) -> HelloRequest:
        """Who are you?"""
        return self._spoken(node, HelloRequest())

    def align(
        self, node: int, attempt: int, work: Work, budgets: Mapping[int, int]
    ) -> AlignRequest:
        """One round of alignment, with at most as many steps as the farm's budget.

        Raises:
            ProtocolError: the farm's protocol cannot say it.
        """
        request = AlignRequest(
            **self._work(node, attempt, work.number, work.base),
            train=self._config.train_under(work.base.mask),
            **self._anchors(node, work),
            criterion=self._config.plan.criterion if work.scored else None,
            steps=budgets.get(node),
            folded=self._folded.get(node),
            privacy=self._config.privacy,
            lesson=self._lesson,
            moments=work.moments if self._sends_moments(node) else None,
        )
        return self._spoken(node, request)

    def evaluate(
        self,
        node: int,
        attempt: int,
        number: int,
        base: Base,
        label: str,
        part: Literal["test", "decide"],
        local_rounds: int,
    ) -> EvaluateRequest:
        """A report on ``base``, or on what the farm learns alone from it; raises as ``align``."""
        request = EvaluateRequest(
            **self._work(node, attempt, number, base),
            train=self._config.train_under(base.mask),
            label=label,
            part=part,
            local_rounds=local_rounds,
        )
        return self._spoken(node, request)

    def _spoken(self, node: int, request: AnyMessage) -> AnyMessage:
        return spoken(request, self._speaks.get(node, PROTOCOL))

    def _work(self, node: int, attempt: int, number: int, base: Base) -> dict[str, Any]:
        return {
            "run": self._run,
            "round": number,
            "attempt": attempt,
            "seed": self._config.seed,
            "base": base.digest,
            "base_kind": self._kind_of(base),
            "mask": base.mask.digest,
            **self._body(node, base.digest),
        }

    def _kind_of(self, base: Base) -> Literal["backbone", "student"]:
        taught = self._lesson is not None and base.digest != self._lesson.teacher
        return "student" if taught else "backbone"

    def _anchors(self, node: int, work: Work) -> dict[str, Any]:
        """What alignment and scores are measured against, where they need it."""
        mask = work.base.mask.digest
        if not work.scored and self._config.train.dal_weight == 0:
            return {}
        anchors = self._models.anchors(mask)
        if anchors is None:
            return {}
        known = {"anchors_digest": hashlib.sha256(anchors.data).hexdigest()}
        return known if self._anchored.get(node) == mask else {**known, "anchors": anchors}

    def _body(self, node: int, base: str) -> dict[str, Any]:
        held = self._held.get(node, set())
        if base in held:
            return {"body_kind": "none"}
        way = self._models.way(held, base)
        if way is not None:
            return {"body_kind": way.kind, "body_from": way.start, "body": way.body}
        placed = self._bodies.place(base) if self._bodies and node in self._fetching else None
        if placed is not None:
            return {"body_kind": "hub", "body_object": placed[0], "body_bytes": placed[1]}
        return {"body_kind": "full", "body": self._models.body(base)}
