"""``fieldfed-client bench``, ``costs`` and ``explain``: what a model costs, and looks at."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from common import logs
from common.command import LogOption
from common.errors import ConfigError
from common.files import write_atomically

if TYPE_CHECKING:
    from client.bench import Row

bench_app = typer.Typer()


@bench_app.command(
    epilog="Example: fieldfed-client bench dense.bundle small.bundle --images photos"
)
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="bundles, .onnx files, backbones, farms' folders; ratios to the first"),
    ],
    images: Annotated[
        Path | None, typer.Option(help="CLASS/*.jpg to be right about; without: no accuracy")
    ] = None,
    image_size: Annotated[
        list[int] | None, typer.Option(min=16, max=2048, help="pixels, again for several")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="of measuring latency, per model")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG of accuracy against latency; needs --images")
    ] = None,
    log: LogOption = "text",
) -> None:
    """Measure models side by side on this machine: latency, memory, size, MACs, accuracy."""
    from client.bench import labelled, measured
    from client.subjects import opened

    logs.start_logging(log)
    if picture is not None and images is None:
        raise ConfigError("--picture shows accuracy; give --images FOLDER with a folder per class")
    found = [] if images is None else labelled(images)
    sides: Sequence[int | None] = image_size or [None]
    subjects = [opened(path, side) for path in models for side in sides]
    rows = measured(subjects, found, seconds)
    Console().print(_table(rows))
    if json_file is not None:
        body = json.dumps({"rows": [asdict(row) for row in rows]}, indent=2)
        write_atomically(json_file, body.encode() + b"\n")
    if picture is not None:
        _draw(picture, rows)


def _table(rows: Sequence["Row"]) -> Table:
    """For people."""
    table = Table(title="one image; ratios to the first model")
    table.add_column("model")
    threads = rows[0].threads
    heads = ("px", "MB", "GMACs", "M numbers", "ms p50, 1 thread", "p95", "ratio")
    for head in (*heads, f"ms p50, {threads} threads", "p95", "ratio", "peak MB", "accuracy"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            f"{row.model} ({row.engine}, {row.precision})",
            str(row.image_size),
            f"{row.file_bytes / 1e6:.1f}",
            _said(row.macs, 1e9, 2),
            _said(row.parameters, 1e6, 1),
            f"{row.latency_ms_1thread_p50:.1f}",
            f"{row.latency_ms_1thread_p95:.1f}",
            f"{row.latency_ratio_1thread:.2f}",
            f"{row.latency_ms_p50:.1f}",
            f"{row.latency_ms_p95:.1f}",
            f"{row.latency_ratio:.2f}",
            _said(row.peak_memory_bytes, 1e6, 0),
            _said(row.accuracy, 1, 3),
        )
    return table


def _said(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _draw(path: Path, rows: Sequence["Row"]) -> None:
    from client.scatter import Point, draw

    points = [
        Point(row.model, row.latency_ms_1thread_p50, row.accuracy)
        for row in rows
        if row.accuracy is not None
    ]
    if not points:
        raise ConfigError("no model here knows classes, so there is no accuracy to draw")
    images = max(row.images for row in rows)
    draw(path, f"Accuracy on {images} images against latency at one thread", points)


@bench_app.command(epilog="Example: fieldfed-client costs base.safetensors --out costs-pi4.json")
def costs(
    model: Annotated[Path, typer.Argument(help="a dense backbone: the server's base.safetensors")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("costs.json"),
    device: Annotated[str, typer.Option(help="what to call it; default: its processor")] = "",
    threads: Annotated[int, typer.Option(min=1, help="of the runtime, as it will serve")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="of measuring, per number of units")] = 5.0,
    log: LogOption = "text",
) -> None:
    """Measure what heads and neurons cost on this machine, for a server to prune by."""
    from client.costs import measured_costs
    from common.backbone import read_spec

    logs.start_logging(log)
    table = measured_costs(read_spec(model), device=device, threads=threads, seconds=seconds)
    write_atomically(out, table.model_dump_json(indent=1).encode() + b"\n")
    print(
        f"{out}: {1000 * table.dense_seconds:.1f} ms an image on {table.device}; give it to the "
        "server's operator, for [plan] prune_time and costs"
    )


@bench_app.command(epilog="Example: fieldfed-client explain farms/apple leaf.jpg --out why.png")
def explain(
    folder: Annotated[Path, typer.Argument(help="the farm's folder: farm.toml and its state")],
    image: Annotated[Path, typer.Argument(help="a photograph")],
    out: Annotated[Path, typer.Option(help="PNG to write")],
    against: Annotated[
        str | None, typer.Option(help="'previous', another farm's folder, or a backbone's file")
    ] = None,
) -> None:
    """Show which parts of a leaf decide what the version in use says of it."""
    from client.device import Device
    from client.explain import Looker, draw, look, other

    device = Device.of(folder)
    lookers = [Looker.of(device.serving.in_use())]
    lookers += [] if against is None else [other(against, device)]
    views = [look(one, image) for one in lookers]
    draw(out, image, views)
    for view in views:
        print(view.words().replace("\n", ": "))
