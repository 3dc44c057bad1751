"""What happened, as a list."""

from collections.abc import Sequence
from urllib.parse import urlencode
from xml.etree.ElementTree import Element

from server.events import KINDS, MOST_EVENTS, Event, Kind, events
from server.facts import Sources
from server.markup import node
from server.page_shell import empty, heading, moment, section


def events_page(sources: Sources, kind: Kind | None) -> list[Element | None]:
    """The parts of the page."""
    found = events(sources, kind)
    links = [
        node(
            "li",
            node(
                "a",
                name,
                href="/events" + (f"?{urlencode({'kind': of})}" if of else ""),
                aria_current="true" if of == kind else None,
            ),
        )
        for of, name in ((None, "All"), *KINDS.items())
    ]
    choose = node("nav", node("ul", *links, class_="tabs"), aria_label="Kinds of events")
    note = f"The newest {MOST_EVENTS}. Times are yours; hold the pointer over one for UTC."
    return [
        heading("Events", note),
        choose,
        section("list", KINDS[kind] if kind else "All events", event_list(found)),
    ]


def event_list(found: Sequence[Event]) -> Element:
    """Events as they are told, newest first."""
    if not found:
        return empty("Nothing happened yet.")
    lines = [
        node(
            "li",
            node("span", node("span", one.kind, class_="kind"), moment(one.at), class_="when"),
            node(
                "div",
                node("p", one.title, class_="what"),
                node("p", one.detail, class_="why") if one.detail else None,
            ),
            class_=one.tone,
        )
        for one in found
    ]
    return node("ol", *lines, class_="events")
