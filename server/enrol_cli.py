"""``fieldfed-server enrol``, ``revoke`` and ``certify``: who is in the network."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.config import ServerConfig
from common.errors import ConfigError
from common.files import write_atomically
from common.settings import load_settings

enrol_app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="the server's folder")]


@enrol_app.command(epilog="Example: fieldfed-server enrol network apple")
def enrol(
    folder: Folder,
    farm: Annotated[str | None, typer.Argument(help="name of the farm")] = None,
    hours: Annotated[float, typer.Option(help="how long the code is good")] = 24.0,
    listed: Annotated[bool, typer.Option("--list", help="who is a member, and open codes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Invite a farm: print a code with which one device may join under this name."""
    from server.enrol import enrol as invite
    from server.enrol import members
    from server.members import address_of

    config = load_settings(ServerConfig, folder / "server.toml")
    if listed:
        rows = members(folder, datetime.now(UTC))
        if as_json:
            print(json.dumps(rows, indent=2))
        for row in [] if as_json else rows:
            code = f"; code {row['code']}" if "code" in row else ""
            print(f"{row['farm']:<24} {row['state']:<8} until {row['until']}{code}")
        return
    if farm is None:
        raise ConfigError("which farm? fieldfed-server enrol FOLDER FARM, or --list")
    code = invite(config, folder, farm, hours)
    assert config.door is not None
    address = address_of(config.door, "[door]")
    if as_json:
        print(json.dumps({"farm": farm, "code": code, "door": f"https://{address}"}))
        return
    print(
        f"on the device of farm {farm}, once, within {hours:g} hours:\n"
        f"  fieldfed-client join FOLDER https://{address} {code}\n"
        "tell the code to nobody else: whoever types it first is the farm"
    )


@enrol_app.command(epilog="Example: fieldfed-server revoke network apple")
def revoke(folder: Folder, farm: Annotated[str, typer.Argument(help="name of the farm")]) -> None:
    """Put a farm out at once: its certificates and its code count no longer."""
    from server.enrol import revoke as put_out

    count = put_out(load_settings(ServerConfig, folder / "server.toml"), folder, farm)
    print(
        f"farm {farm} is out: {count} certificates count no longer. Door and hub know within a "
        f"second; a broker reads {folder / 'identity' / 'revoked.crl'} when it is reloaded"
    )


@enrol_app.command(epilog="Example: fieldfed-server certify network apple.csr --out apple.member")
def certify(
    folder: Folder,
    request: Annotated[Path, typer.Argument(help="what 'fieldfed-client request' wrote")],
    out: Annotated[Path, typer.Option(help="file for the farm; it holds no secret")],
    hub: Annotated[
        str | None, typer.Option(help="host:port by which the farm reaches the hub")
    ] = None,
) -> None:
    """Take a farm into the network: sign its certificate. Look who asks before you do."""
    from server.members import certified

    member = certified(load_settings(ServerConfig, folder / "server.toml"), folder, request, hub)
    write_atomically(out, member.model_dump_json().encode())
    print(f"give {out} to farm {member.farm}, which runs: fieldfed-client join")


@enrol_app.command(
    "certify-broker", epilog="Example: fieldfed-server certify-broker network mqtt.example.org"
)
def certify_broker(
    folder: Folder,
    hosts: Annotated[list[str], typer.Argument(help="names or addresses devices reach it by")],
    out: Annotated[Path | None, typer.Option(help="default: FOLDER/broker")] = None,
) -> None:
    """Write what an MQTT broker shows to devices, and what the server shows to the broker."""
    from server.identity import BROKER, Authority

    name, identity = (
        load_settings(ServerConfig, folder / "server.toml").server.name,
        folder / "identity",
    )
    if not identity.exists():
        Authority.create(identity, name, [])
    target = out or folder / BROKER
    Authority.open(identity).certify_broker(target, hosts)
    print(
        f"wrote {target}: give ca.crt, broker.crt and broker.key to the broker, and to {folder}/"
        f'server.toml:\n[broker]\nhost = "{hosts[0]}"\n'
        + "\n".join(
            f'{key} = "{(target / file).resolve()}"'
            for key, file in (
                ("ca", "ca.crt"),
                ("certificate", "server.crt"),
                ("key", "server.key"),
            )
        )
    )
