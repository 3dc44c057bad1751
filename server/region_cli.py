"""``fieldfed-server region``: a centre and its regions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from common.config import ServerConfig
from common.errors import LinkError
from common.settings import load_settings

region_app = typer.Typer(
    help="Several servers, one model: a centre and its regions.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Argument(help="the centre's folder")]


@region_app.command(epilog="Example: fieldfed-server region request centre")
def request(folder: Folder) -> None:
    """Write what the operator of a region certifies, so that the region lets this centre in."""
    from server.region_line import request_of

    config = load_settings(ServerConfig, folder / "server.toml")
    path, name = request_of(config, folder), config.server.name
    print(
        f"give {path} to the operator of every region, who runs:\n"
        f"  fieldfed-server certify FOLDER {path.name} --out {name}.member\n"
        f'and sets [region] centre = "{name}". List what comes back under [[regions]]'
    )


@region_app.command(epilog="Example: fieldfed-server region check centre")
def check(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Ask every region of this centre who it is; fails when one does not answer."""
    from server.region_line import heard

    answers = heard(load_settings(ServerConfig, folder / "server.toml"), folder)
    lines = [
        {
            "region": one.name,
            "images": None if one.hello is None else one.hello.examples,
            "backbones": None if one.hello is None else len(one.hello.held),
            "fault": one.why if one.hello is None else None,
        }
        for one in answers
    ]
    if as_json:
        print(json.dumps(lines, indent=2))
    for line in [] if as_json else lines:
        said = f"{line['images']} images" if line["fault"] is None else line["fault"]
        print(f"{line['region']:<24} {said}")
    silent = [str(line["region"]) for line in lines if line["fault"] is not None]
    if silent:
        raise LinkError(f"no good answer of {', '.join(silent)}; see the region's logs/region.log")
