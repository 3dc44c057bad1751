"""Versions, channels and rollouts, and the forms that change what devices are offered."""

from collections.abc import Mapping
from statistics import fmean
from xml.etree.ElementTree import Element

from common.errors import FieldfedError
from common.manifest import Manifest
from server import rollout
from server.facts import Sources
from server.keys import SigningKeys
from server.markup import Child, node
from server.page_shell import (
    Frame,
    bar,
    empty,
    form,
    heading,
    moment,
    pill,
    section,
    table,
)
from server.registry import STABLE, Registry
from server.rollout import RolloutPlan
from server.story import count_text, percent, size_text
from server.versions import ChannelRow, RolloutRow, VersionRow

COLUMNS = (
    "Version",
    "Channels",
    "Made",
    "From",
    "Accuracy",
    "MACs",
    "Parameters",
    "Size",
    "Devices",
)


def versions_page(sources: Sources, frame: Frame) -> list[Element | None]:
    """The parts of the page."""
    note = "What devices are offered. Changing it needs the token of this server."
    said = _said(frame)
    if sources.registry is None or not sources.registry.versions():
        words = "No version yet. Make one with: fieldfed-server registry publish FOLDER"
        return [heading("Versions", note), said, empty(words)]
    return [
        heading("Versions", note),
        said,
        _channels(sources, frame),
        *_rollouts(sources, frame),
        _versions(sources),
        _changes(sources, frame),
    ]


def _said(frame: Frame) -> Element | None:
    if frame.session is None or not frame.session.said:
        return None
    kind, title = ("bad", "Refused") if frame.session.refused else ("good", "Done")
    words = node("span", frame.session.said)
    line = node("li", node("b", title), words, moment(frame.session.at), class_=kind)
    return node("div", node("ul", line, class_="alerts"), id="said", data_live="")


# --- channels ------------------------------------------------------------------------------------


def _channels(sources: Sources, frame: Frame) -> Element:
    assert sources.registry is not None
    rows = sources.registry.channels()
    if not rows:
        words = "No channel yet: promote a version to one, for example to stable."
        return section("channels", "Channels", empty(words))
    columns = ["Channel", "Names", "Since", "Holds until", "Why"]
    lines: list[list[Child]] = []
    for row in rows:
        line: list[Child] = [
            node("b", row.name),
            f"version {row.version}",
            moment(row.issued),
            moment(row.expires, "clock"),
            row.why,
        ]
        lines.append(line + ([_roll_back(sources, frame, row)] if frame.session else []))
    if frame.session:
        columns.append("Change")
    shown = table("channels", "Channels", columns, lines, words=(1, 2, 3, 4, 5))
    return section("channels", "Channels", shown)


def _roll_back(sources: Sources, frame: Frame, row: ChannelRow) -> Element:
    """One earlier version, by default the one before."""
    assert sources.registry is not None
    here = {one.counter for one in sources.registry.versions()}
    before = [one.version for one in reversed(sources.registry.history(row.name))]
    known = [one for one in dict.fromkeys(before) if one != row.version and one in here]
    if not known:
        return node("span", "nothing to go back to", class_="note")
    choices = [node("option", f"version {one}", value=str(one)) for one in known]
    return _more(
        f"back-{row.name}",
        "Roll back",
        form(
            "/versions/roll-back",
            frame,
            node("input", type="hidden", name="channel", value=row.name),
            node("label", "To", node("select", *choices, name="version")),
            node("button", f"Roll {row.name} back", type="submit", class_="warn"),
        ),
    )


def _more(key: str, words: str, body: Element) -> Element:
    """What is changed on a second click only."""
    return node("details", node("summary", words), body, id=key, class_="change", data_hold="")


# --- rollouts ------------------------------------------------------------------------------------


def _rollouts(sources: Sources, frame: Frame) -> list[Element]:
    assert sources.registry is not None
    return [_rollout(sources, frame, row) for row in sources.registry.rollouts()]


def _rollout(sources: Sources, frame: Frame, row: RolloutRow) -> Element:
    assert sources.registry is not None
    plan = RolloutPlan.model_validate_json(row.plan)
    reports = rollout.newest(sources.registry.installs(row.version))
    taken = sum(one.outcome == "committed" for one in reports)
    said = rollout.judge(plan, reports, 0, 0.0)[1] if row.going else row.detail
    steps = []
    for at, share in enumerate(plan.shares):
        name = "canaries" if share == 0 else "every farm" if share == 1 else percent(share, 0)
        over = row.state == "done" or at < row.stage
        now = at == row.stage and row.going
        state = "over" if over else "now" if now else "to come"
        words = node("span", f" ({state})", class_="unseen")
        current = "step" if now else None
        steps.append(node("li", name, words, class_=state.replace(" ", "-"), aria_current=current))
    parts = [
        node("ol", *steps, class_="steps", aria_label="Stages"),
        node("p", said, class_="note"),
        bar(taken / max(len(reports), 1), "devices that took it") if reports else None,
    ]
    if row.going and frame.session is not None:
        wait = ("pause", "Pause") if row.state == "running" else ("resume", "Go on")
        parts.append(
            node(
                "div",
                *(_step(frame, row, *one) for one in (wait, ("abort", "End it"))),
                class_="buttons",
            )
        )
    title = f"Version {row.version} to {row.channel}, after {row.previous}"
    aside = node("span", pill(row.state), " ", moment(row.since))
    return section(f"rollout-{row.channel}", title, *parts, aside=aside)


def _step(frame: Frame, row: RolloutRow, what: str, words: str) -> Element:
    return form(
        f"/rollouts/{what}",
        frame,
        node("input", type="hidden", name="channel", value=row.channel),
        node("button", words, type="submit", class_="warn" if what == "abort" else None),
    )


# --- versions ------------------------------------------------------------------------------------


def _versions(sources: Sources) -> Element:
    assert sources.registry is not None
    named: dict[int, list[str]] = {}
    for row in sources.registry.channels():
        named.setdefault(row.version, []).append(row.name)
    devices = sources.registry.outcomes_by_version()
    manifests = _manifests(sources)
    lines = [
        _version(row, manifests.get(row.counter), named.get(row.counter, []), devices)
        for row in reversed(sources.registry.versions())
    ]
    shown = table("versions", "Versions, newest first", COLUMNS, lines, words=(1, 2, 3, 8))
    return section("versions", "Versions", shown)


def _version(
    row: VersionRow,
    manifest: Manifest | str | None,
    named: list[str],
    devices: Mapping[int, Mapping[str, int]],
) -> list[Child]:
    made: list[Child] = [
        f"version {row.counter}",
        node("span", *(pill(name, "good") for name in named)) if named else "-",
        moment(row.created),
    ]
    said = devices.get(row.counter, {})
    told = ", ".join(f"{count} {one.replace('_', ' ')}" for one, count in sorted(said.items()))
    if not isinstance(manifest, Manifest):
        return [*made, manifest or "its manifest cannot be read", *["-"] * 4, told or "-"]
    found = [one.accuracy for one in manifest.farms.values()]
    return [
        *made,
        f"run {manifest.run}, round {manifest.round}",
        percent(fmean(found)) if found else "-",
        count_text(manifest.macs),
        count_text(manifest.params),
        size_text(sum(manifest.objects.values())),
        told or "-",
    ]


def _manifests(sources: Sources) -> dict[int, Manifest | str]:
    """Manifests by version, or in words why one cannot be read; signatures are checked."""
    assert sources.registry is not None
    found: dict[int, Manifest | str] = {}
    try:
        keys = SigningKeys.open(sources.state_dir / "signing")
    except FieldfedError as error:
        return {row.counter: str(error) for row in sources.registry.versions()}
    registry = Registry(sources.state_dir / "registry", sources.registry, keys)
    for row in sources.registry.versions():
        try:
            found[row.counter] = registry.manifest(row.counter)
        except FieldfedError as error:
            found[row.counter] = str(error)
    return found


# --- forms ---------------------------------------------------------------------------------------


def _changes(sources: Sources, frame: Frame) -> Element:
    assert sources.registry is not None
    if frame.session is None:
        words = "You can read everything here. To promote a version or to go back, "
        link = node("a", "sign in with the token", href="/sign-in?next=/versions")
        return section("changes", "Change what devices are offered", empty(words, link, "."))
    counters = [str(row.counter) for row in reversed(sources.registry.versions())]
    names = sorted({STABLE, *(row.name for row in sources.registry.channels())})
    promote = form(
        "/versions/promote",
        frame,
        node("h3", "Promote at once"),
        node("p", "Every device that follows the channel is offered it.", class_="note"),
        _version_choice(counters),
        _channel("promote-names", names),
        node("button", "Promote", type="submit"),
    )
    farms = node("input", name="canary", placeholder="apple,rice", autocomplete="off")
    stages = node("input", name="stages", value="0.1,0.5,1", autocomplete="off")
    start = form(
        "/rollouts/start",
        frame,
        node("h3", "Roll out in steps"),
        node("p", "Some farms first; it goes on, or back, by what they report.", class_="note"),
        _version_choice(counters),
        _channel("start-names", names),
        node("label", "Farms that go first", farms),
        node("label", "Shares of the farms", stages),
        node("button", "Start", type="submit"),
    )
    return section(
        "changes",
        "Change what devices are offered",
        node("div", promote, start, class_="pair forms"),
    )


def _version_choice(counters: list[str]) -> Element:
    options = [node("option", f"version {one}", value=one) for one in counters]
    return node("label", "Version", node("select", *options, name="version"))


def _channel(key: str, names: list[str]) -> Element:
    listed = node("datalist", *(node("option", value=name) for name in names), id=key)
    entry = node("input", name="channel", value=STABLE, list=key, required="", autocomplete="off")
    return node("label", "Channel", entry, listed)
