"""``fieldfed-server distil`` and ``student``: farms teach one small network together."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common import logs
from common.command import LogOption
from common.config import ServerConfig
from common.errors import ConfigError, StateError
from common.settings import load_settings

distil_app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="the server's folder: server.toml and its state")]


@distil_app.command(
    epilog="Example: fieldfed-server distil network --student mobilenetv3_small_100 --rounds 20"
)
def distil(
    folder: Folder,
    student: Annotated[
        str | None, typer.Option(help="a timm network; default: the settings'")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="default: the settings'")] = None,
    teacher_run: Annotated[
        int | None, typer.Option("--teacher", help="run whose backbone teaches; default: the last")
    ] = None,
    label: Annotated[str, typer.Option(help="name of the closing report")] = "student",
    log: LogOption = "text",
) -> None:
    """Have farms teach a small network what an earlier run has come to, on a network that is up.

    Shared are its weights alone: classifiers, images and the statistics of batch normalisation stay
    on each farm. Ctrl-C stops the run; the same command goes on with it.
    """
    logs.start_logging(log)
    given = {"name": student, "rounds": rounds}
    changes = {key: value for key, value in given.items() if value is not None}
    config = load_settings(ServerConfig, folder / "server.toml", distil=changes)
    if config.region is not None or config.regions:
        raise ConfigError(
            f"'{folder}' is a centre or a region, whose farms cannot be taught yet; remove "
            "[region] or [[regions]]"
        )

    from server.distil import last_teacher, lesson_settings
    from server.launch import Network
    from server.models import Models
    from server.runs import play
    from server.store import Store

    path = folder / "fieldfed.db"
    if not path.is_file():
        raise StateError(f"no teacher yet: run to its end: fieldfed-server train {folder}")
    with Store.open(path, read_only=True) as store:
        teacher = last_teacher(store, teacher_run)
    models = Models(folder)
    settings = lesson_settings(config, models, teacher, label)
    models.settle()
    row = play(Network.of(config, folder), settings, Console())
    print(f"run {row.run} is done; its student: fieldfed-server student {folder} --out student")


@distil_app.command(epilog="Example: fieldfed-server student network --out student")
def student(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="folder to write")],
    run_number: Annotated[int | None, typer.Option("--run", help="default: the last")] = None,
) -> None:
    """Write the student that a run has come to as files: weights under timm's names, and ONNX.

    Its statistics of batch normalisation are those of the source species, the only images here.
    """
    config = load_settings(ServerConfig, folder / "server.toml")

    from server.distil import last_student, write_student
    from server.models import Models
    from server.store import Store

    path = folder / "fieldfed.db"
    if not path.is_file():
        raise StateError(f"no student yet; begin with: fieldfed-server distil {folder}")
    with Store.open(path, read_only=True) as store:
        found = last_student(store, run_number)
    about: dict[str, Any] = write_student(config, Models(folder), found, out)
    print(json.dumps(about, indent=2, sort_keys=True))
