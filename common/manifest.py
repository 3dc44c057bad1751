"""Versions of the model as a network publishes them: manifests, and channels that name them.

A manifest never changes: which tensors make up the backbone, by content, and where it came from. A
channel (``stable``, ``canary``) names one manifest and does change. Both are signed
(common/signing.py). Their counters only ever rise, so nobody can show a device an older state; a
channel has to be signed again before it expires, so nobody can hold a device at an old state
either. Going back to an earlier version is a newer channel document that names it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from common.errors import RefusalError, RefuseReason
from common.messages import Digest, FarmName, Ratio
from common.signing import Document, KeySet, NetworkName, parsed, read, verified
from common.spec import ModelSpec

Counter53 = Annotated[int, Field(ge=1, lt=2**53)]
ChannelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,19}$")]
ITEM_BYTES = {"F16": 2, "F32": 4}


class Tensor(Document):
    """One tensor: raw little-endian numbers in C order, found by their sha256."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
    dtype: Literal["F16", "F32"]
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=2**31)], ...], Field(max_length=8)]
    digest: Digest

    @property
    def bytes(self) -> int:
        """Length of the numbers."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class File(Document):
    """Another form of the backbone, found by its sha256."""

    kind: Literal["onnx-fp32", "onnx-int8"]
    digest: Digest
    bytes: Annotated[int, Field(ge=1, le=2**40)]


Outcome = Literal["committed", "rejected", "refused", "rolled_back"]
"""Of a version on a device: in use, not better, not taken, or in use and then no longer."""


class InstallReport(Document):
    """What became of a version on a device."""

    device: FarmName
    version: Counter53
    outcome: Outcome
    detail: Annotated[str, Field(max_length=500)] = ""
    accuracy_before: Ratio | None = None
    accuracy_after: Ratio | None = None


class FarmResult(Document):
    """What a farm found on its own images."""

    part: Literal["decide", "test"]
    accuracy: Ratio
    f1: Ratio
    examples: Annotated[int, Field(ge=1)]


class Manifest(Document):
    """A version. ``parent`` is the digest of the manifest that it came after."""

    format: Literal[1] = 1
    network: NetworkName
    counter: Counter53
    parent: Digest | None
    backbone: Digest = Field(description="identity of the candidate (common.backbone.digest)")
    spec: ModelSpec
    mask: Digest
    run: Annotated[int, Field(ge=0)]
    round: Annotated[int, Field(ge=0)]
    macs: Annotated[int, Field(ge=1)]
    params: Annotated[int, Field(ge=1)]
    farms: dict[FarmName, FarmResult]
    code: Annotated[str, Field(max_length=100)]
    created: AwareDatetime
    expires: AwareDatetime
    tensors: Annotated[tuple[Tensor, ...], Field(min_length=1, max_length=10_000)]
    files: Annotated[tuple[File, ...], Field(max_length=8)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        for what, names in (
            ("tensor", [one.name for one in self.tensors]),
            ("file", [one.kind for one in self.files]),
        ):
            name, count = Counter(names).most_common(1)[0] if names else ("", 1)
            if count > 1:
                raise ValueError(f"{what} '{name}' is named {count} times")
        sizes: dict[str, int] = {}
        for digest, size in self._parts():
            if sizes.setdefault(digest, size) != size:
                raise ValueError(f"object {digest[:12]} has two lengths")
        if self.expires <= self.created:
            raise ValueError("it expires before it was made")
        return self

    @property
    def objects(self) -> Mapping[str, int]:
        """Length in bytes of everything that it names, by digest."""
        return dict(self._parts())

    @property
    def weights(self) -> Mapping[str, int]:
        """Of those the ones that the safetensors form needs."""
        return {one.digest: one.bytes for one in self.tensors}

    def _parts(self) -> list[tuple[str, int]]:
        tensors = [(one.digest, one.bytes) for one in self.tensors]
        return tensors + [(one.digest, one.bytes) for one in self.files]

    def require(self, network: str, now: datetime) -> None:
        """Refuse a manifest of another network, or one that has expired.

        Raises:
            RefusalError: says which.
        """
        _require(f"version {self.counter}", self.network, self.expires, network, now)


class Channel(Document):
    """What a channel names. ``counter`` rises with every change and every renewal."""

    format: Literal[1] = 1
    network: NetworkName
    name: ChannelName
    counter: Counter53
    version: Counter53
    manifest: Digest
    issued: AwareDatetime
    expires: AwareDatetime

    def require(self, network: str, name: str, seen: int, now: datetime) -> None:
        """Refuse a channel of another name or network, an expired one, or an older one.

        Args:
            network: that the device belongs to.
            name: of the channel that was asked for.
            seen: the highest counter of this channel that the device knows.
            now: the device's time.

        Raises:
            RefusalError: says which.
        """
        if self.name != name:
            raise RefusalError(
                f"asked for channel '{name}', shown channel '{self.name}'", RefuseReason.FOREIGN
            )
        _require(f"channel '{name}'", self.network, self.expires, network, now)
        if self.counter < seen:
            raise RefusalError(
                f"channel '{name}' is shown as it was at number {self.counter}, but this device "
                f"has seen number {seen}: somebody shows it an old state of the server",
                RefuseReason.OLDER,
            )


def _require(what: str, network: str, expires: datetime, expected: str, now: datetime) -> None:
    if network != expected:
        raise RefusalError(
            f"{what} belongs to network '{network}', this device to '{expected}'",
            RefuseReason.FOREIGN,
        )
    if now >= expires:
        raise RefusalError(
            f"{what} has expired on {expires:%Y-%m-%d}; this device's date is {now:%Y-%m-%d}: set "
            "its clock if that is wrong, else the server has to sign it again",
            RefuseReason.EXPIRED,
        )


def read_manifest(text: str, keys: KeySet, now: datetime) -> tuple[str, Manifest]:
    """A signed manifest and its digest; raises RefusalError as ``signing.read`` does."""
    body = verified("manifest", text, keys, now)
    return digest_of(body), parsed(Manifest, body, "manifest")


def read_channel(text: str, keys: KeySet, now: datetime) -> Channel:
    """A signed channel; raises RefusalError as ``signing.read`` does."""
    return read(Channel, "channel", text, keys, now)


def digest_of(body: str) -> str:
    """Identity of a manifest: sha256 of its body."""
    return hashlib.sha256(body.encode()).hexdigest()
