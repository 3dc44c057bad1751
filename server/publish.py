"""A candidate becomes a version: what a run has come to, with what farms found on it.

A version that is published is complete: its objects are on disk before its manifest is. A crash in
between leaves objects that nothing names, which :meth:`Registry.collect` removes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor as Numbers

from common import backbone, export
from common.assembly import assemble
from common.errors import ConfigError, RefusalError, StateError
from common.files import write_atomically
from common.manifest import FarmResult, File, Manifest, Tensor, digest_of
from common.objects import Objects
from common.runtime import Runtime
from common.spec import ModelSpec, spec_of_text
from server.models import Models
from server.provenance import commit
from server.registry import Registry
from server.rows import GUARD, RunRow
from server.store import Store
from server.versions import VersionRow

log = logging.getLogger(__name__)

VERSION_DAYS = 730.0


@dataclass(frozen=True)
class Origin:
    """Where a backbone came from, and what farms found on their decide parts (or test parts)."""

    run: int
    round: int
    mask: str
    farms: Mapping[str, FarmResult]


def publish_run(registry: Registry, store: Store, models: Models, run: RunRow) -> VersionRow:
    """Make a version of what a run has come to.

    Raises:
        ConfigError: the run has not ended, or no farm has evaluated what it ended with.
    """
    last = store.last_committed(run.run)
    if last is None or run.state != "done":
        raise ConfigError(
            f"run {run.run} has not ended (it is {run.state}), so there is nothing to publish; "
            "see: fieldfed-server status"
        )
    number, candidate = last
    if not isinstance(spec_of_text(candidate.spec_json), ModelSpec):
        raise ConfigError(
            f"run {run.run} has taught a student, and versions are of backbones: farms have it "
            "already ('fieldfed-client student'), and 'fieldfed-server student' writes it as files"
        )
    farms = results(store, run, candidate.digest)
    if not farms:
        raise ConfigError(f"no farm has evaluated what run {run.run} ended with; run it again")
    model, spec = models.view(candidate.digest)
    row = publish(registry, model, spec, Origin(run.run, number, candidate.mask, farms))
    log.info("run %d is version %d", run.run, row.counter)
    return row


def results(store: Store, run: RunRow, digest: str) -> Mapping[str, FarmResult]:
    """What farms found on a candidate: on their decide parts where the guard asked, else on test.

    Nothing is decided by these figures: a device tries a version on its own images.
    """
    reports = [row for row in store.reports(run.run) if row.base == digest]
    part: Literal["decide", "test"] = "decide"
    judged = [row for row in reports if row.label == GUARD]
    if not judged:
        judged, part = [row for row in reports if row.label == run.message], "test"
    return {
        row.farm: FarmResult(part=part, accuracy=row.accuracy, f1=row.f1, examples=row.examples)
        for row in judged
    }


def publish(
    registry: Registry, model: VisionTransformer, spec: ModelSpec, origin: Origin
) -> VersionRow:
    """Make a version of a backbone; the newest one, when it is of this backbone already.

    Raises:
        DiskError: the disk is full; nothing was published.
        ModelError: the backbone cannot be written as ONNX, or does something else there.
    """
    identity, now = backbone.digest(model, spec), datetime.now(UTC)
    with registry.changing() as versions:
        last = versions.versions()[-1:]
        if last and last[0].backbone == identity:
            return last[0]
        tensors = tuple(
            _keep(registry.objects, name, numbers)
            for name, numbers in sorted(backbone.stored_tensors(model).items())
        )
        form = _keep_onnx(registry.objects, model, spec, tensors)

        def make(counter: int) -> VersionRow:
            manifest = Manifest(
                network=registry.network,
                counter=counter,
                parent=last[0].digest if last else None,
                backbone=identity,
                spec=spec,
                mask=origin.mask,
                run=origin.run,
                round=origin.round,
                macs=backbone.macs(spec),
                params=backbone.parameters(model),
                farms=dict(origin.farms),
                code=commit()[:100],
                created=now,
                expires=now + timedelta(days=VERSION_DAYS),
                tensors=tensors,
                files=(form,),
            )
            document = registry.keys.sign("manifest", manifest)
            digest = digest_of(manifest.model_dump_json())
            return VersionRow(counter, digest, identity, document, now.timestamp(), None)

        return versions.add(make)


def _keep(objects: Objects, name: str, numbers: Numbers) -> Tensor:
    dtype: Literal["F16", "F32"] = "F32" if numbers.dtype == torch.float32 else "F16"
    digest = objects.add(numbers.contiguous().numpy().tobytes())
    return Tensor(name=name, dtype=dtype, shape=tuple(numbers.shape), digest=digest)


def _keep_onnx(
    objects: Objects, model: VisionTransformer, spec: ModelSpec, tensors: tuple[Tensor, ...]
) -> File:
    graph = export.graph_of(model, spec, tensors)
    export.require_parity(model, spec.image_size, Runtime(graph, objects.folder))
    return File(kind="onnx-fp32", digest=objects.add(graph), bytes=len(graph))


def load(registry: Registry, counter: int) -> tuple[VisionTransformer, ModelSpec]:
    """The backbone of a version.

    Raises:
        ConfigError: there is no such version.
        StateError: an object is missing or damaged.
    """
    manifest = registry.manifest(counter)
    try:
        return assemble(manifest, registry.objects), manifest.spec
    except RefusalError as error:
        raise StateError(f"version {counter}: {error}; restore it from a backup") from error


def write_files(registry: Registry, counter: int, folder: Path) -> None:
    """Write a version as files that need no registry: the model, also as ONNX, manifest and keys.

    Raises:
        ConfigError, StateError: as :func:`load` does.
    """
    model, spec = load(registry, counter)
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save_backbone(folder / "model.safetensors", model, spec)
    for file in registry.manifest(counter).files:
        graph = registry.objects.load(file.digest, file.bytes)
        body = export.whole(graph, registry.objects.folder)
        write_atomically(folder / f"model-{file.kind.removeprefix('onnx-')}.onnx", body)
    write_atomically(folder / "manifest.json", registry.row(counter).document.encode())
    write_atomically(folder / "keys.json", registry.keys.text.encode())
