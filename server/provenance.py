"""How a figure came to be: the command, the commit and the versions that matter."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.config import ServerConfig
from server.story import Provenance

PACKAGES = ("fieldfed", "flwr", "torch", "timm", "numpy")


def provenance(command: str, seed: int, config: ServerConfig | None = None) -> Provenance:
    """Of a run that starts now; ``config`` is told as far as it differs from the defaults."""
    settings = {}
    if config is not None:
        played = {"backbone", "plan", "rounds", "train", "recovery", "privacy"}
        settings = config.model_dump(mode="json", include=played, exclude_defaults=True)
    return Provenance(
        command=command, commit=commit(), versions=_versions(), seed=seed, settings=settings
    )


def commit(root: Path = Path(__file__).parent.parent) -> str:
    """The checkout's commit, marked when the program differs from it; else the release.

    Args:
        root: of the checkout.
    """
    # what a benchmark has measured so far does not change what it measures
    program = ("--", ".", ":(exclude)bench-output")
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", *program)
    except (OSError, subprocess.SubprocessError):
        return f"release {version('fieldfed')}"
    return f"{head} with uncommitted changes" if changed else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
