"""A hub in a process of its own and a device that follows it, on drawn plants."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from common import backbone
from common.manifest import Manifest
from common.objects import sha256_of, trusted
from common.processes import wait_for_port
from common.spec import ModelSpec
from server.registry import STABLE, Registry
from tests.lab.device import Site
from tests.lab.hub import LOOK_SECONDS, LabHub
from tests.lab.network import SIDE, draw_folder
from tests.lab.versions import add_version, registry_in

OPTIONS = {"depth": 3, "embed_dim": 192, "num_heads": 4, "patch_size": 8}
"""1.4 million numbers: an update is some twenty chunks and is fitted in a second."""


@dataclass
class Network:
    """A registry, its hub, and one device."""

    site: Site
    hub: LabHub
    registry: Registry
    model: VisionTransformer
    spec: ModelSpec
    _generator: torch.Generator = field(default_factory=torch.Generator)

    @torch.no_grad()
    def publish(self) -> Manifest:
        """A version of which every tensor is a little different, and the channel names it."""
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=self._generator)
            parameter.add_(noise * 1e-6 * parameter.abs().mean())
        counter = add_version(self.registry, self.model, self.spec).counter
        self.registry.promote(STABLE, counter)
        time.sleep(10 * LOOK_SECONDS)
        return self.registry.manifest(counter)

    def serving_version(self) -> int | None:
        """What a new process would serve with; every tensor was checked by its sha256."""
        bundle = self.site.serving().current()
        return None if bundle is None else bundle.about.manifest.counter

    def held(self, manifest: Manifest) -> int:
        """Bytes of a version that the device will not fetch again."""
        objects, total = self.site.serving().objects, 0
        for digest, size in manifest.objects.items():
            held = objects.lacking({digest: size}).get(digest, size)
            part = objects.path(digest).with_name(f"{digest}.part")
            whole = objects.has(digest) or (held == size and sha256_of(part) == digest)
            total += size if whole else trusted(max(1, held))
        return total


@contextmanager
def network(root: Path, seed: int) -> Iterator[Network]:
    """A network whose first version is published; the hub ends with the context."""
    torch.manual_seed(seed)
    spec = backbone.dense_spec("vit_tiny_patch16_224", SIDE, OPTIONS)
    model = backbone.build(spec)
    images = draw_folder(root / "images", 2, 12, 100)
    with registry_in(root / "server") as registry:
        add_version(registry, model, spec)
        registry.promote(STABLE, 1)
        hub = LabHub(root / "server")
        site = Site(root / "device", images, hub.address, hub.files(), registry.keys.text)
        site.root.mkdir()
        child = os.fork()  # before this process has used gRPC, which does not survive a fork
        if child == 0:
            with hub.running():
                signal.pause()
            os._exit(0)
        try:
            host, _, port = hub.address.partition(":")
            wait_for_port(host, int(port), 30)
            yield Network(site, hub, registry, model, spec)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
