"""Farms: how good the backbone is for each, and what it sent; a page for every farm."""

from xml.etree.ElementTree import Element

from common.protocols import older
from server import charts
from server.alerts import HEARD_SECONDS
from server.facts import FarmFacts, Sources
from server.markup import Child, node
from server.page_shell import (
    Tone,
    empty,
    farm_link,
    heading,
    moment,
    pill,
    section,
    table,
    tile,
)
from server.story import duration_text, percent, size_text

MEAN = "mean over farms"
COLUMNS = (
    "Farm",
    "Over rounds",
    "Decide",
    "Test",
    "Last seen",
    "Trained in",
    "Serves",
    "Up",
    "Down",
    "Rejected",
)


def farms_page(sources: Sources, now: float) -> list[Element | None]:
    """The parts of the page."""
    run = sources.facts.newest_run()
    farms = [] if run is None else sources.facts.farm_facts(run.run)
    if run is None or not farms:
        words = "No farm has been heard of in this run. A farm joins with: fieldfed-client join"
        return [heading("Farms"), empty(words)]
    serves = {} if sources.registry is None else sources.registry.in_use()
    note = (
        f"Of run {run.run}. Decide is the newest accuracy on the part of its images that decides; "
    )
    note += "test that of the last report."
    lines = [_line(one, serves.get(one.farm), now) for one in farms]
    shown = table("farms", "Farms by name", COLUMNS, lines, words=(1, 4, 5, 6))
    return [heading("Farms", note), section("farms", f"{len(farms)} farms", shown)]


def _line(one: FarmFacts, serves: int | None, now: float) -> list[Child]:
    return [
        node("span", farm_link(one.farm), _presence(one, now), _release(one)),
        sparkline(one),
        percent(one.latest),
        percent(one.tested),
        moment(one.last_seen),
        "-" if one.base is None else f"round {one.base}",
        "-" if serves is None else f"version {serves}",
        size_text(one.bytes_up),
        size_text(one.bytes_down),
        str(one.rejected),
    ]


def _presence(one: FarmFacts, now: float) -> Element:
    if one.paused:
        return pill("paused", "bad")
    online = now - one.last_seen < HEARD_SECONDS
    return pill("online", "good") if online else pill("silent", "calm")


def _release(one: FarmFacts) -> Element | None:
    return pill("older release", "warn") if older(one.protocol) else None


def sparkline(one: FarmFacts) -> Element | str:
    """Accuracy by round as a small line, from 0 to 1 less what nobody reaches."""
    if not one.accuracy:
        return "-"
    values = list(one.accuracy.items())
    first, last = values[0][0], values[-1][0]
    low, high = min(one.accuracy.values()), max(one.accuracy.values())
    low, high = min(low, high - 0.1), high

    def place(at: int, value: float) -> tuple[float, float]:
        x = 4 + 112 * (at - first) / max(last - first, 1)
        return round(x, 1), round(26 - 20 * (value - low) / (high - low), 1)

    points = [place(at, value) for at, value in values]
    said = f"Accuracy of {one.farm} from {percent(values[0][1])} to {percent(values[-1][1])}"
    x, y = points[-1]
    return node(
        "svg",
        node("title", said),
        node("polyline", points=" ".join(f"{a},{b}" for a, b in points), class_="mean-line"),
        node("circle", cx=x, cy=y, r=3, class_="mean-dot"),
        viewBox="0 0 120 32",
        role="img",
        aria_label=said,
        class_="spark",
    )


# --- one farm ------------------------------------------------------------------------------------


def farm_page(sources: Sources, farm: str, now: float) -> list[Element | None] | None:
    """The parts of a farm's page; None where the newest run knows no such farm."""
    run = sources.facts.newest_run()
    farms = [] if run is None else sources.facts.farm_facts(run.run)
    one = next((row for row in farms if row.farm == farm), None)
    if run is None or one is None:
        return None
    note = node("span", f"{one.examples} images in {one.classes} classes, last seen ")
    note.append(moment(one.last_seen))
    return [
        heading(one.farm, note, _presence(one, now), _release(one)),
        _paused(one),
        _figures(sources, run.run, one),
        _chart(sources, run.run, one),
        _replies(sources, run.run, farm),
        _rejections(sources, run.run, farm),
        _devices(sources, farm),
    ]


def _paused(one: FarmFacts) -> Element | None:
    if not one.paused:
        return None
    words = f"Paused for {one.paused}. To ask it again: fieldfed-server readmit FOLDER {one.farm}"
    line = node("li", node("b", "Not asked any more"), node("span", words), class_="bad")
    return node("div", node("ul", line, class_="alerts"), id="alerts", data_live="")


def _figures(sources: Sources, run: int, one: FarmFacts) -> Element:
    link = sources.facts.link_of(run, one.farm)
    socket = sum(row.sent + row.received for row in link)
    serves = None if sources.registry is None else sources.registry.in_use().get(one.farm)
    first = one.accuracy[min(one.accuracy)] if one.accuracy else None
    tiles = [
        tile("Decide accuracy", percent(one.latest), f"first {percent(first)}"),
        tile("Test accuracy", percent(one.tested), "of its last report"),
        tile("Up", size_text(one.bytes_up), "messages, this run"),
        tile("Down", size_text(one.bytes_down), "messages, this run"),
        tile("At the socket", size_text(socket) if link else "-", "both ways, as it counts"),
        tile(
            "Serves",
            "-" if serves is None else f"version {serves}",
            "what its devices took last",
        ),
    ]
    return section("figures", "Figures", node("dl", *tiles, class_="tiles"))


def _chart(sources: Sources, run: int, one: FarmFacts) -> Element:
    points = sources.facts.points(run)
    if not points or not one.accuracy:
        return section("accuracy", "Accuracy over rounds", empty("No committed round yet."))
    # as of a network whose mean is this farm, and whose only farm is the mean
    turned = [
        point.model_copy(
            update={
                "mean_accuracy": point.accuracy.get(one.farm),
                "accuracy": {} if point.mean_accuracy is None else {MEAN: point.mean_accuracy},
            }
        )
        for point in points
    ]
    chart = charts.accuracy_chart(turned, [MEAN], one.farm)
    figure = node("figure", chart, class_="panel wide")
    words = "On its decide part, before it trains; the thin line is the mean over farms."
    return section("accuracy", "Accuracy over rounds", figure, note=words)


def _replies(sources: Sources, run: int, farm: str) -> Element:
    columns = ("Round", "Accuracy", "Macro-F1", "Loss", "Alignment", "Steps", "Took", "Sent")
    lines: list[list[Child]] = []
    for row in sources.facts.replies_of(run, farm):
        late = f" (answers {row.of_round})" if row.of_round != row.round else ""
        lines.append(
            [
                f"{row.round}{late}",
                percent(row.accuracy),
                percent(row.f1),
                f"{row.loss:.3f}",
                f"{row.dal:.3g}",
                str(row.steps),
                duration_text(row.seconds),
                size_text(row.size_bytes),
            ]
        )
    if not lines:
        return section("replies", "Replies", empty("It has not replied in this run."))
    return section("replies", "Replies", table("replies", f"Replies of {farm}", columns, lines))


def _rejections(sources: Sources, run: int, farm: str) -> Element | None:
    rows = sources.facts.rejections_of(run, farm)
    if not rows:
        return None
    lines: list[list[Child]] = [
        [str(row.round), pill(row.reason, "warn"), moment(row.received), row.detail] for row in rows
    ]
    columns = ("Round", "Reason", "When", "Detail")
    shown = table("rejections", f"Replies of {farm} in quarantine", columns, lines, (1, 2, 3))
    return section("rejections", "Quarantine", shown)


def _devices(sources: Sources, farm: str) -> Element | None:
    if sources.registry is None:
        return None
    rows = [row for row in sources.registry.newest_installs() if row.farm == farm]
    if not rows:
        return None
    tones: dict[str, Tone] = {"committed": "good"}
    lines: list[list[Child]] = [
        [
            row.device,
            f"version {row.version}",
            pill(row.outcome, tones.get(row.outcome)),
            moment(row.received),
            row.detail,
        ]
        for row in rows
    ]
    columns = ("Device", "Version", "Outcome", "When", "Detail")
    shown = table("devices", f"Devices of {farm}", columns, lines, (1, 2, 3, 4))
    return section("devices", "Devices", shown)
