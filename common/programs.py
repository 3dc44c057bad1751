"""What Flower's children find when they start: our programs on their PATH, a safe import path.

Flower starts its children by bare name and then puts the unpacked app first on their import path,
so a ``client/app.py`` in there, or in the working directory, would run instead of ours. A module
that is already imported is used as it is: our programs import our packages from where this very
file lies, before anything else, and only then hand over to Flower.
"""

import os
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from common.processes import rotate

CHUNK_BYTES = 262_144
"""Flower's chunk of an array: 5 MiB ones do not pass a 160 kbit/s uplink before it gives up."""


def flower_environment(state_dir: Path, poll_seconds: float = 0.5) -> dict[str, str]:
    """The environment of Flower's programs: no telemetry, all files below ``state_dir``.

    ``poll_seconds`` is how often a SuperExec asks for work; each question costs some CPU.
    """
    env = child_environment(programs_of(state_dir))
    env |= {
        "FLWR_HOME": str(flower_home(state_dir)),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Both sides cut arrays alike, so that both compute the same traffic.
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES),
    }
    env.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", str(poll_seconds))
    return env


def flower_home(state_dir: Path) -> Path:
    """Flower's own folder; private, because messages lie in there until they are fetched."""
    home = state_dir.absolute() / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home


def programs_of(state_dir: Path) -> Path:
    """Where our stand-ins for Flower's programs lie."""
    return state_dir.absolute() / "programs"


def logs_of(state_dir: Path) -> Path:
    """Where log files lie."""
    return state_dir.absolute() / "logs"


def child_environment(programs: Path) -> dict[str, str]:
    """Our environment for a child: ``programs`` first on its PATH, nothing relative to import."""
    env = dict(os.environ)
    scripts = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    env["PATH"] = os.pathsep.join([str(programs), *scripts, env.get("PATH", os.defpath)])
    imports = env.pop("PYTHONPATH", "").split(os.pathsep)
    if absolute := [entry for entry in imports if Path(entry).is_absolute()]:
        env["PYTHONPATH"] = os.pathsep.join(absolute)
    env["PYTHONSAFEPATH"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    return env


def write_program(path: Path, module: str, log_file: Path, messenger: Sequence[str] = ()) -> None:
    """Write an executable that runs ``main()`` of OUR ``module``, whatever else has its name.

    ``messenger``: a command that gets the arguments first; if it succeeds there is nothing to do.
    """
    output = shlex.quote(str(log_file.absolute()))
    lines = ["#!/bin/sh"]
    if messenger:
        lines.append(f'{shlex.join(messenger)} "$@" >>{output} 2>&1 && exit 0')
    lines.append(f'exec {shlex.join(python_command(module))} "$@" >>{output} 2>&1')
    rotate(log_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A shell script, because a path with a space cannot stand in a first line of its own.
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)


def python_command(module: str) -> list[str]:
    """The command that runs ``main()`` of our ``module``; arguments may follow."""
    root = Path(__file__).resolve().parent.parent
    package = module.partition(".")[0]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import common, {package}; "
        f"del sys.path[0]; import {module}; sys.exit({module}.main())"
    )
    return [sys.executable, "-P", "-c", code]
