"""What a run may bring to a farm: its name and its settings, never code.

Flower ships an app to every farm as a bundle (FAB, a zip file), unpacks it and imports what it
names. Whoever may start a run could so run anything on every farm. Here a bundle is looked at
before it is unpacked: it holds ``pyproject.toml`` and nothing else, which names our own app and no
dependency. The code is the one that is installed; it comes with our releases, and with nothing that
a server says.
"""

import io
import logging
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ProtocolError

log = logging.getLogger(__name__)

APP = "client.app:app"
PROJECT, METADATA = "pyproject.toml", ".info/"
MAX_BYTES, MAX_FILES = 65_536, 64

Install = Callable[..., Path]


def require_no_code(content: bytes) -> None:
    """Look at a bundle without unpacking it.

    Raises:
        ProtocolError: it holds more than settings, or names other code than ours.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            files = [one.filename for one in bundle.infolist()[: MAX_FILES + 1]]
            others = [one for one in files if one != PROJECT and not _is_metadata(one)]
            if others or files.count(PROJECT) != 1 or len(files) > MAX_FILES:
                raise ProtocolError(f"it carries {', '.join(map(repr, others[:5])) or 'too much'}")
            with bundle.open(PROJECT) as file:
                text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ProtocolError(f"its {PROJECT} has more than {MAX_BYTES} bytes")
        project = tomllib.loads(text.decode())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ProtocolError(f"it cannot be read: {error}") from error
    _require_ours(project)


def _is_metadata(name: str) -> bool:
    """Of Flower's own: digests of the files, which it checks and removes."""
    return name in (METADATA, f"{METADATA}CONTENT")


def _require_ours(project: dict[str, Any]) -> None:
    try:
        app = project["tool"]["flwr"]["app"]["components"]["clientapp"]
        needs = project["project"].get("dependencies", [])
    except (KeyError, TypeError, AttributeError) as error:
        raise ProtocolError("it names no app") from error
    if app != APP:
        raise ProtocolError(f"it names {str(app)[:100]!r}, and this farm runs {APP!r} alone")
    if needs:
        raise ProtocolError(f"it needs {str(needs)[:100]}, and a farm installs nothing for a run")


def guarded(install: Install) -> Install:
    """Flower's way to unpack a bundle, behind ours to look at it."""

    def install_if_it_has_no_code(content: bytes, *arguments: object, **named: object) -> Path:
        try:
            require_no_code(content)
            folder = install(content, *arguments, **named)
            # an older release may have unpacked another bundle there
            for path in folder.rglob("*"):
                if path != folder / PROJECT:
                    raise ProtocolError(f"'{folder}' holds {path.name!r}; remove that folder")
        except ProtocolError as error:
            log.error("refused the bundle of a run, and ran nothing of it: %s", error)
            raise
        return folder

    return install_if_it_has_no_code
