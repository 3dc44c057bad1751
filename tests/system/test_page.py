"""The operator's page in a real browser, during a real run of real farms.

What it looks like is kept in test-output/page, wide and narrow, light and dark.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Request, ViewportSize, sync_playwright

from common.processes import free_port, wait_for_port
from server.actions import Actions
from server.registry import STABLE, Registry
from tests.conftest import ROOT
from tests.system.site import Site, call, open_site
from tests.waiting import wait_until

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="the browser 'chromium' is not installed"),
]

ROUNDS = 3
WIDE, PHONE = ViewportSize(width=1280, height=860), ViewportSize(width=390, height=844)
NARROWEST = 360
PICTURES = ROOT / "test-output" / "page"
PAGES = {
    "overview": "/",
    "rounds": "/rounds",
    "farms": "/farms",
    "farm": "/farms/oak",
    "heads": "/heads",
    "head": "/heads/1/2",
    "versions": "/versions",
    "devices": "/devices",
    "events": "/events",
    "sign-in": "/sign-in",
}
PATIENCE = 120_000
"""In milliseconds: of the browser, for what a loaded machine may take its time for."""


@dataclass
class Watched:
    """A network whose run was followed in a browser from its beginning."""

    site: Site
    base: str
    browser: Browser
    before: str
    """What the page said before there was a run."""
    seen: list[str] = field(default_factory=list)
    """What it said of the round, one after the other."""
    loads: int = 0
    asked: set[str] = field(default_factory=set)
    """Hosts that the browser asked for something."""
    faults: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The server's."""
        return Path(self.site.server)

    @property
    def token(self) -> str:
        """What lets the page change something."""
        return (self.folder / "page.token").read_text().strip()

    def open(
        self, path: str, size: ViewportSize = WIDE, scheme: str = "light", script: bool = True
    ) -> Page:
        """A page in a browser that knows nothing yet."""
        context = self.browser.new_context(
            viewport=size,
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
            java_script_enabled=script,
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", self._asks)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(self.base + path)
        return page

    def sign_in(self, page: Page) -> None:
        """As an operator does it."""
        page.goto(f"{self.base}/sign-in?next=/versions")
        page.get_by_label("Token of this server").fill(self.token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/versions")

    def _asks(self, request: Request) -> None:
        self.asked.add(request.url.split("/")[2])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The run, and what was seen of it without loading the page again."""
    port = free_port()
    root = tmp_path_factory.mktemp("page")
    settings: dict[str, dict[str, object]] = {
        "page": {"port": port},
        "server": {"name": "valley"},
        "plan": {"rounds": ROUNDS, "criterion": "taha"},
    }
    with open_site(root, settings=settings) as site, sync_playwright() as play:
        wait_for_port("127.0.0.1", port, 60, site.up)
        flags = ["--no-sandbox"] if os.getuid() == 0 else []  # chromium wants it of root
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        made = Watched(site, f"http://127.0.0.1:{port}", browser, "")
        follow(made)
        Registry.create(made.folder, "valley").close()
        call("fieldfed-server", "registry", "publish", site.server)
        yield made
        browser.close()


def follow(watched: Watched) -> None:
    """Open the page before there is a run, and note what it comes to say by itself."""
    page = watched.open("/")
    page.on("load", lambda _: setattr(watched, "loads", watched.loads + 1))
    watched.before = page.inner_text("main")
    train = watched.site.start("train", "fieldfed-server", "train", watched.site.server)
    state = page.locator("#top .pill")

    def over() -> bool:
        if page.locator("#now .round").count():
            said = " ".join(page.inner_text("#now .round").split())
            if not watched.seen or watched.seen[-1] != said:
                watched.seen.append(said)
        page.wait_for_timeout(200)
        return state.count() > 0 and state.inner_text() in ("done", "failed")

    wait_until(over, 300, f"the end of the run on the page; {train.last_words()}")
    assert state.inner_text() == "done"
    wait_until(lambda: train.returncode is not None, 60, "the end of train")
    page.context.close()


def test_rounds_advance_on_a_page_that_is_never_loaded_again(watched: Watched) -> None:
    assert "no database at" in watched.before
    rounds = [int(said.split()[0]) for said in watched.seen]
    assert rounds == sorted(rounds)
    assert len(set(rounds)) >= ROUNDS - 1  # one may pass between two looks
    assert watched.seen[-1] == f"{ROUNDS} of {ROUNDS}"
    assert watched.loads == 0
    assert watched.faults == []


def test_nothing_is_asked_of_another_machine(watched: Watched) -> None:
    assert watched.asked == {watched.base.split("/")[2]}


def test_the_page_says_what_status_says(watched: Watched) -> None:
    values = json.loads(call("fieldfed-server", "status", watched.site.server, "--json"))
    page = watched.open("/rounds")
    rows = page.locator("#rounds tbody tr").all_inner_texts()
    assert len(rows) == ROUNDS
    for row, said in zip(reversed(values["rounds"]), rows, strict=True):
        assert f"{row['replies']} of {row['quorum']}" in said
        assert f"{100 * row['mean_accuracy']:.1f} %" in said
    page.context.close()


def test_the_head_map_is_drawn_and_told(watched: Watched, tmp_path: Path) -> None:
    values = json.loads(call("fieldfed-server", "status", watched.site.server, "--json"))
    page = watched.open("/heads")
    cells = page.locator("#head-map .cell")
    assert cells.count() == 12
    gone = page.locator("#head-map .cell .gone").count()
    assert gone == 12 - round(12 * values["mask"]["heads_kept_ratio"]) > 0
    kept = page.locator("#head-map .cell:not(:has(.gone))").first
    path = tmp_path / "cell.png"
    kept.screenshot(path=path)
    with Image.open(path) as picture:
        red, green, blue = picture.convert("RGB").getpixel((8, 8))  # type: ignore[misc]
    fill = kept.locator("rect").get_attribute("fill")
    assert fill == f"#{red:02x}{green:02x}{blue:02x}"  # as bright as it is worth
    kept.hover()
    told = page.inner_text("#told-words")
    assert told.startswith("kept; worth ")
    page.locator("#head-0-0").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#told-name") == "Block 1, head 1"
    assert page.evaluate("document.activeElement.id") == "head-1-1"
    page.keyboard.press("Enter")
    page.wait_for_url("**/heads/1/1")
    assert page.inner_text("h1") == "Block 1, head 1"
    page.context.close()


def test_promote_is_refused_without_the_token_and_works_with_it(watched: Watched) -> None:
    page = watched.open("/versions")
    assert page.get_by_role("button", name="Promote").count() == 0
    refused = page.evaluate(
        "fetch('/versions/promote', {method: 'POST', body: new URLSearchParams("
        "{channel: 'stable', version: '1', secret: ''})}).then((answer) => answer.status)"
    )
    assert refused == 403
    page.goto(f"{watched.base}/sign-in?next=/versions")
    page.get_by_label("Token of this server").fill("x" * 43)
    page.get_by_role("button", name="Sign in").click()
    assert "that is not the token" in page.inner_text("[role=alert]")
    watched.sign_in(page)
    page.get_by_role("button", name="Promote").click()
    page.wait_for_selector("#said")
    assert "channel stable names version 1" in page.inner_text("#said")
    assert "version 1" in page.inner_text("#channels")
    with Registry.open(watched.folder) as registry:
        assert registry.named(STABLE).version == 1
    with Actions.open(Actions.path(watched.folder), read_only=True) as actions:
        (row,) = actions.newest(5)
    assert (row.who, row.what) == ("page", "promote version 1 to stable")
    page.goto(f"{watched.base}/events?kind=action")
    assert "promote version 1 to stable" in page.inner_text("main").lower()
    page.context.close()


def test_what_is_typed_stays_while_the_rest_is_kept_up_to_date(watched: Watched) -> None:
    page = watched.open("/versions")
    watched.sign_in(page)
    page.get_by_label("Farms that go first").fill("oak")
    with Registry.open(watched.folder) as registry:
        if registry.rows.channel(STABLE) is None:
            registry.promote(STABLE, 1)
        registry.promote("early", 1)
    page.get_by_role("rowheader", name="early").wait_for()
    assert page.get_by_label("Farms that go first").input_value() == "oak"
    assert page.evaluate("document.activeElement.name") == "canary"
    page.context.close()


def test_times_are_the_viewers_with_a_title_in_utc(watched: Watched) -> None:
    page = watched.open("/rounds")
    time = page.locator("#rounds time").first
    assert str(time.get_attribute("title")).endswith(" UTC")
    wait_until(lambda: "ago" in time.inner_text() or "now" in time.inner_text(), 20, "its script")
    page.context.close()


def test_without_a_script_the_page_is_whole_and_loads_itself_again(watched: Watched) -> None:
    page = watched.open("/", script=False)
    assert page.inner_text("#now .round").split()[0] == str(ROUNDS)
    assert page.locator("noscript meta[http-equiv=refresh]").count() == 1
    assert "UTC" in page.locator("main time").first.inner_text()
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_a_narrow_phone(watched: Watched, name: str) -> None:
    page = watched.open(PAGES[name], ViewportSize(width=NARROWEST, height=740))
    beyond = page.evaluate("document.documentElement.scrollWidth - document.body.clientWidth")
    assert beyond <= 0
    page.context.close()


def violations(page: Page) -> list[dict[str, Any]]:
    """What axe finds that keeps somebody out; text in charts alone is beyond it."""
    told = Axe().run(page).response
    unsure = [node["html"] for one in told["incomplete"] for node in one["nodes"]]
    assert [html for html in unsure if not html.startswith("<text ")] == []
    found: list[dict[str, Any]] = told["violations"]
    return [one for one in found if one["impact"] in ("serious", "critical")]


def test_axe_sees_what_keeps_somebody_out(watched: Watched) -> None:
    page = watched.open("/devices")
    page.evaluate(
        "() => { document.querySelector('h1').style.color = '#bbb';"
        " document.querySelector('main').append(document.createElement('img')); }"
    )
    assert {"color-contrast", "image-alt"} <= {one["id"] for one in violations(page)}
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(watched: Watched, scheme: str) -> None:
    page = watched.open("/", scheme=scheme)
    watched.sign_in(page)
    found = []
    for name, path in PAGES.items():
        page.goto(watched.base + path)
        for details in page.locator("main details").all():
            details.locator("summary").click()
        found += [
            f"{name}: {one['id']} ({one['impact']}): {node['html'][:200]}"
            for one in violations(page)
            for node in one["nodes"][:3]
        ]
    assert found == [], "\n".join(found)
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "size"), [("wide", WIDE), ("phone", PHONE)])
def test_how_it_looks_is_kept(watched: Watched, name: str, size: ViewportSize, scheme: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page = watched.open("/", size, scheme)
    watched.sign_in(page)
    for key, path in PAGES.items():
        page.goto(watched.base + path)
        file = PICTURES / f"{key}-{name}-{scheme}.png"
        page.screenshot(path=file, full_page=True)
        with Image.open(file) as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 20, file  # more than an empty sheet
    page.context.close()
