"""``fieldfed-client ledger``: what left this farm, and to whom."""

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from client import traffic
from common.config import FarmConfig
from common.errors import ConfigError
from common.settings import load_settings

if TYPE_CHECKING:
    from client.ledger import Row, Total

SECONDS = {"h": 3600, "d": 86_400, "w": 604_800}
NEVER = "images: 0 bytes; classifiers: 0 bytes"
"""True of every farm, always: client/ledger.py says why."""

ledger_app = typer.Typer()


@ledger_app.command(epilog="Example: fieldfed-client ledger farms/apple --since 7d")
def ledger(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    since: Annotated[str | None, typer.Option(help="12h, 7d or 4w; default: all that is kept")] = (
        None
    ),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, hour by hour")] = False,
) -> None:
    """What left this farm: messages by kind and destination, and their bytes."""
    load_settings(FarmConfig, folder / "farm.toml")  # only a farm has a ledger
    first = None if since is None else time.time() - seconds_of(since)
    totals, rows = _read(folder / "state", first)
    link = traffic.read(folder / "state")
    if as_json:
        shown = {
            "totals": [asdict(one) for one in totals],
            "hours": [asdict(one) for one in rows],
            "images_bytes": 0,
            "classifiers_bytes": 0,
            "socket_sent_bytes": None if link is None else link.sent,
        }
        print(json.dumps(shown, indent=2, sort_keys=True))
        return
    if totals:
        Console().print(_table(totals))
    else:
        print("nothing left this farm" + ("" if since is None else f" in the last {since}"))
    print(NEVER)
    if link is not None:
        print(
            f"at the socket with the server, over the farm's life: {link.sent:,} bytes, with "
            "polls, HTTP headers and what was sent again"
        )


def seconds_of(text: str) -> int:
    """A span like 12h, 7d or 4w; raises ConfigError."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if found is None:
        raise ConfigError(f"--since '{text}' is no span of time; say 12h, 7d or 4w")
    return int(found[1]) * SECONDS[found[2]]


def _read(state_dir: Path, since: float | None) -> tuple[list["Total"], list["Row"]]:
    from client.ledger import FILE, Ledger

    path = state_dir / FILE
    if not path.exists():  # looking begins no ledger
        return [], []
    with Ledger.open(path) as opened:
        return opened.totals(since), opened.rows(since)


def _table(totals: list["Total"]) -> Table:
    table = Table("to", "what")
    for column in ("messages", "bytes"):
        table.add_column(column, justify="right")
    for one in totals:
        texts = (one.destination, one.kind, f"{one.messages:,}", f"{one.bytes:,}")
        table.add_row(*(Text(text) for text in texts))
    return table
