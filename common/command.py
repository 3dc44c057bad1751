"""What both commands share: options, one-line errors and numbered exit codes."""

import inspect
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import click
import typer
from typer.core import TyperArgument
from typer.main import get_command
from typer.models import ArgumentInfo

from common.errors import ConfigError, FieldfedError, StateError
from common.files import write_atomically

INTERRUPTED = 130
OPTIONAL = frozenset({"flwr", "onnx", "onnxruntime", "timm", "torch", "torchvision"})
"""What only some machines have; the extras of pyproject.toml say which."""

LogOption = Annotated[
    Literal["text", "json"], typer.Option("--log", help="log lines for people or for machines")
]


def command_of(app: typer.Typer) -> click.Command:
    """The commands of a program.

    typer 0.20, which Flower pins, sets what an argument is for before click 8.5 takes it away; it
    is given back here.
    """
    command = get_command(app)
    _describe(command)
    return command


def _describe(command: click.Command) -> None:
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _describe(one)
    elif command.callback is not None:
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        for argument in command.params:
            if isinstance(argument, TyperArgument):
                said = get_args(hints[argument.name or ""])
                argument.help = next(o.help for o in said if isinstance(o, ArgumentInfo))


def run(app: typer.Typer) -> None:
    """Run a command line; expected errors become one line and their exit code."""
    try:
        code = command_of(app)(standalone_mode=False)
    except FieldfedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        lacking = (error.name or "").partition(".")[0]
        if lacking not in OPTIONAL:
            raise
        print(
            f"error: this command needs {lacking}, which is not installed on this machine; install "
            "fieldfed[client] on a farm's trainer, fieldfed[server] on a server",
            file=sys.stderr,
        )
        sys.exit(ConfigError.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; everything committed so far is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def write_new(path: Path, text: str) -> None:
    """Create a settings file; an existing one is never overwritten.

    Raises:
        ConfigError: it exists already.
    """
    if path.exists():
        raise ConfigError(f"'{path}' exists already; edit it, or choose another folder")
    write_atomically(path, text.encode())


def replace_folder(folder: Path) -> None:
    """An empty folder in place of whatever was there.

    Raises:
        StateError: it cannot be removed or created.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise StateError(f"cannot replace '{folder}': {error.strerror or error}") from error
