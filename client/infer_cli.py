"""``fieldfed-client`` for devices that only classify: what writes their files, and what reads them.

Bundle, distil, student and adapt write; classify and watch read.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common import logs
from common.command import LogOption
from common.errors import DataError

if TYPE_CHECKING:
    from client.infer import Classifier

BundleFile = Annotated[Path, typer.Argument(help="a file that 'fieldfed-client bundle' wrote")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: all")]
AsJson = Annotated[bool, typer.Option("--json", help="print a line of JSON per image")]

infer_app = typer.Typer()


@infer_app.command(epilog="Example: fieldfed-client bundle farms/apple --out apple.bundle")
def bundle(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    out: Annotated[Path, typer.Option(help="file to write")],
    int8: Annotated[
        bool, typer.Option("--int8", help="8 bits: smaller and faster, judged on your images")
    ] = False,
    log: LogOption = "text",
) -> None:
    """Write what this farm serves with as one file, for its devices that only classify."""
    from client.device import Device
    from client.portable import write_portable

    logs.start_logging(log)
    device = Device.of(folder)
    about = write_portable(device.serving, out, device.images if int8 else None)
    size, classes = out.stat().st_size / 1e6, len(about.classes)
    print(f"version {about.version}, {classes} classes, {about.precision}, {size:.1f} MB: {out}")


@infer_app.command(epilog="Example: fieldfed-client distil farms/apple --out small.bundle")
def distil(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    out: Annotated[Path, typer.Option(help="file to write")],
    student: Annotated[str, typer.Option(help="a timm network")] = "mobilenetv3_small_100",
    weights: Annotated[Path | None, typer.Option(help="safetensors to begin with")] = None,
    epochs: Annotated[int, typer.Option(help="over the fit part", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="of everything that is drawn", min=0)] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="8 bits: smaller and faster")] = False,
    log: LogOption = "text",
) -> None:
    """Teach a small network what this farm serves with, and write it as a bundle."""
    from client.device import Device
    from client.distil import DistilConfig, portable_student, teach
    from client.portable import in_8_bits

    logs.start_logging(log)
    device = Device.of(folder)
    teacher, images = device.serving.in_use(), device.images()
    config = DistilConfig(student=student, weights=weights, epochs=epochs, seed=seed)
    made = teach(teacher, images, config)
    bundle = portable_student(made, teacher)
    bundle = in_8_bits(bundle, images) if int8 else bundle
    bundle.write(out)
    print(
        f"{student}: right about {made.accuracy:.3f} of the decide part, its teacher about "
        f"{made.teacher_accuracy:.3f}; {out.stat().st_size / 1e6:.1f} MB: {out}"
    )


@infer_app.command(epilog="Example: fieldfed-client student farms/apple --out small.bundle")
def student(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    out: Annotated[Path, typer.Option(help="file to write")],
    int8: Annotated[bool, typer.Option("--int8", help="8 bits: smaller and faster")] = False,
    log: LogOption = "text",
) -> None:
    """Write the student that all farms have taught together as a bundle, with what is this farm's.

    Classifier, temperature and the statistics of batch normalisation are from its own images.
    """
    from client.device import Device
    from client.portable import in_8_bits
    from client.pupil import portable_pupil
    from client.state import FarmState

    logs.start_logging(log)
    device = Device.of(folder)
    images, about = device.images(), device.serving.about()
    version = 1 if about is None else about.manifest.counter
    made = portable_pupil(FarmState(folder / "state"), images, version)
    bundle = in_8_bits(made.bundle, images) if int8 else made.bundle
    bundle.write(out)
    print(
        f"{made.name} ({made.digest[:12]}): right about {made.accuracy:.3f} of the decide part; "
        f"{out.stat().st_size / 1e6:.1f} MB: {out}"
    )


@infer_app.command(
    epilog="Example: fieldfed-client adapt farms/rice --dense dense.safetensors --out rice.bundle"
)
def adapt(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    out: Annotated[Path, typer.Option(help="file to write")],
    dense: Annotated[
        Path | None, typer.Option(help="what 'mask export' wrote; default: the fullest here")
    ] = None,
    rounds: Annotated[int, typer.Option(help="of training on this farm alone", min=0)] = 3,
    seed: Annotated[int, typer.Option(help="of order and augmentation", min=0)] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="8 bits: smaller and faster")] = False,
    log: LogOption = "text",
) -> None:
    """Make the shared backbone this farm's own, where it came late or is unlike the others.

    A backbone of before the cuts learns on this farm alone, and tells what is left. What comes of
    it is one file for its devices, and no base of the network's rounds.
    """
    from client.adapt import adapt as adapt_to
    from client.adapt import fuller_than
    from client.base import newest_base
    from client.device import Device
    from client.portable import calibrated_bundle, in_8_bits
    from client.state import FarmState

    logs.start_logging(log)
    device, state = Device.of(folder), FarmState(folder / "state")
    images, base = device.images(), newest_base(state)
    fuller = fuller_than(base, state, dense)
    made = adapt_to(base, images, fuller, rounds=rounds, seed=seed)
    about = device.serving.about()
    version = 1 if about is None else about.manifest.counter
    bundle, _ = calibrated_bundle(made.model, made.spec, made.classifier, images, version)
    bundle = in_8_bits(bundle, images) if int8 else bundle
    bundle.write(out)
    print(
        f"right about {made.accuracy:.3f} of the decide part, {made.shared:.3f} as all farms share "
        f"it; {out.stat().st_size / 1e6:.1f} MB: {out}"
    )


@infer_app.command(epilog="Example: fieldfed-client classify apple.bundle leaf.jpg photos/")
def classify(
    bundle: BundleFile,
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Say what photographs show, or that it is not sure. An unreadable one stops nothing."""
    from client.infer import failed, images_in
    from common.duplicates import UNREADABLE

    classifier = _classifier(bundle, threads)
    found = [image for path in images for image in images_in(path)]
    read = 0
    for image in found:
        try:
            guess = classifier.classify(image)
        except UNREADABLE as error:
            line = failed(image, error)
            print(json.dumps(line) if as_json else f"{image}: {line['error']}", file=sys.stderr)
            continue
        read += 1
        print(json.dumps(guess.fields()) if as_json else f"{image}: {guess.words()}", flush=True)
    if not read:
        raise DataError(f"none of {len(found)} files could be read as an image")


@infer_app.command(epilog="Example: fieldfed-client watch apple.bundle /var/camera --keep-mb 2000")
def watch(
    bundle: BundleFile,
    folder: Annotated[Path, typer.Argument(help="where photographs appear")],
    results: Annotated[Path | None, typer.Option(help="default: FOLDER/results.jsonl")] = None,
    marked: Annotated[
        Path | None, typer.Option(help="folder for copies with the result written on them")
    ] = None,
    keep_mb: Annotated[
        int | None, typer.Option(help="photographs that may stay; default: all", min=1)
    ] = None,
    threads: Threads = 0,
    log: LogOption = "text",
) -> None:
    """Classify every photograph that appears in a folder, until Ctrl-C."""
    from client.watch import Watcher

    logs.start_logging(log)
    if not folder.is_dir():
        raise DataError(f"no folder '{folder}'")

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    Watcher(
        _classifier(bundle, threads),
        folder,
        results or folder / "results.jsonl",
        marked=marked,
        quota=None if keep_mb is None else keep_mb * 1_000_000,
    ).run(tell)


def _classifier(path: Path, threads: int) -> "Classifier":
    from client.infer import Classifier
    from common.portable import PortableBundle

    return Classifier(PortableBundle.read(path), threads)
