"""``fieldfed-server``: the commands of an operator."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from common import logs
from common.command import LogOption, run, write_new
from common.config import NetworkConfig, ServerConfig
from common.errors import ConfigError, StateError
from common.plan import BUDGETS, Criterion
from common.settings import load_settings, validate
from server.backup_cli import backup_app
from server.distil_cli import distil_app
from server.doctor_cli import doctor_app
from server.enrol_cli import enrol_app
from server.mask_cli import mask_app
from server.region_cli import region_app
from server.registry_cli import registry_app
from server.rollout_cli import rollout_app

app = typer.Typer(
    help="Coordinate farms: align a shared vision transformer, score its heads, prune it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(mask_app, name="mask")
app.add_typer(distil_app)
app.add_typer(doctor_app)
app.add_typer(enrol_app)
app.add_typer(backup_app)
app.add_typer(region_app, name="region")
app.add_typer(registry_app, name="registry")
app.add_typer(rollout_app, name="rollout")
RunNumber = Annotated[int | None, typer.Option("--run", help="default: the last")]
CriterionName = Annotated[
    str | None, typer.Option(help=f"how units are scored: {', '.join(get_args(Criterion))}")
]
Folder = Annotated[Path, typer.Argument(help="the server's folder: server.toml and its state")]

SETTINGS = """\
# Settings of a fieldfed server. Everything left out has its default; the environment overrides:
# FIELDFED_SERVER__PORT=9000 sets [server] port.
seed = 0

[server]
name = "{name}"
host = "127.0.0.1"
port = {port}

[backbone]
name = "{backbone}"
image_size = {image_size}
{weights}{source}
[plan]
rounds = 6
prune_heads = 0.4       # share of heads removed by the end; or prune_macs = 0.5
prune_events = 2

[rounds]
quorum = 1.0            # share of the farms whose replies make a round complete
deadline_seconds = 1800
min_farms = 1           # farms that must be online before a run starts

# [door]                # farms on other machines come in there, over mutual TLS
# host = "0.0.0.0"
# port = 8443
# names = ["farms.example.org"]   # by which farms reach it; then: fieldfed-server enrol

# [hub]                 # devices get signed models here, over mutual TLS
# host = "0.0.0.0"
# port = 8444
# names = ["farms.example.org"]   # by which devices reach it

# [region]              # of a larger network, whose centre says what is done
# centre = "coop"
# port = 8446
# names = ["north.example.org"]   # by which the centre reaches it

# [metrics]             # figures for Prometheus, on this machine
# port = 9464

# [page]                # the operator's page, on this machine
# port = 9465

# [broker]              # devices tell how they are over MQTT: see certify-broker
# host = "mqtt.example.org"
"""


@app.command(
    epilog="Example: fieldfed-server init network --source photos/tomato --weights vit.safetensors"
)
def init(
    folder: Folder,
    backbone: Annotated[str, typer.Option(help="timm name")] = "vit_small_patch14_dinov2",
    image_size: Annotated[int, typer.Option(help="pixels")] = 112,
    weights: Annotated[
        str | None, typer.Option(help="safetensors file, or hub, or hub:NAME; none: random")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="image folder of the source species (anchors, pre-training)")
    ] = None,
    port: Annotated[int, typer.Option(help="SuperLink's port")] = 8000,
    name: Annotated[str, typer.Option(help="of the network")] = "fieldfed",
) -> None:
    """Create a server: server.toml, its certificate authority, the keys that sign versions."""
    from common.backbone import dense_spec
    from server.identity import Authority
    from server.registry import Registry

    dense_spec(backbone, image_size)
    validate(NetworkConfig, {"name": name, "port": port}, "init")
    local = weights is not None and not weights.startswith("hub")
    where = str(Path(weights or "").resolve()) if local else weights
    text = SETTINGS.format(
        name=name,
        port=port,
        backbone=backbone,
        image_size=image_size,
        weights=f"weights = {json.dumps(where)}\n" if where else "",
        source=f"source = {json.dumps(str(source.resolve()))}\n" if source else "",
    )
    write_new(folder / "server.toml", text)
    Registry.create(folder, name).close()
    Authority.create(folder / "identity", name, [])
    print(f"wrote {folder / 'server.toml'}; next: fieldfed-server pretrain {folder}")


@app.command("pretrain", epilog="Example: fieldfed-server pretrain network")
def pretrain_base(folder: Folder, log: LogOption = "text") -> None:
    """Load or train the first backbone and describe its heads on the source species."""
    logs.start_logging(log)
    config = _settings(folder)

    from server.follow import progress_bar
    from server.pretrain import pretrain

    with progress_bar(Console()) as tell:
        pretrain(config, folder, tell)
    print(f"the first backbone is in {folder}; next: fieldfed-server up {folder}")


@app.command(epilog="Example: fieldfed-server up network")
def up(folder: Folder, log: LogOption = "text") -> None:
    """Start SuperLink and SuperExec, keep them and the run alive until Ctrl-C.

    A run that a crash or a power cut has interrupted continues by itself.
    """
    logs.start_logging(log)
    config = _settings(folder)

    from server.launch import serve
    from server.runs import CHECK_SECONDS, keeper_of

    with serve(config, folder) as network:
        then = f"in another terminal: fieldfed-server train {folder}"
        if config.region is not None:
            then = f"it plays what its centre '{config.region.centre}' orders"
        print(
            f"network {config.server.name} is up on {config.server.host}:{config.server.port}; "
            f"{then}",
            flush=True,
        )
        keeper = keeper_of(config, network)
        while True:
            keeper.check()
            time.sleep(CHECK_SECONDS)


@app.command(
    epilog="Example: fieldfed-server train network --rounds 6 --prune-macs 0.5 --label half"
)
def train(
    folder: Folder,
    rounds: Annotated[int | None, typer.Option(help="instead of the plan's")] = None,
    prune_heads: Annotated[float | None, typer.Option(help="share of heads removed")] = None,
    prune_macs: Annotated[float | None, typer.Option(help="share of MACs removed")] = None,
    criterion: CriterionName = None,
    label: Annotated[str, typer.Option(help="name of the closing report")] = "model",
    once: Annotated[
        bool, typer.Option("--once", help="begin nothing where a run of this label has ended")
    ] = False,
    log: LogOption = "text",
) -> None:
    """Run the plan on a network that is up, and show its progress. Ctrl-C stops the run.

    A centre needs not be up: this command is it, and started again it goes on.
    """
    logs.start_logging(log)
    plan: dict[str, Any] = {
        "rounds": rounds,
        "prune_heads": prune_heads,
        "prune_macs": prune_macs,
        "criterion": criterion,
    }
    changes = {key: value for key, value in plan.items() if value is not None}
    if changes.keys() & {"prune_heads", "prune_macs"}:
        changes = dict.fromkeys(BUDGETS) | changes
    config = load_settings(ServerConfig, folder / "server.toml", plan=changes)
    if config.region is not None:
        raise ConfigError(
            f"'{folder}' is a region: its centre '{config.region.centre}' starts runs"
        )

    # only now: what follows takes seconds to import
    from common.backbone import read_spec
    from server.launch import Network
    from server.runs import ended, play
    from server.search import planned
    from server.settings import RunSettings

    settings = validate(RunSettings, {"config": config, "label": label}, "train")
    base = folder / "base.safetensors"
    if not base.is_file():
        raise StateError(f"no '{base}' yet; make it with: fieldfed-server pretrain {folder}")
    planned(config.plan, read_spec(base), [])  # said here, not by a process that ends
    if once and (number := ended(folder, settings.label)) is not None:
        print(f"run {number} of the label '{label}' is done already; nothing was begun")
        return
    if config.regions:
        from server.region_line import lead

        number = lead(settings, folder)
        print(f"run {number} is done; see: fieldfed-server status {folder}")
        return
    row = play(Network.of(config, folder), settings, Console())
    told = f", {row.detail}" if row.detail else ""
    print(f"run {row.run} is done{told}; see: fieldfed-server status {folder}")


@app.command(epilog="Example: fieldfed-server status network --json")
def status(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Rounds, farms, accuracy and mask of the last run, also while it goes on."""
    from server.status import show, snapshot

    values = snapshot(folder)
    if as_json:
        print(json.dumps(values, indent=2, sort_keys=True))
    else:
        Console().print(show(values))


@app.command(epilog="Example: fieldfed-server readmit network apple")
def readmit(
    folder: Folder, farm: Annotated[str, typer.Argument(help="name of a paused farm")]
) -> None:
    """Ask a farm again that was paused because its replies were bad several times in a row."""
    from server.store import Store

    path = folder / "fieldfed.db"
    if not path.is_file():
        raise StateError(f"no run in '{folder}' yet, so no farm is paused")
    with Store.open(path) as store:
        store.readmit(farm)
    print(f"farm {farm} is asked again from the next round on")


@app.command(epilog="Example: fieldfed-server report network --out report.html")
def report(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    run_number: RunNumber = None,
) -> None:
    """Write a self-contained HTML report of a run and print its tables."""
    from server.models import Models
    from server.provenance import provenance
    from server.report import write_report
    from server.store import opened_run
    from server.story import terminal_table
    from server.summary import summarise

    with opened_run(folder, run_number) as (store, row):
        if not store.reports(row.run):
            raise StateError(f"run {row.run} has no report yet; see: fieldfed-server status")
        story = summarise(
            store,
            Models(folder),
            [row.run],
            title=f"Run {row.run}",
            provenance=provenance(" ".join(["fieldfed-server", *sys.argv[1:]]), row.seed),
        )
    write_report(story, out, {})
    Console().print(terminal_table(story))
    print(f"report: {out}")


@app.command(
    epilog="Examples: fieldfed-server demo   |   "
    "fieldfed-server demo --data photos --weights vit.safetensors --compare --per-class 40"
)
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, state and results")] = Path(
        "demo-output"
    ),
    data: Annotated[
        Path | None, typer.Option(help="DIR with source/SPECIES and farms/FARM; none: draw plants")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="safetensors file, or hub[:NAME]")] = None,
    backbone: Annotated[str, typer.Option(help="timm name")] = "vit_small_patch14_dinov2",
    image_size: Annotated[int, typer.Option(help="pixels")] = 112,
    compare: Annotated[
        bool, typer.Option("--compare", help="also run without pruning, and local-only")
    ] = False,
    per_class: Annotated[int | None, typer.Option(help="few-shot: training images used")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="rounds of each run; default 6, drawn 3")
    ] = None,
    prune_heads: Annotated[float | None, typer.Option(help="share of heads removed")] = None,
    prune_macs: Annotated[float | None, typer.Option(help="share of MACs removed")] = None,
    criterion: CriterionName = None,
    settings: Annotated[
        Path | None, typer.Option(help="TOML with what shall differ: sections of server.toml")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of everything")] = 0,
    log: LogOption = "text",
) -> None:
    """Play the whole story with real processes on this machine."""
    from common.processes import terminate_like_interrupt
    from server.demo import DemoOptions, run_demo

    logs.start_logging(log)
    options = DemoOptions(
        out=out,
        data=data,
        weights=weights,
        backbone=backbone,
        image_size=image_size,
        compare=compare,
        per_class=per_class,
        rounds=rounds,
        prune_heads=prune_heads,
        prune_macs=prune_macs,
        criterion=criterion,
        settings=settings,
        seed=seed,
        command=" ".join(["fieldfed-server", *sys.argv[1:]]),
    )
    with terminate_like_interrupt():
        run_demo(options, Console())


def _settings(folder: Path) -> ServerConfig:
    return load_settings(ServerConfig, folder / "server.toml")


def main() -> None:
    """Entry point."""
    run(app)
