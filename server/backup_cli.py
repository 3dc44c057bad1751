"""``fieldfed-server backup`` and ``restore``: all that a server knows, in one file and back."""

from pathlib import Path
from typing import Annotated

import typer

backup_app = typer.Typer()


@backup_app.command(epilog="Example: fieldfed-server backup network /mnt/backup/network.tar")
def backup(
    folder: Annotated[Path, typer.Argument(help="the server's folder; it may be up")],
    file: Annotated[Path, typer.Argument(help="to write; one that is there is replaced")],
) -> None:
    """Copy all that a server knows into one file, while it works. The file holds its keys."""
    from server.backup import back_up

    made = back_up(folder, file)
    print(
        f"network {made.network}, {len(made.files)} files, {made.bytes / 1e6:.1f} MB: {file}\n"
        "it holds the network's keys: whoever has it can speak for the network"
    )


@backup_app.command(epilog="Example: fieldfed-server restore network /mnt/backup/network.tar")
def restore(
    folder: Annotated[Path, typer.Argument(help="empty, or not there yet")],
    file: Annotated[Path, typer.Argument(help="that 'fieldfed-server backup' wrote")],
) -> None:
    """Make a server's folder of a backup, check all of it, and sign its channels anew."""
    from server.backup import restore as put_back

    made = put_back(folder, file)
    when = f"{made.made:%Y-%m-%d %H:%M} UTC"
    print(
        f"network {made.network} as of {when} is in {folder}, all of it whole\n"
        f"farms that were revoked since then are members again: fieldfed-server revoke {folder} "
        f"FARM; next: fieldfed-server up {folder}"
    )
