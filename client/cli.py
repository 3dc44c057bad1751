"""``fieldfed-client``: the commands of a farm."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common import logs
from common.command import LogOption, run, write_new
from common.config import FarmConfig, load_settings, validate

app = typer.Typer(
    help="Run a farm: its images and its classifier stay here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
Folder = Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")]


@app.command(
    epilog="Example: fieldfed-client init farms/apple --data photos/apple "
    "--superlink 192.0.2.7:8000"
)
def init(
    folder: Folder,
    data: Annotated[Path, typer.Option(help="CLASS/*.jpg, or train/CLASS and test/CLASS")],
    name: Annotated[str | None, typer.Option(help="farm name; default: the folder's")] = None,
    superlink: Annotated[str, typer.Option(help="server address, host:port")] = "127.0.0.1:8000",
    per_class: Annotated[int | None, typer.Option(help="few-shot: training images used")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="seed of the few-shot draw")] = 0,
) -> None:
    """Create a farm: check its images and write FOLDER/farm.toml."""
    from common.images import open_folder

    section = {"name": name or folder.resolve().name, "data": str(data.resolve())}
    extra = {"superlink": superlink, "per_class": per_class, "threads": threads, "seed": seed}
    values = section | {key: value for key, value in extra.items() if value is not None}
    config = validate(FarmConfig, {"farm": values}, "init")
    images = open_folder(config.farm.data, per_class=config.farm.per_class, seed=config.farm.seed)
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    write_new(folder / "farm.toml", "[farm]\n" + "\n".join(lines) + "\n")
    print(
        f"farm {config.farm.name}: {len(images.classes)} classes, {len(images.fit)} images to fit, "
        f"{len(images.decide)} to decide; start it with: fieldfed-client run {folder}"
    )


@app.command("run", epilog="Example: fieldfed-client run farms/apple --log json")
def run_farm(folder: Folder, log: LogOption = "text") -> None:
    """Take part: stay connected, work when asked, until Ctrl-C."""
    from client.launch import run_supernode

    logs.start_logging(log)
    config = load_settings(FarmConfig, folder / "farm.toml")
    run_supernode(config, folder / "farm.toml", folder / "state")


@app.command(epilog="Example: fieldfed-client wake farms/apple")
def wake(folder: Folder) -> None:
    """Connect a farm on a metered link now, and for as long as there is work."""
    from client.shifts import notify

    config = load_settings(FarmConfig, folder / "farm.toml")
    notify(folder / "state")
    if config.farm.link == "always":
        print(f"farm {config.farm.name} never sleeps: its link is not metered")
    else:
        print(f"farm {config.farm.name} wakes within seconds if it runs, else when it is started")


@app.command(epilog="Example: fieldfed-client load farms/apple /media/usb/base.safetensors")
def load(
    folder: Folder,
    backbone_file: Annotated[Path, typer.Argument(help="the server's base.safetensors, or later")],
) -> None:
    """Take a backbone from a file, so that it need not come over the link."""
    from client.state import FarmState
    from common import backbone

    load_settings(FarmConfig, folder / "farm.toml")  # only a farm has a use for it
    model, spec = backbone.load_backbone(backbone_file)
    digest = backbone.digest(model, spec)
    FarmState(folder / "state").save_backbone(digest, model, spec)
    print(f"backbone {digest[:12]} is here; steps from it are kilobytes")


@app.command(epilog="Example: fieldfed-client evaluate farms/apple --json")
def evaluate(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    log: LogOption = "text",
) -> None:
    """Accuracy of the newest backbone with this farm's classifier on its test part."""
    from client.farm import Farm

    logs.start_logging(log)
    config = load_settings(FarmConfig, folder / "farm.toml")
    report = Farm.open(config, folder / "state").report()
    if as_json:
        print(json.dumps(report))
        return
    Console().print(
        f"farm {report['farm']}: accuracy {report['accuracy']:.3f}, macro-F1 {report['f1']:.3f} "
        f"on {report['examples']} test images (backbone {str(report['base'])[:12]})"
    )


def main() -> None:
    """Entry point."""
    run(app)
