"""What surrounds every page, and the small parts that all of them are made of.

Elements with ``data-live`` are replaced where they stand when the server has news; each carries an
``id``. Times are written in UTC and rewritten by the page's script into the viewer's zone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote
from xml.etree.ElementTree import Element

from server.markup import Child, document, node
from server.page_access import Session
from server.story import percent

Tone = Literal["good", "warn", "bad", "calm"]
REFRESH_SECONDS = 15
"""Where no script runs."""
LONG_CELL = 32
"""Characters from which on a cell is text that may go over several lines."""
LEAF = "M21 3C9 3 4 8 4 15c0 1 .2 2 .5 2.9L3 21h2.4l1-1.8C14 20 21 15 21 3zM8 16c2-4 5-6.5 9-8z"
PAGES: Mapping[str, tuple[str, str]] = {
    "/": ("Overview", "M3 10.5 12 3l9 7.5V21h-6v-6H9v6H3z"),
    "/rounds": ("Rounds", "M12 4a8 8 0 1 0 8 8M12 8v4l3 2M20 3v6h-6"),
    "/farms": ("Farms", "M3 21V11l6-4 6 4v10M15 21h6V9l-4-3M7 21v-5h4v5"),
    "/heads": ("Heads", "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z"),
    "/versions": ("Versions", "M12 3 3 8l9 5 9-5zM3 13l9 5 9-5"),
    "/devices": ("Devices", "M7 3h10v18H7zM11 18h2"),
    "/events": ("Events", "M4 6h2M4 12h2M4 18h2M9 6h11M9 12h11M9 18h11"),
}
TONES: Mapping[str, Tone] = {
    **dict.fromkeys(("running", "committed", "accepted", "open"), "good"),
    **dict.fromkeys(("failed", "aborted", "undone", "refused", "rolled_back"), "bad"),
    **dict.fromkeys(("paused", "stopped", "rejected"), "warn"),
}


@dataclass(frozen=True)
class Frame:
    """Where a page belongs: the network, the address of the page, who looks at it.

    ``told`` is what a screen reader says when it changes, ``tag`` names this state of the page.
    """

    network: str
    path: str
    session: Session | None = None
    told: str = ""
    tag: str = ""

    @property
    def root(self) -> str:
        """The page of the menu that it belongs to."""
        return "/" + self.path.lstrip("/").split("/")[0]


def write(frame: Frame, title: str, parts: Sequence[Element | None], live: bool = True) -> str:
    """A whole page; ``live`` ones are kept up to date."""
    refresh = node("meta", http_equiv="refresh", content=str(REFRESH_SECONDS))
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="color-scheme", content="light dark"),
        node("title", f"{title} · {frame.network}"),
        node("link", rel="icon", href="/icon.svg", type="image/svg+xml"),
        node("link", rel="stylesheet", href="/page.css"),
        node("script", src="/page.js", defer="defer"),
        node("noscript", refresh) if live else None,
    )
    main = node("main", *parts, id="content", tabindex="-1")
    body = node(
        "body",
        node("a", "Skip to the content", href="#content", class_="skip"),
        _side(frame),
        main,
        node("p", frame.told, id="told", role="status", class_="unseen", data_live=""),
        data_page=frame.path if live else None,
        data_tag=frame.tag or None,
    )
    return document(node("html", head, body, lang="en"))


def _side(frame: Frame) -> Element:
    brand = node(
        "a",
        icon(LEAF, filled=True),
        node("span", node("b", "fieldfed"), node("span", frame.network, class_="network")),
        href="/",
        class_="brand",
    )
    links = [
        node(
            "li",
            node(
                "a",
                icon(path),
                node("span", name),
                href=at,
                aria_current="page" if at == frame.root else None,
            ),
        )
        for at, (name, path) in PAGES.items()
    ]
    rail = node(
        "div",
        brand,
        node("nav", node("ul", *links), aria_label="Pages"),
        node("div", _live(), _who(frame), class_="foot"),
        class_="rail",
    )
    return node("header", rail, class_="side")


def _live() -> Element:
    return node("p", node("span", class_="dot"), node("span", "Not live"), id="live", class_="live")


def _who(frame: Frame) -> Element:
    if frame.session is None:
        where = f"/sign-in?next={quote(frame.path, safe='/')}"
        return node("a", "Sign in to change", href=where, class_="quiet")
    return form("/sign-out", frame, node("button", "Sign out", type="submit", class_="quiet"))


# --- parts ---------------------------------------------------------------------------------------


def icon(path: str, filled: bool = False) -> Element:
    """A drawing beside words that say the same."""
    kind = "icon filled" if filled else "icon"
    return node("svg", node("path", d=path), viewBox="0 0 24 24", aria_hidden="true", class_=kind)


def heading(title: str, note: Child = None, *aside: Child) -> Element:
    """The top of a page."""
    words = node("p", note, class_="note") if note is not None else None
    head = node("div", node("h1", title), words)
    return node("div", head, *aside, class_="top", id="top", data_live="")


def section(key: str, title: str, *children: Child, note: str = "", aside: Child = None) -> Element:
    """A part of a page that is replaced when there is news of it."""
    head = node("div", node("h2", title, id=f"{key}-title"), aside, class_="head")
    words = node("p", note, class_="note") if note else None
    return node(
        "section", head, words, *children, id=key, data_live="", aria_labelledby=f"{key}-title"
    )


def pill(words: str, tone: Tone | None = None) -> Element:
    """A state in a word."""
    kind = tone or TONES.get(words, "calm")
    return node("span", words.replace("_", " "), class_=f"pill {kind}")


def moment(at: float, form: Literal["clock", "ago", "left"] = "ago") -> Element:
    """A time: the script writes it in the viewer's zone, or how long ago, or what is left."""
    when = datetime.fromtimestamp(at, UTC)
    return node(
        "time",
        f"{when:%d %b, %H:%M} UTC",
        datetime=f"{when:%Y-%m-%dT%H:%M:%SZ}",
        title=f"{when:%Y-%m-%d %H:%M:%S} UTC",
        data_form=form,
    )


def table(
    key: str,
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Child]],
    words: Sequence[int] = (),
) -> Element:
    """A table; the first column names its rows, ``words`` are columns that do not hold numbers."""

    def kind(at: int) -> str | None:
        return "words" if at in words or at == 0 else None

    head = [node("th", name, scope="col", class_=kind(at)) for at, name in enumerate(columns)]
    lines = []
    for row in rows:
        first = node("th", row[0], scope="row", class_="words")
        rest = [
            node("td", cell, class_="words long" if _is_long(cell) else kind(at))
            for at, cell in enumerate(row[1:], 1)
        ]
        lines.append(node("tr", first, *rest))
    made = node(
        "table",
        node("caption", caption, class_="unseen"),
        node("thead", node("tr", *head)),
        node("tbody", *lines),
    )
    area = {"role": "region", "aria_label": f"Table: {caption}", "tabindex": "0"}
    return node("div", made, class_="scroll", id=f"{key}-table", **area)


def _is_long(cell: Child) -> bool:
    return isinstance(cell, str) and len(cell) > LONG_CELL


def tile(name: str, value: Child, aside: Child, tone: Tone = "calm") -> Element:
    """A figure with its name above and what it means below."""
    return node(
        "div",
        node("dt", name),
        node("dd", value, class_="big"),
        node("dd", aside, class_="small"),
        class_=f"tile {tone}",
    )


def empty(words: str, *more: Child) -> Element:
    """Where there is nothing yet, and how there will be."""
    return node("p", words, *more, class_="empty")


def bar(share: float, words: str) -> Element:
    """A share of a whole as a bar."""
    wide = 100 * min(max(share, 0.0), 1.0)
    return node(
        "svg",
        node("rect", x=0, y=0, width=100, height=6, class_="bar-rest"),
        node("rect", x=0, y=0, width=wide, height=6, class_="bar"),
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{words}: {percent(share, 0)}",
        class_="meter",
    )


def form(action: str, frame: Frame, *children: Child) -> Element:
    """A form that changes something: it carries the session's secret."""
    assert frame.session is not None
    secret = node("input", type="hidden", name="secret", value=frame.session.secret)
    return node("form", secret, *children, method="post", action=action)


def farm_link(farm: str) -> Element:
    """A farm's name, which leads to its page."""
    return node("a", farm, href=f"/farms/{quote(farm, safe='')}")
