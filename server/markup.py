"""HTML and SVG as a tree of elements: whatever comes from outside is escaped on writing."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from xml.etree.ElementTree import Element

WIDTH = 480
"""Units across a chart."""
VOID = frozenset({"br", "img", "input", "link", "meta"})
"""Elements without content, which HTML does not close."""

Child = Element | str | None


def node(tag: str, *children: Child, **attributes: object) -> Element:
    """An element; ``class_`` becomes class, ``stroke_width`` stroke-width; None is left out."""
    element = Element(
        tag,
        {
            key.rstrip("_").replace("_", "-"): f"{value:g}"
            if isinstance(value, float)
            else str(value)
            for key, value in attributes.items()
            if value is not None
        },
    )
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child:
            element.text = (element.text or "") + child
    return element


def picture(height: float, title: str, description: str, children: Iterable[Element]) -> Element:
    """A chart of :data:`WIDTH` units that grows and shrinks with its column."""
    return node(
        "svg",
        node("title", title),
        node("desc", description),
        *children,
        viewBox=f"0 0 {WIDTH} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
        class_="chart",
    )


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> Element:
    """Text at a point."""
    return node("text", text, x=x, y=y, class_=kind or None, text_anchor=anchor)


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    """A straight line."""
    return node("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def panel(title: str, words: str, chart: Element) -> Element:
    """A chart with its heading."""
    return node(
        "figure", node("h3", title), node("p", words) if words else None, chart, class_="panel"
    )


def scrolled(caption: str, head: Element, rows: Sequence[Element]) -> Element:
    """A table that scrolls sideways where it is too wide, also by the keyboard."""
    table = node(
        "table", node("caption", node("span", caption)), node("thead", head), node("tbody", *rows)
    )
    return node("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def document(root: Element) -> str:
    """An HTML document from its root element."""
    return "<!doctype html>\n" + "".join(_written(root)) + "\n"


def _written(element: Element) -> Iterator[str]:
    yield f"<{element.tag}"
    yield from (f' {name}="{escape(value)}"' for name, value in element.items())
    yield ">"
    # a style sheet is the only text that HTML takes literally; ours is a constant
    yield (element.text or "") if element.tag == "style" else escape(element.text or "")
    for child in element:
        yield from _written(child)
        yield escape(child.tail or "")
    if element.tag not in VOID:
        yield f"</{element.tag}>"
