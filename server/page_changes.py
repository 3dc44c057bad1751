"""What a signed-in operator changes from the page: the same functions as the commands call.

Every change is on record before it is done, with what came of it after that (server/actions.py).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from common.manifest import ChannelName
from common.settings import validate
from server import actions, rollout
from server.actions import Actions
from server.registry import Registry

WHO = "page"
Change: TypeAlias = Callable[[Path, Mapping[str, str]], str]
"""Of a server's folder, by the fields of a form; says what came of it, or raises FieldfedError."""


class _Form(BaseModel):
    """What a form holds beside the session's secret."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    channel: ChannelName


class _Named(_Form):
    version: int = Field(ge=1)


def _done(folder: Path, what: str, act: Callable[[Registry], str]) -> str:
    with Registry.open(folder) as registry, Actions.open(Actions.path(folder)) as record:
        return record.do(WHO, what, lambda: act(registry))


def _promote(folder: Path, sent: Mapping[str, str]) -> str:
    asked = validate(_Named, dict(sent), "promote")

    def act(registry: Registry) -> str:
        row = actions.promote(registry, asked.channel, asked.version)
        return f"channel {asked.channel} names version {row.version}"

    return _done(folder, f"promote version {asked.version} to {asked.channel}", act)


def _roll_back(folder: Path, sent: Mapping[str, str]) -> str:
    asked = validate(_Named, dict(sent), "roll back")

    def act(registry: Registry) -> str:
        row = actions.roll_back(registry, asked.channel, asked.version)
        return f"channel {asked.channel} names version {row.version} again: {row.why}"

    return _done(folder, f"roll {asked.channel} back to version {asked.version}", act)


def _start(folder: Path, sent: Mapping[str, str]) -> str:
    def names(key: str) -> list[str]:
        return [one.strip() for one in sent.get(key, "").split(",") if one.strip()]

    values: dict[str, Any] = {key: sent[key] for key in ("channel", "version") if key in sent}
    values |= {"canary": names("canary"), "stages": names("stages")}
    plan = validate(rollout.RolloutPlan, values, "rollout start")

    def act(registry: Registry) -> str:
        row = rollout.start(registry, plan)
        first = ", ".join(plan.canary) or f"{plan.shares[0]:.0%} of the farms"
        return f"version {row.version} goes to {first}"

    return _done(folder, f"roll version {plan.version} out to {plan.channel}", act)


def _moves(state: Literal["running", "paused"], what: str, words: str) -> Change:
    """A change of a rollout's state, as an operator says it."""

    def change(folder: Path, sent: Mapping[str, str]) -> str:
        channel = validate(_Form, dict(sent), f"rollout {what}").channel

        def act(registry: Registry) -> str:
            return f"version {rollout.change(registry, channel, state).version} {words}"

        return _done(folder, f"{what} the rollout to {channel}", act)

    return change


def _abort(folder: Path, sent: Mapping[str, str]) -> str:
    channel = validate(_Form, dict(sent), "rollout abort").channel

    def act(registry: Registry) -> str:
        row = rollout.abort(registry, channel)
        return f"channel {channel} names version {row.previous} for every farm"

    return _done(folder, f"end the rollout to {channel}", act)


CHANGES: Mapping[str, Change] = {
    "/versions/promote": _promote,
    "/versions/roll-back": _roll_back,
    "/rollouts/start": _start,
    "/rollouts/pause": _moves("paused", "pause", "waits"),
    "/rollouts/resume": _moves("running", "resume", "goes on"),
    "/rollouts/abort": _abort,
}
