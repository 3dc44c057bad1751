"""What an operator should look at now, as far as it can be told from what is on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from server.facts import Facts, RegistryFacts, Sources, planned_rounds
from server.rows import RunRow

LATE_SECONDS = 60.0
"""That a round may stay open beyond its deadline: it is being closed."""
SILENT_SECONDS = 6 * 3600.0
"""Without a word from a farm, while a run goes on."""
HEARD_SECONDS = 15 * 60.0
"""A farm that was heard of within these counts as online: it says something at every reply."""
EXPIRY_SECONDS = 5 * 86_400.0
"""Before a channel expires; the hub renews it long before."""
MOST_NAMED = 5


@dataclass(frozen=True)
class Alert:
    """Something to look at: what it is, and what to do."""

    tone: Literal["bad", "warn"]
    title: str
    words: str


def alerts(sources: Sources, run: RunRow | None, now: float) -> list[Alert]:
    """The worst first."""
    found = [Alert("bad", "Part of the state cannot be read", words) for words in sources.faults]
    if run is not None:
        found += _of_run(sources.facts, run, now)
    found += _of_farms(sources.facts, run, now)
    if sources.registry is not None:
        found += _of_registry(sources.registry, now)
    return sorted(found, key=lambda one: one.tone != "bad")


def _of_run(facts: Facts, run: RunRow, now: float) -> Iterator[Alert]:
    if run.state == "failed":
        why = run.detail or "the log of the server process says why"
        yield Alert("bad", f"Run {run.run} failed", why)
    newest = facts.newest_round()
    open_now = newest is not None and newest.open and run.state == "running"
    if newest is not None and open_now and now > newest.deadline + LATE_SECONDS:
        words = (
            f"{newest.replies} of {newest.quorum} replies came. The round ends with those that it "
            "has, or begins again once farms are online; see logs/serverapp.log."
        )
        yield Alert("warn", f"Round {newest.round} is open beyond its deadline", words)
    undone = [row for row in facts.verdicts(run.run) if not row.accepted]
    if undone and run.state == "running":
        words = (
            f"It had cost {100 * undone[-1].drop_ratio:.1f} points over {undone[-1].farms} farms."
        )
        yield Alert("warn", f"The cut after round {undone[-1].event} was undone", words)
    if run.state == "stopped":
        words = (
            f"{run.detail or 'It was stopped by hand'}; {planned_rounds(run)} rounds were planned."
        )
        yield Alert("warn", f"Run {run.run} was stopped", words)


def _of_farms(facts: Facts, run: RunRow | None, now: float) -> Iterator[Alert]:
    for row in facts.pauses()[:MOST_NAMED]:
        words = (
            f"Paused for {row.reason}. To ask it again: fieldfed-server readmit FOLDER {row.farm}"
        )
        yield Alert("bad", f"Farm {row.farm} is not asked any more", words)
    if run is None or run.state != "running":
        return
    seen = facts.last_seen(run.run)
    silent = [farm for farm, at in seen.items() if now - at > SILENT_SECONDS]
    if silent:
        names = ", ".join(silent[:MOST_NAMED]) + (" ..." if len(silent) > MOST_NAMED else "")
        what = "farm was" if len(silent) == 1 else "farms were"
        title = f"{len(silent)} {what} not heard of for {SILENT_SECONDS / 3600:.0f} hours"
        yield Alert("warn", title, f"{names}. Look whether the machine and its network are up.")


def _of_registry(registry: RegistryFacts, now: float) -> Iterator[Alert]:
    for row in registry.rollouts():
        if row.state == "aborted":
            title = f"The rollout of version {row.version} to {row.channel} ended"
            words = f"{row.detail}. The channel names version {row.previous} for every farm."
            yield Alert("warn", title, words)
        elif row.state == "paused":
            words = "No further farm is offered it until it is resumed."
            yield Alert("warn", f"The rollout of version {row.version} waits", words)
    for channel in registry.channels():
        if channel.expires < now + EXPIRY_SECONDS:
            over = channel.expires < now
            title = f"Channel {channel.name} {'has expired' if over else 'expires soon'}"
            words = "The hub renews channels while it runs; look at logs/hub.log."
            yield Alert("bad" if over else "warn", title, words)
