"""The form that asks for the token."""

from pathlib import Path
from xml.etree.ElementTree import Element

from server.markup import node
from server.page_shell import heading


def sign_in_page(then: str, fault: str, state_dir: Path) -> list[Element | None]:
    """The parts of the page; ``then`` is where it leads to, ``fault`` why the last try failed."""
    entry = node(
        "input",
        id="token",
        name="token",
        type="password",
        autocomplete="off",
        required="",
        autofocus="",
        aria_describedby="where fault" if fault else "where",
        aria_invalid="true" if fault else None,
    )
    where = node("span", "It is in ", node("code", str(state_dir.absolute() / "page.token")))
    form = node(
        "form",
        node("input", type="hidden", name="next", value=then),
        node("label", "Token of this server", for_="token"),
        entry,
        node("p", where, id="where", class_="note"),
        node("p", fault, id="fault", class_="fault", role="alert") if fault else None,
        node("button", "Sign in", type="submit"),
        method="post",
        action="/sign-in",
        class_="sign-in panel",
    )
    return [
        heading("Sign in", "Reading needs nothing; changing what devices get needs this."),
        form,
    ]
