"""``fieldfed-client doctor``: what keeps this farm from working, and what to do."""

import os
from pathlib import Path
from typing import Annotated

import typer

from common.diagnosis import tell

doctor_app = typer.Typer()


@doctor_app.command(epilog="Example: fieldfed-client doctor farms/apple")
def doctor(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON each")] = False,
) -> None:
    """Look at everything this farm needs, and say what is wrong and what to do. Changes nothing.

    Settings, images, certificate, door, hub, broker, clock, disk, memory, power; also while the
    farm runs. Exit code 11 where there is a fault.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say is a finding
    from client.doctor import examine

    if code := tell(examine(folder), as_json):
        raise typer.Exit(code)
