"""What a device serves with, as its disk says it: without tensors, so without torch.

client/serving.py describes the files, and writes them.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, ValidationError

from common.manifest import Manifest
from common.messages import Digest, Ratio
from common.signing import Document
from common.tensors import header_of

log = logging.getLogger(__name__)

BundleId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class About(Document):
    """What belongs to a classifier. ``threshold``: below it the device is not sure."""

    digest: Digest = Field(description="of the manifest")
    manifest: Manifest
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    threshold: Ratio
    accuracy: Ratio
    f1: Ratio
    committed: AwareDatetime


class Named(Document):
    """What serving.json says."""

    current: BundleId | None = None
    previous: BundleId | None = None
    rejected: dict[Digest, str] = Field(default_factory=dict)


class Served:
    """The bundles of a device, to be looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def file(self) -> Path:
        """Where it is said what is in use."""
        return self.folder / "serving.json"

    @property
    def stamp(self) -> tuple[int, int, int] | None:
        """Another one whenever that file is another; None: there is none."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    @property
    def current_id(self) -> str | None:
        """The name of the bundle in use; None: there is none yet."""
        return self._named().current

    def about(self) -> About | None:
        """What the bundle in use says of itself."""
        name = self._named().current
        return None if name is None else self._about(name)

    def rejected(self, digest: str) -> str | None:
        """Why a version was rejected here, or None when it was not."""
        return self._named().rejected.get(digest)

    def known(self, digest: str, version: int) -> str | None:
        """What to say of a version that this device has decided on already; None: it has not."""
        about = self.about()
        if about is not None and about.digest == digest:
            return f"version {version} is in use"
        reason = self.rejected(digest)
        return None if reason is None else f"version {version} stays out: {reason}"

    def _named(self) -> Named:
        try:
            return Named.model_validate_json(self.file.read_bytes())
        except FileNotFoundError:
            return Named()
        except (OSError, ValidationError) as error:
            newest = next((p.stem for p in sorted(self._bundles(), key=age)), None)
            log.warning("'%s' is damaged (%s); bundle %s is used", self.file, error, newest)
            return Named(current=newest)

    def _bundles(self) -> list[Path]:
        return list((self.folder / "bundles").glob("*.safetensors"))

    def _read(self, name: str) -> bytes | None:
        path = self.folder / "bundles" / f"{name}.safetensors"
        try:
            body = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(body).hexdigest()[:32] == name:
            return body
        log.warning("'%s' is damaged and counts as absent", path)
        return None

    def _about(self, name: str) -> About | None:
        body = self._read(name)
        return None if body is None else about_of(body)


def about_of(body: bytes) -> About | None:
    """What a bundle says of itself, or None when it says nothing that can be read."""
    try:
        header, _ = header_of(body)
        return About.model_validate_json(header["__metadata__"]["about"])
    except (ValidationError, ValueError, KeyError, TypeError, json.JSONDecodeError):
        return None


def age(path: Path) -> float:
    """To sort files by: newest first."""
    return -path.stat().st_mtime
