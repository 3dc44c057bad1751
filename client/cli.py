"""``fieldfed-client``: the commands of a farm."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from client.bench_cli import bench_app
from client.doctor_cli import doctor_app
from client.infer_cli import infer_app
from client.ledger_cli import ledger_app
from common import logs
from common.command import LogOption, run, write_new
from common.config import FarmConfig
from common.errors import LinkError, QualityError, RefusalError
from common.files import write_atomically
from common.settings import load_settings, validate

if TYPE_CHECKING:
    from client.device import Device
    from client.infer import Guess
    from client.labels import Labels

app = typer.Typer(
    help="Run a farm: its images and its classifier stay here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(infer_app)
app.add_typer(ledger_app)
app.add_typer(bench_app)
app.add_typer(doctor_app)
Folder = Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")]


@app.command(
    epilog="Example: fieldfed-client init farms/apple --data photos/apple "
    "--superlink 192.0.2.7:8000"
)
def init(
    folder: Folder,
    data: Annotated[Path, typer.Option(help="CLASS/*.jpg, or train/CLASS and test/CLASS")],
    name: Annotated[str | None, typer.Option(help="farm name; default: the folder's")] = None,
    superlink: Annotated[
        str | None, typer.Option(help="host:port; default: the door of the network it joins")
    ] = None,
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
    """Take part until Ctrl-C: train when asked, follow versions, watch the camera, tell of it.

    What is not in farm.toml, or not joined, is left out: broker, camera, network.
    """
    from client.agent import run_device

    logs.start_logging(log)
    config = load_settings(FarmConfig, folder / "farm.toml")
    run_device(config, folder / "farm.toml", folder / "state")


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


@app.command(
    epilog="Example: fieldfed-client needs farms/apple heads.json --dense base.safetensors"
)
def needs(
    folder: Folder,
    heads: Annotated[Path, typer.Argument(help="what 'fieldfed-server mask export' wrote")],
    dense: Annotated[
        Path | None, typer.Option(help="the server's base.safetensors; default: the fullest here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Which attention heads are gone that this farm needs, by its own images. Nothing leaves it."""
    from client.needs import needs as found_needs
    from client.state import FarmState
    from common.removals import Removals

    removals, images = Removals.load(heads), _device(folder).images()
    found = found_needs(removals, images, FarmState(folder / "state"), dense)
    print(found.as_json() if as_json else found.words())


@app.command(epilog="Example: fieldfed-client request farms/apple --out apple.csr")
def request(
    folder: Folder, out: Annotated[Path, typer.Option(help="file for the server's operator")]
) -> None:
    """Ask to join a network: a request for a certificate. The key stays here."""
    write_atomically(out, _device(folder).identity.request())
    print(f"give {out} to the server's operator, who runs: fieldfed-server certify")


@app.command(
    epilog="Examples: fieldfed-client join farms/apple https://farms.example.org:8443 "
    "K7QF-3M9T-X2HB-R8WC   |   fieldfed-client join farms/apple apple.member"
)
def join(
    folder: Folder,
    given: Annotated[str, typer.Argument(help="the door's address, or the operator's file")],
    code: Annotated[str | None, typer.Argument(help="that the operator gave; once only")] = None,
) -> None:
    """Become a member of a network: with a code, or with the operator's answer to 'request'."""
    from client.door import way_of
    from client.joining import faults, join_by_code
    from common.membership import Membership

    device = _device(folder)
    if "://" in given:
        member = join_by_code(device.identity, device.join, given, code or typer.prompt("code"))
    else:
        member = Membership.load(Path(given))
        device.join(member)
    where = f", models come from {member.hub}" if member.hub else ""
    print(f"farm {member.farm} is a member of network {member.network}{where}")
    way = way_of(device.farm, folder / "state")
    found = faults(way, member, folder / "state") if way.tls is not None else []
    for fault in found:
        print(f"but: {fault}")
    if found and "://" in given:  # a file is also for a site that has no link yet
        raise typer.Exit(LinkError.exit_code)


@app.command(epilog="Example: fieldfed-client leave farms/apple")
def leave(folder: Folder) -> None:
    """Leave the network: its certificate ends, what the farm has on this device stays."""
    from client.door import way_of
    from client.joining import leave as leave_network

    device = _device(folder)
    member, state = device.membership(), folder / "state"
    fault = leave_network(device.identity, way_of(device.farm, state), state)
    print(
        f"farm {member.farm} has left network {member.network}. Images, labels, classifier and the "
        f"version in use stay in {folder}, and still classify. The network keeps what the farm has "
        "told it: what its updates taught the shared backbone, its accuracies, how many images and "
        "classes it had, and that a certificate was given to it"
    )
    if fault is not None:
        print(f"but the network does not know: {fault}; ask the operator for: revoke {member.farm}")
        raise typer.Exit(LinkError.exit_code)


@app.command(epilog="Example: fieldfed-client update farms/apple --follow")
def update(
    folder: Folder,
    follow: Annotated[bool, typer.Option("--follow", help="go on until Ctrl-C")] = False,
    log: LogOption = "text",
) -> None:
    """Try what the channel names on this farm's images, and serve with it if it is no worse."""
    logs.start_logging(log)
    if follow:
        _follow(folder)
    device = _device(folder)
    metered = device.farm.link == "metered"
    with device.alone(), device.hub() as hub:
        updater = device.updater()
        back = updater.check(hub)
        done = back if back is not None else updater.update(hub, compress=metered)
    print(done.words)
    if done.outcome == "refused":
        raise typer.Exit(RefusalError.exit_code)


def _follow(folder: Path) -> NoReturn:
    """Until Ctrl-C; each try is a process that ends, so that waiting takes little memory."""
    from client.lookout import Lookout
    from client.member import Member
    from client.schedule import Follower

    member = Member.of(folder)
    with member.hub():  # says what is missing
        pass
    lookout = Lookout(member, folder / "farm.toml", folder / "state", lambda _event: None)
    metered = member.farm.link == "metered"
    Follower(lookout, hours=member.farm.update_hours, metered=metered).run()
    raise KeyboardInterrupt


@app.command(epilog="Example: fieldfed-client serving farms/apple --json")
def serving(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What this device serves with."""
    about = _device(folder).serving.about()
    if as_json:
        shown = None if about is None else about.model_dump(mode="json", exclude={"manifest"})
        version = None if about is None else about.manifest.counter
        print(json.dumps({"version": version, "bundle": shown}, indent=2, sort_keys=True))
    elif about is None:
        print(f"no version yet; get one with: fieldfed-client update {folder}")
    else:
        print(
            f"version {about.manifest.counter} since {about.committed:%Y-%m-%d %H:%M} UTC: "
            f"{len(about.classes)} classes, accuracy {about.accuracy:.3f}, macro-F1 {about.f1:.3f} "
            f"on this farm's decide part; not sure below {about.threshold:.2f}"
        )


@app.command(epilog="Example: fieldfed-client label farms/apple img_0412.jpg scab")
def label(
    folder: Folder,
    image: Annotated[Path, typer.Argument(help="an image file, which is copied, or a folder")],
    name: Annotated[str | None, typer.Argument(help="its class; without: you are asked")] = None,
    new: Annotated[bool, typer.Option("--new", help="the class is a new one")] = False,
) -> None:
    """Say what an image shows: training uses it, and it judges the version in use.

    Without a class you are asked about every image that the version in use is not sure about.
    """
    if name is None:
        print(f"{_ask_about(folder, image)} images are labelled")
        return
    copy = _labels(folder).add(image, name, new=new)
    print(f"{copy} is a {name}" + ("; the classifier learns it at the next version" if new else ""))


def _ask_about(folder: Path, images: Path) -> int:
    from client.infer import images_in
    from client.review import review

    device = _device(folder)
    found = images_in(images)
    while True:
        bundle = device.serving.in_use()
        try:
            return review(bundle, device.labels, found, partial(_answer, device.labels))
        except QualityError as error:
            with device.alone(), device.hub() as hub:
                done = device.updater().roll_back(bundle, str(error), hub)
            if done is None:
                raise
            print(done.words)


def _answer(labels: "Labels", guess: "Guess") -> str | None:
    """The class that a person says, or None to skip; Ctrl-D ends it all."""
    likely = ", ".join(f"{name} {share:.2f}" for name, share in guess.ranked)
    while True:
        said = typer.prompt(
            f"{guess.image}: {likely}; Enter: {guess.label}, -: skip, or its class",
            default=guess.label,
            show_default=False,
        ).strip()
        if said == "-":
            return None
        if said in labels.classes:
            return str(said)
        known = ", ".join(labels.classes)
        if typer.confirm(f"no class '{said}'; there are {known}. Is it a new one?"):
            return str(said)


@app.command("rename-class", epilog="Example: fieldfed-client rename-class farms/apple scab black")
def rename_class(
    folder: Folder,
    old: Annotated[str, typer.Argument(help="its name so far")],
    new: Annotated[str, typer.Argument(help="its new name")],
) -> None:
    """Rename a class. What serves says the old name until the next version is in use."""
    _labels(folder).rename(old, new)
    print(f"class {old} is {new} now")


def _labels(folder: Path) -> "Labels":
    from client.labels import labels_of

    return labels_of(load_settings(FarmConfig, folder / "farm.toml"), folder / "state")


def _device(folder: Path) -> "Device":
    from client.device import Device

    return Device.of(folder)


def main() -> None:
    """Entry point."""
    run(app)
