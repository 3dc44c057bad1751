"""Which releases work together: ours, and Flower's that it was tried with."""

from importlib.metadata import PackageNotFoundError, version

FLOWER = "1.41.0"
"""As constraints.txt has it."""


def release() -> str:
    """Of this program."""
    return installed("fieldfed") or "unknown"


def installed(package: str) -> str | None:
    """The version of a package that is installed here; it is not imported."""
    try:
        return version(package)[:40]
    except PackageNotFoundError:
        return None
