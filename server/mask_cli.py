"""``fieldfed-server mask``: what is left of the backbone, and why."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from common.mask import Mask

mask_app = typer.Typer(help="What is left of the backbone, and why.", no_args_is_help=True)
RunNumber = Annotated[int | None, typer.Option("--run", help="default: the last")]
Folder = Annotated[Path, typer.Argument(help="the server's folder: server.toml and its state")]


@mask_app.command("show", epilog="Example: fieldfed-server mask show network")
def show_mask(
    folder: Folder,
    run_number: RunNumber = None,
    costs: Annotated[
        Path | None, typer.Option(help="what 'fieldfed-client costs' wrote: the time left there")
    ] = None,
) -> None:
    """Which heads and neurons are left, block by block."""
    from common.mask import Mask
    from server.store import opened_run

    with opened_run(folder, run_number) as (store, row):
        mask = Mask.from_json(store.last_mask(row))
        events = [one for one in store.rounds(row.run) if one.kind == "align"]
    print(mask.describe())
    ratio = next((one.macs_ratio for one in reversed(events) if one.macs_ratio is not None), 1.0)
    print(
        f"run {row.run}: {mask.heads_kept_ratio:.1%} of heads, {mask.neurons_kept_ratio:.1%} of "
        f"neurons, {ratio:.1%} of MACs"
    )
    if costs is not None:
        print(_predicted(folder, row.base, mask, costs))


def _predicted(folder: Path, base: str, mask: "Mask", path: Path) -> str:
    from common.backbone import read_spec
    from common.costs import CostTable
    from server.models import Models

    dense = read_spec(Models(folder).path(base))
    table = CostTable.load(path, dense)
    share = table.costs().of(mask.apply_to(dense), dense) / table.dense_seconds
    return (
        f"predicted: {share:.1%} of {1000 * table.dense_seconds:.1f} ms an image on "
        f"{table.device}, {table.threads} threads"
    )


@mask_app.command("explain", epilog="Example: fieldfed-server mask explain network 3 1")
def explain_head(
    folder: Folder,
    block: Annotated[int, typer.Argument(help="from 0, as 'mask show' counts")],
    head: Annotated[int, typer.Argument(help="from 0, in the dense backbone")],
    run_number: RunNumber = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Why a head is still there, or is not: its scores by farm and its rank at every cut."""
    from common.backbone import read_spec
    from server.explain import explain, show
    from server.models import Models
    from server.store import opened_run

    with opened_run(folder, run_number) as (store, row):
        case = explain(store, row, read_spec(Models(folder).path(row.base)), block, head)
    if as_json:
        print(json.dumps(asdict(case), indent=2, sort_keys=True))
    else:
        Console().print(show(case))


@mask_app.command("export", epilog="Example: fieldfed-server mask export network --out heads.json")
def export_heads(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("heads.json"),
    dense: Annotated[
        Path | None, typer.Option(help="and the newest backbone that nothing was cut from")
    ] = None,
    run_number: RunNumber = None,
) -> None:
    """Write which heads are gone, for a farm that asks whether it needs them."""
    from common import backbone
    from common.files import write_atomically
    from server.models import Models
    from server.removals import newest_whole, removals
    from server.store import opened_run

    with opened_run(folder, run_number) as (store, row):
        found = removals(store, row)
        whole = newest_whole(store, row)
    if dense is not None:
        model, spec = Models(folder).view(whole)
        backbone.save_backbone(dense, model, spec)
    write_atomically(out, found.model_dump_json(indent=1).encode())
    print(
        f"{len(found.removed)} heads of run {found.run} are gone: {out}; give it to a farm, which "
        "runs: fieldfed-client needs"
    )
    if dense is not None:
        print(f"backbone {whole[:12]}: {dense}; a farm gives it to: fieldfed-client adapt --dense")


@mask_app.command("clusters", epilog="Example: fieldfed-server mask clusters network --out masks")
def cluster_farms(
    folder: Folder,
    threshold: Annotated[
        float, typer.Option(min=-1, max=1, help="rank correlation from which farms agree")
    ] = 0.5,
    out: Annotated[Path | None, typer.Option(help="folder for a mask of each group")] = None,
    run_number: RunNumber = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Which farms disagree on heads, and what a mask of their own would keep for them."""
    from common.backbone import read_spec
    from common.files import write_atomically
    from server.clusters import clusters, words
    from server.models import Models
    from server.store import opened_run

    with opened_run(folder, run_number) as (store, row):
        found = clusters(store, row, read_spec(Models(folder).path(row.base)), threshold)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(found.found, start=1):
            write_atomically(out / f"mask-{number}.json", one.mask.to_json().encode())
    print(json.dumps(asdict(found), indent=2, sort_keys=True) if as_json else words(found))
