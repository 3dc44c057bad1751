"""A folder that a doctor looks at, and what is done to it."""

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.diagnosis import Finding, Level
from tests.system.site import toml

Memory = namedtuple("Memory", "total available")


@dataclass(kw_only=True)
class Examined:
    """In good health, until a test does something to it."""

    settings: ClassVar[str]
    examine: ClassVar[Callable[[Path, Path], Iterator[Finding]]]

    folder: Path
    root: Path
    sections: dict[str, dict[str, Any]]

    def write(self, **sections: dict[str, Any]) -> None:
        """Settings, with these changes."""
        changed = {name: values | sections.get(name, {}) for name, values in self.sections.items()}
        (self.folder / self.settings).write_text(toml(changed))

    def look(self) -> list[Finding]:
        return list(type(self).examine(self.folder, self.root))

    def faults(self) -> dict[str, Finding]:
        """What is not ok, by what was looked at."""
        return {one.what: one for one in self.look() if one.level is not Level.OK}


def contents(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All that a look could have changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_size, data)
    return found


def spoil(path: Path, how: str) -> None:
    """A file becomes garbage, empty or a folder."""
    mode = path.stat().st_mode
    path.unlink()
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\x00 nonsense\n" * 20 if how == "garbage" else b"")
        path.chmod(mode)
