"""A version goes out in steps: named farms first, then a tenth, a half, all of them.

    canary   the farms that were named
    stage    those whose sha256(version, farm) falls into the stage's share, and the canaries

While a rollout goes on the channel has two states: the new one, with the higher counter, is shown
to farms of the stage, the other to everybody else. A stage is over when enough devices have
reported since it began, or when it has lasted its hours and anybody has ever reported:

    committed / reports                 at least ``min_success``
    (refused + rolled back) / reports   at most ``max_errors``

One that breaks a threshold ends the rollout: the channel names the version of before, for all.
"""

import hashlib
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.errors import ConfigError
from common.manifest import ChannelName
from common.messages import FarmName, Ratio
from server.registry import Registry
from server.versions import InstallRow, RolloutRow

log = logging.getLogger(__name__)

_ERRORS = frozenset({"refused", "rolled_back"})


class RolloutPlan(BaseModel):
    """How a version goes out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channel: ChannelName
    version: int = Field(ge=1)
    canary: tuple[FarmName, ...] = ()
    stages: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1, 0.5, 1.0)
    min_success: Ratio = Field(default=0.5, description="share of reports that say committed")
    max_errors: Ratio = Field(default=0.1, description="share that say refused or rolled back")
    min_reports: int = Field(default=1, ge=1, description="new ones that end a stage")
    stage_hours: float = Field(default=24.0, gt=0, description="after which fewer will do")

    @model_validator(mode="after")
    def _rising(self) -> "RolloutPlan":
        if not self.stages or list(self.stages) != sorted(set(self.stages)):
            raise ValueError("stages must rise, for example 0.1,0.5,1")
        if self.stages[-1] != 1:
            raise ValueError("the last stage must be 1: every farm")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of farms in each stage; with canaries the first has nobody else."""
        return (0.0, *self.stages) if self.canary else self.stages


def start(registry: Registry, plan: RolloutPlan) -> RolloutRow:
    """Begin a rollout.

    Raises:
        ConfigError: there is no such channel or version, one goes on already, or the channel names
            the version already.
    """
    going = registry.rows.rollout(plan.channel)
    if going is not None and going.going:
        raise ConfigError(
            f"version {going.version} is on its way to channel '{plan.channel}'; abort that first"
        )
    before = registry.named(plan.channel)
    if before.version == plan.version:
        raise ConfigError(f"channel '{plan.channel}' names version {plan.version} already")
    document, counter = registry.document(plan.channel, plan.version, before.counter)
    row = RolloutRow(
        channel=plan.channel,
        version=plan.version,
        previous=before.version,
        counter=counter,
        document=document,
        plan=plan.model_dump_json(),
        stage=0,
        state="running",
        since=_now(),
        detail="begun",
    )
    registry.rows.put_rollout(row)
    return row


def step(registry: Registry) -> list[RolloutRow]:
    """Look at every rollout that runs, and move it on; returns those that changed."""
    changed = []
    for row in registry.rows.rollouts():
        if row.state != "running":
            continue
        moved = _moved(registry, row)
        if moved is not None:
            registry.rows.put_rollout(moved)
            log.info("version %d, channel %s: %s", row.version, row.channel, moved.detail)
            changed.append(moved)
    return changed


def _moved(registry: Registry, row: RolloutRow) -> RolloutRow | None:
    plan = RolloutPlan.model_validate_json(row.plan)
    reports = newest(registry.rows.installs(row.version))
    fresh = sum(one.received >= row.since for one in reports)
    verdict, why = judge(plan, reports, fresh, _now() - row.since)
    if verdict == "wait":
        return None
    if verdict == "bad":
        registry.promote(row.channel, row.previous, why=f"rollout of {row.version} ended: {why}")
        return row.changed(state="aborted", detail=why, since=_now())
    if row.stage + 1 < len(plan.shares) and plan.shares[row.stage + 1] < 1:
        share = plan.shares[row.stage + 1]
        return row.changed(
            stage=row.stage + 1, since=_now(), detail=f"{why}; goes to {share:.0%} of the farms"
        )
    registry.promote(row.channel, row.version, why="rolled out")
    return row.changed(state="done", since=_now(), detail=f"{why}; every farm is offered it")


Verdict = Literal["good", "bad", "wait"]


def judge(
    plan: RolloutPlan, reports: Sequence[InstallRow], fresh: int, seconds: float
) -> tuple[Verdict, str]:
    """Whether a stage is over.

    Args:
        plan: of the rollout.
        reports: the newest of every device.
        fresh: how many of them came since the stage began.
        seconds: since then.
    """
    count = len(reports)
    taken = sum(row.outcome == "committed" for row in reports)
    errors = sum(row.outcome in _ERRORS for row in reports)
    why = f"{taken} of {count} devices took it, {errors} errors"
    enough = fresh >= plan.min_reports and count >= len(plan.canary)
    if not enough and not (count and seconds >= 3600 * plan.stage_hours):
        return "wait", why
    if taken < plan.min_success * count or errors > plan.max_errors * count:
        return "bad", why
    return "good", why


def newest(reports: Sequence[InstallRow]) -> list[InstallRow]:
    """The last report of each device."""
    return list({(row.farm, row.device): row for row in reports}.values())


def offered(row: RolloutRow, farm: str) -> bool:
    """Whether a farm is shown the new state of the channel."""
    plan = RolloutPlan.model_validate_json(row.plan)
    return farm in plan.canary or share_of(row.version, farm) < plan.shares[row.stage]


def share_of(version: int, farm: str) -> float:
    """A farm's place in [0, 1): another for every version, so that not always the same go first."""
    digest = hashlib.sha256(f"{version}/{farm}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def change(registry: Registry, channel: str, to: Literal["running", "paused"]) -> RolloutRow:
    """Pause a rollout, or let it go on; raises ConfigError where none goes on."""
    row = _going(registry, channel)
    if to == "paused":
        row = row.changed(state=to, detail="paused by hand")
    else:  # it may have been paused for longer than its document holds
        document, counter = registry.document(channel, row.version, row.counter)
        row = row.changed(state=to, detail="goes on", document=document, counter=counter)
    registry.rows.put_rollout(row)
    return row


def abort(registry: Registry, channel: str) -> RolloutRow:
    """End a rollout; the channel names the version of before.

    Raises:
        ConfigError: nothing is on its way there.
    """
    row = _going(registry, channel)
    registry.promote(channel, row.previous, why=f"rollout of {row.version} ended by hand")
    row = row.changed(state="aborted", detail="ended by hand", since=_now())
    registry.rows.put_rollout(row)
    return row


def _going(registry: Registry, channel: str) -> RolloutRow:
    row = registry.rows.rollout(channel)
    if row is None or not row.going:
        raise ConfigError(f"nothing is on its way to channel '{channel}'")
    return row


def _now() -> float:
    return datetime.now(UTC).timestamp()
