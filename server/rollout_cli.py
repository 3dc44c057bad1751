"""``fieldfed-server rollout``: a version goes out in steps."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.settings import validate

rollout_app = typer.Typer(
    help="Bring a version to some farms first, and go on or back by what they report.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(help="the server's folder")]
ChannelOption = Annotated[str, typer.Option("--channel", help="that shall name the version")]


@rollout_app.command(
    epilog="Example: fieldfed-server rollout start network 3 --canary apple,rice --stages 0.1,0.5,1"
)
def start(
    folder: Folder,
    version: Annotated[int, typer.Argument(help="its number, as 'registry list' counts")],
    channel: ChannelOption = "stable",
    canary: Annotated[str, typer.Option(help="farms that go first, with commas")] = "",
    stages: Annotated[str, typer.Option(help="shares of the farms, the last 1")] = "0.1,0.5,1",
    min_success: Annotated[float, typer.Option(help="share of devices that take it")] = 0.5,
    max_errors: Annotated[float, typer.Option(help="share that refuse or go back")] = 0.1,
    stage_hours: Annotated[float, typer.Option(help="a stage lasts at most")] = 24.0,
) -> None:
    """Begin; the hub moves it on while it runs."""
    from server import rollout
    from server.registry import Registry

    values = {
        "channel": channel,
        "version": version,
        "canary": [name for name in canary.split(",") if name],
        "stages": stages.split(","),
        "min_success": min_success,
        "max_errors": max_errors,
        "stage_hours": stage_hours,
    }
    plan = validate(rollout.RolloutPlan, values, "rollout start")
    with Registry.open(folder) as registry:
        row = rollout.start(registry, plan)
    first = ", ".join(plan.canary) or f"{plan.shares[0]:.0%} of the farms"
    print(f"version {row.version} goes to {first}; see: fieldfed-server rollout status {folder}")


@rollout_app.command(epilog="Example: fieldfed-server rollout status network")
def status(folder: Folder) -> None:
    """Where each rollout is, and what devices reported."""
    from server import rollout
    from server.registry import Registry

    with Registry.open(folder) as registry:
        rows = registry.rows.rollouts()
        for row in rows:
            plan = rollout.RolloutPlan.model_validate_json(row.plan)
            stage, said = "", row.detail
            if row.going:
                share = plan.shares[row.stage]
                stage = ", canaries" if share == 0 else f", {share:.0%} of the farms"
                reports = rollout.newest(registry.rows.installs(row.version))
                said = f"{rollout.judge(plan, reports, 0, 0.0)[1]}; {row.detail}"
            since = datetime.fromtimestamp(row.since, UTC)
            print(
                f"channel {row.channel}: version {row.version} after {row.previous}, {row.state}"
                f"{stage} since {since:%Y-%m-%d %H:%M} UTC; {said}"
            )
    if not rows:
        print("nothing was rolled out yet")


@rollout_app.command(epilog="Example: fieldfed-server rollout pause network")
def pause(folder: Folder, channel: ChannelOption = "stable") -> None:
    """No further farm is offered the version; those that were keep it."""
    from server import rollout
    from server.registry import Registry

    with Registry.open(folder) as registry:
        row = rollout.change(registry, channel, "paused")
    print(f"version {row.version} waits; 'rollout resume' goes on")


@rollout_app.command(epilog="Example: fieldfed-server rollout resume network")
def resume(folder: Folder, channel: ChannelOption = "stable") -> None:
    """Go on with a rollout that was paused."""
    from server import rollout
    from server.registry import Registry

    with Registry.open(folder) as registry:
        row = rollout.change(registry, channel, "running")
    print(f"version {row.version} goes on")


@rollout_app.command(epilog="Example: fieldfed-server rollout abort network")
def abort(folder: Folder, channel: ChannelOption = "stable") -> None:
    """End a rollout: the channel names the version of before, for every farm."""
    from server import rollout
    from server.registry import Registry

    with Registry.open(folder) as registry:
        row = rollout.abort(registry, channel)
    print(f"channel {channel} names version {row.previous} for every farm")
