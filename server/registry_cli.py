"""``fieldfed-server registry``: versions of the model, and what channels name."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from common.errors import StateError

if TYPE_CHECKING:
    from server.registry import Registry

registry_app = typer.Typer(
    help="Versions of the model: publish, compare, promote, roll back.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Argument(help="the server's folder")]
Version = Annotated[int, typer.Argument(help="its number, as 'registry list' counts")]


@registry_app.command("list", epilog="Example: fieldfed-server registry list network")
def list_versions(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
) -> None:
    """What versions there are, which channel names which, and what devices made of them."""
    from server.registry import Registry
    from server.status import table

    with Registry.open(folder) as registry:
        named: dict[int, list[str]] = {}
        for channel in registry.rows.channels():
            until = datetime.fromtimestamp(channel.expires, UTC)
            named.setdefault(channel.version, []).append(f"{channel.name} until {until:%Y-%m-%d}")
        rows: list[dict[str, Any]] = [
            {
                "version": row.counter,
                "created": f"{datetime.fromtimestamp(row.created, UTC):%Y-%m-%d %H:%M}",
                "run": (manifest := registry.manifest(row.counter)).run,
                "macs": manifest.macs,
                "bytes": sum(manifest.objects.values()),
                "channels": named.get(row.counter, []),
                "devices": dict(
                    Counter(one.outcome for one in registry.rows.installs(row.counter))
                ),
            }
            for row in registry.rows.versions()
        ]
    if as_json:
        print(json.dumps(rows, indent=2, sort_keys=True))
        return
    if not rows:
        print(f"no version yet; make one with: fieldfed-server registry publish {folder}")
        return
    shown = table("Versions", "version", "made (UTC)", "run", "MACs", "size", "channels", "devices")
    for one in rows:
        shown.add_row(
            str(one["version"]),
            str(one["created"]),
            str(one["run"]),
            f"{one['macs'] / 1e6:.0f} M",
            f"{one['bytes'] / 1e6:.1f} MB",
            ", ".join(one["channels"]),
            ", ".join(f"{count} {outcome}" for outcome, count in sorted(one["devices"].items())),
        )
    Console().print(shown)


@registry_app.command("show", epilog="Example: fieldfed-server registry show network 3")
def show_version(folder: Folder, version: Version) -> None:
    """The manifest of a version, as JSON."""
    from server.registry import Registry

    with Registry.open(folder) as registry:
        print(registry.manifest(version).model_dump_json(indent=2))


@registry_app.command("diff", epilog="Example: fieldfed-server registry diff network 2 3")
def diff_versions(folder: Folder, before: Version, after: Version) -> None:
    """What changed from one version to another, in words."""
    from server.difference import difference
    from server.registry import Registry

    with Registry.open(folder) as registry:
        for line in difference(registry.manifest(before), registry.manifest(after)):
            print(line)


@registry_app.command("publish", epilog="Example: fieldfed-server registry publish network")
def publish(
    folder: Folder,
    run_number: Annotated[int | None, typer.Option("--run", help="default: the last")] = None,
    channel: Annotated[str | None, typer.Option(help="that shall name it, e.g. canary")] = None,
) -> None:
    """Make a signed version of what a run ended with."""
    from server.models import Models
    from server.publish import publish_run
    from server.registry import Registry
    from server.store import opened_run

    with opened_run(folder, run_number) as (store, run), Registry.open(folder) as registry:
        row = publish_run(registry, store, Models(folder), run)
        own = registry.manifest(row.counter).run == run.run
        words = "is" if own else "ended with the backbone of"
        print(f"run {run.run} {words} version {row.counter}")
        if channel is not None:
            _promote(registry, channel, row.counter)


@registry_app.command(epilog="Example: fieldfed-server registry promote network 3 stable")
def promote(
    folder: Folder, version: Version, channel: Annotated[str, typer.Argument(help="e.g. stable")]
) -> None:
    """Let a channel name a version: devices that follow it will try that version."""
    from server.registry import Registry

    with Registry.open(folder) as registry:
        _promote(registry, channel, version)


@registry_app.command(epilog="Example: fieldfed-server registry rollback network stable")
def rollback(
    folder: Folder,
    channel: Annotated[str, typer.Argument(help="e.g. stable")],
    to: Annotated[int | None, typer.Option(help="version; default: the one before")] = None,
) -> None:
    """Let a channel name an earlier version again."""
    from server.actions import roll_back
    from server.registry import Registry

    with Registry.open(folder) as registry:
        row = roll_back(registry, channel, to)
    print(f"channel {channel} names version {row.version} again: {row.why}")


@registry_app.command(epilog="Example: fieldfed-server registry gc network --keep 3")
def gc(
    folder: Folder,
    keep: Annotated[int, typer.Option(min=1, help="newest versions that stay")] = 5,
) -> None:
    """Remove versions that no channel needs, and tensors of no version."""
    from server.registry import Registry

    with Registry.open(folder) as registry:
        gone = registry.collect(keep)
    names = ", ".join(map(str, gone.versions)) or "none"
    print(f"versions removed: {names}; {gone.objects} objects, {gone.bytes / 1e6:.1f} MB freed")


@registry_app.command(epilog="Example: fieldfed-server registry verify network")
def verify(folder: Folder) -> None:
    """Read every tensor and check every signature."""
    from server.registry import Registry

    with Registry.open(folder) as registry:
        wrong = registry.check()
        count = len(registry.rows.versions())
    if wrong:
        raise StateError("; ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else ""))
    print(f"{count} versions are whole")


@registry_app.command(
    "export", epilog="Example: fieldfed-server registry export network 3 --out version3"
)
def export_version(
    folder: Folder,
    version: Version,
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("version"),
) -> None:
    """Write a version as files: model.safetensors, the same as ONNX, its manifest, the keys."""
    from server.publish import write_files
    from server.registry import Registry

    with Registry.open(folder) as registry:
        write_files(registry, version, out)
    print(f"version {version} is in {out}")


@registry_app.command("exchange-keys", epilog="Example: fieldfed-server registry exchange-keys net")
def exchange_keys(folder: Folder) -> None:
    """A new signing key; the old one counts for 60 days more, for devices that were away."""
    from server.registry import Registry

    with Registry.open(folder) as registry:
        registry.exchange_keys()
        keys = registry.keys.keys
    print(f"key set {keys.counter}: " + ", ".join(one.id for one in keys.keys))


def _promote(registry: "Registry", channel: str, version: int) -> None:
    from server import actions

    row = actions.promote(registry, channel, version)
    print(f"channel {channel} names version {row.version}")
