"""What happened, newest first: runs, rounds, cuts, replies in quarantine, versions, actions."""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from server.facts import Facts, RegistryFacts, Sources
from server.rows import RunRow
from server.story import percent
from server.telemetry import TelemetryStore
from server.trial import outcome

Tone = Literal["good", "warn", "bad", "calm"]
Kind = Literal["run", "round", "cut", "reply", "farm", "version", "rollout", "device", "action"]
KINDS: Mapping[Kind, str] = {
    "run": "Runs",
    "round": "Rounds",
    "cut": "Cuts",
    "reply": "Replies",
    "farm": "Farms",
    "version": "Versions",
    "rollout": "Rollouts",
    "device": "Devices",
    "action": "Actions",
}
MOST_EVENTS = 200
_OUTCOMES: Mapping[str, tuple[Tone, str]] = {
    "committed": ("good", "took"),
    "rejected": ("calm", "tried and left"),
    "refused": ("warn", "refused"),
    "rolled_back": ("bad", "went back from"),
}


@dataclass(frozen=True)
class Event:
    """Something that happened; ``title`` says what, ``detail`` why."""

    at: float
    kind: Kind
    tone: Tone
    title: str
    detail: str = ""


def events(sources: Sources, kind: Kind | None = None, most: int = MOST_EVENTS) -> list[Event]:
    """The newest, newest first; of one kind where that is given."""
    found = [event for event in _all(sources) if kind in (None, event.kind)]
    newest = heapq.nlargest(most, enumerate(found), key=lambda one: (one[1].at, one[0]))
    return [event for _, event in newest]


def _all(sources: Sources) -> Iterator[Event]:
    for run in sources.facts.last_runs():
        yield from _of_run(run)
        yield from _of_rounds(sources.facts, run)
        yield from _of_cuts(sources.facts, run)
        yield from _of_replies(sources.facts, run)
    for row in sources.facts.pauses():
        words = f"farm {row.farm} is not asked any more"
        yield Event(row.since, "farm", "bad", words, row.reason)
    if sources.registry is not None:
        yield from _of_registry(sources.registry)
    if sources.told is not None:
        yield from _of_devices(sources.told)
    for action in sources.actions:
        refused = action.outcome.startswith("refused")
        outcome = action.outcome or "not known: it was begun, and nobody said how it ended"
        words = f"{action.who}: {action.what}"
        yield Event(action.at, "action", "warn" if refused else "good", words, outcome)


def _of_run(run: RunRow) -> Iterator[Event]:
    name = f"run {run.run} '{run.message}'"
    yield Event(run.started, "run", "calm", f"{name} began")
    if run.finished is not None:
        tones: Mapping[str, Tone] = {"failed": "bad", "stopped": "warn", "done": "good"}
        words = {"done": "is done", "failed": "failed", "stopped": "was stopped"}
        tone, said = tones.get(run.state, "calm"), words.get(run.state, run.state)
        yield Event(run.finished, "run", tone, f"{name} {said}", run.detail)


def _of_rounds(facts: Facts, run: RunRow) -> Iterator[Event]:
    for one in facts.round_facts(run.run):
        row, name = one.row, f"round {one.row.round} of run {run.run}"
        if row.attempt > 1:
            words = f"It was begun {row.attempt} times: the server had stopped."
            yield Event(row.started, "round", "warn", f"{name} began again", words)
        if row.state == "committed" and row.finished is not None:
            words = f"{one.replies} replies, mean accuracy {percent(row.mean_accuracy)}"
            yield Event(row.finished, "round", "good", f"{name} was committed", words)
        elif run.state == "failed" and run.finished is not None:
            words = f"{one.replies} of {row.quorum} replies had come"
            yield Event(run.finished, "round", "bad", f"{name} failed", words)


def _of_cuts(facts: Facts, run: RunRow) -> Iterator[Event]:
    when = {row.round: row.finished for row in facts.rounds(run.run) if row.kind == "align"}
    for event, tried in facts.trials(run.run).items():
        at = when.get(event) or run.finished or run.started
        title = f"{len(tried)} cuts were tried after round {event} of run {run.run}"
        yield Event(at, "cut", "calm", title, outcome(tried))
    for row in facts.verdicts(run.run):
        at = when.get(row.judged) or when.get(row.event) or run.finished or run.started
        fate: tuple[Tone, str] = ("good", "accepted") if row.accepted else ("bad", "undone")
        words = f"{100 * row.drop_ratio:+.1f} points lost over {row.farms} farms"
        title = f"the cut after round {row.event} of run {run.run} was {fate[1]}"
        yield Event(at, "cut", fate[0], title, words)


def _of_replies(facts: Facts, run: RunRow) -> Iterator[Event]:
    names = facts.names(run.run)
    for row in facts.rejected_of(run.run, MOST_EVENTS):
        farm = "a farm" if row.node is None else names.get(row.node, f"node {row.node}")
        title = f"a reply of {farm} to round {row.round} was lost"
        if row.reason != "lost":
            why = row.reason.replace("_", " ")
            title = f"a reply of {farm} to round {row.round} was put into quarantine: {why}"
        detail = "" if row.detail == row.reason else row.detail
        yield Event(row.received, "reply", "warn", title, detail)


def _of_devices(told: TelemetryStore) -> Iterator[Event]:
    """Of updates devices tell the hub as well, which is in the registry."""
    for event in told.events(MOST_EVENTS):
        if event.kind != "update":
            tone: Tone = "bad" if event.kind == "fault" else "calm"
            yield Event(event.received, "device", tone, f"device {event.device}: {event.words}")


def _of_registry(registry: RegistryFacts) -> Iterator[Event]:
    for version in registry.versions()[-MOST_EVENTS:]:
        yield Event(version.created, "version", "calm", f"version {version.counter} was made")
    for row in islice(registry.last_named(MOST_EVENTS), MOST_EVENTS):
        title = f"channel {row.name} names version {row.version}"
        yield Event(row.issued, "version", "good", title, row.why)
    for rollout in registry.rollouts():
        tones: Mapping[str, Tone] = {"aborted": "bad", "paused": "warn", "done": "good"}
        title = f"version {rollout.version} on its way to {rollout.channel}: {rollout.state}"
        tone = tones.get(rollout.state, "calm")
        yield Event(rollout.since, "rollout", tone, title, rollout.detail)
    for install in registry.last_installs(MOST_EVENTS):
        tone, did = _OUTCOMES.get(install.outcome, ("calm", install.outcome))
        title = f"device {install.device} of {install.farm} {did} version {install.version}"
        yield Event(install.received, "device", tone, title, install.detail)
