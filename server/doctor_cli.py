"""``fieldfed-server doctor``: what keeps this network from working, and what to do."""

import os
from pathlib import Path
from typing import Annotated

import typer

from common.diagnosis import tell

doctor_app = typer.Typer()


@doctor_app.command(epilog="Example: fieldfed-server doctor network")
def doctor(
    folder: Annotated[Path, typer.Argument(help="the server's folder: server.toml and its state")],
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON each")] = False,
) -> None:
    """Look at everything this network needs, and say what is wrong and what to do. Changes nothing.

    Settings, weights, ports, keys and certificates, members, channels, databases, broker, clock,
    disk, memory; also while the server runs. Exit code 11 where there is a fault.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say is a finding
    from server.doctor import examine

    if code := tell(examine(folder), as_json):
        raise typer.Exit(code)
