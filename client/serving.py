"""What a device serves with, on its disk: bundles, and one small file that names the one in use.

    serving/serving.json               what is in use, what was before it, what is never tried again
    serving/bundles/ID.safetensors     a classifier with everything that belongs to it
    serving/objects/                   tensors of the backbones, by content (common/objects.py)

A bundle is a backbone by its signed manifest, the farm's classifier for it, temperature, threshold
and class names: one file, its name the sha256 of its bytes, so they can never be mixed up. A bundle
is in use from the moment that serving.json names it. Should that file be damaged, the newest bundle
that is whole is used.
"""

import hashlib
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from client.served import About, Named, Served, about_of, age
from common.assembly import assemble
from common.errors import RefusalError, StateError
from common.files import write_atomically
from common.objects import Objects

log = logging.getLogger(__name__)


class Bundle:
    """A backbone and a classifier in memory, ready to be used."""

    def __init__(self, about: About, model: VisionTransformer, classifier: nn.Linear) -> None:
        self.about, self.model, self.classifier = about, model, classifier


class Serving(Served):
    """The bundles of a device. One process at a time changes them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.objects = Objects(folder / "objects")

    # --- what is in use ----------------------------------------------------------------------

    def current(self) -> Bundle | None:
        """The bundle in use; when it is damaged the one before it, or any that is whole."""
        named = self._named()
        others = [path.stem for path in sorted(self._bundles(), key=age)]
        for name in dict.fromkeys([named.current, named.previous, *others]):
            bundle = None if name is None else self._load(name)
            if bundle is not None:
                return bundle
        return None

    def in_use(self) -> Bundle:
        """The bundle in use.

        Raises:
            StateError: there is none yet.
        """
        bundle = self.current()
        if bundle is None:
            raise StateError("no version is in use; get one with: fieldfed-client update")
        return bundle

    def previous(self) -> Bundle | None:
        """The bundle that was in use before, or None when it is absent or damaged."""
        name = self._named().previous
        return None if name is None else self._load(name)

    def commit(self, about: About, classifier: nn.Linear) -> None:
        """Put a bundle in use; the one before it stays, for the way back.

        Raises:
            DiskError: the disk is full; what was in use stays in use.
        """
        name = self._save(about, classifier)
        named, now = self._named(), self.about()
        # put in use again, because it was damaged: the way back leads where it led
        again = now is not None and now.digest == about.digest
        before = named.previous if again else named.current
        self._name(named.model_copy(update={"current": name, "previous": before}))
        self.tidy()

    def roll_back(self, reason: str) -> About | None:
        """Put the bundle before in use again, and never try the present one again.

        Returns:
            What is in use now; None, and nothing has changed, when there is none to go back to.
        """
        named = self._named()
        now = None if named.current is None else self._about(named.current)
        before = None if named.previous is None else self._load(named.previous)
        if before is None or now is None:
            return None
        rejected = named.rejected | {now.digest: reason[:500]}
        self._name(Named(current=named.previous, previous=None, rejected=rejected))
        self.tidy()
        return before.about

    # --- what is never tried again -----------------------------------------------------------

    def reject(self, digest: str, reason: str) -> None:
        """Never try this version again."""
        named = self._named()
        rejected = named.rejected | {digest: reason[:500]}
        self._name(named.model_copy(update={"rejected": rejected}))
        self.tidy()

    def tidy(self) -> None:
        """Remove bundles and objects that neither the present nor the one before needs."""
        named = self._named()
        kept = {name for name in (named.current, named.previous) if name is not None}
        wanted: set[str] = set()
        for name in kept:
            about = self._about(name)
            wanted |= set(about.manifest.objects) if about is not None else set()
        if not kept:
            return
        for path in self._bundles():
            if path.stem not in kept:
                path.unlink(missing_ok=True)
        self.objects.keep_only(wanted)

    # --- on disk -----------------------------------------------------------------------------

    def _name(self, named: Named) -> None:
        write_atomically(self.file, named.model_dump_json().encode())

    def _save(self, about: About, classifier: nn.Linear) -> str:
        tensors = {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()}
        body = save_tensors(tensors, metadata={"about": about.model_dump_json()})
        name = hashlib.sha256(body).hexdigest()[:32]
        write_atomically(self.folder / "bundles" / f"{name}.safetensors", body)
        return name

    def _load(self, name: str) -> Bundle | None:
        body = self._read(name)
        about = None if body is None else about_of(body)
        if body is None or about is None:
            return None
        try:
            tensors = load_tensors(body)
            model = assemble(about.manifest, self.objects)
            classifier = nn.Linear(about.manifest.spec.width, len(about.classes))
            classifier.load_state_dict(tensors)
        except (RefusalError, SafetensorError, RuntimeError) as error:
            log.warning("bundle %s cannot be used: %s", name[:12], error)
            return None
        return Bundle(about, model, classifier.requires_grad_(False))
