"""What both commands share: options, one-line errors and numbered exit codes."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import click
import typer

from common.errors import ConfigError, FieldfedError, StateError
from common.files import write_atomically

INTERRUPTED = 130
OPTIONAL = frozenset({"flwr", "onnx", "onnxruntime", "timm", "torch", "torchvision"})
"""What only some machines have; the extras of pyproject.toml say which."""

LogOption = Annotated[
    Literal["text", "json"], typer.Option("--log", help="log lines for people or for machines")
]


def run(app: typer.Typer) -> None:
    """Run a command line; expected errors become one line and their exit code."""
    try:
        code = app(standalone_mode=False)
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
