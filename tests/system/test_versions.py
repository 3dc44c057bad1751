"""Versions on their way to a farm of real photographs: real processes, our commands alone.

A worse version stays out, a better one comes in, and one that turns bad on what is photographed
later goes again. What makes a version worse is noise on its weights.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from client.labels import Labels
from client.serving import Serving
from client.shadow import MAX_DROP, Judged, judge, try_out
from client.updater import LEAST_LABELS, WINDOW, turned_bad
from common import backbone, fit
from common.images import FarmFolder, Part, open_folder
from common.processes import free_port, stop_all, wait_for_port
from common.spec import ModelSpec
from server.registry import STABLE, Registry
from tests.lab.versions import add_version
from tests.system.site import call, command, start, tell, toml

pytestmark = [pytest.mark.processes, pytest.mark.system, pytest.mark.timeout(900)]

NAME, SIDE, PER_CLASS = "vit_small_patch14_dinov2", 112, 10


class Place:
    """A server whose hub listens, and the farm 'apple'."""

    def __init__(self, root: Path, photographs: Path, weights: Path) -> None:
        self.root, self.server, self.farm = root, root / "server", root / "farms" / "apple"
        self.photographs = photographs / "farms" / "apple"
        images = root / "photos"
        shutil.copytree(self.photographs / "train", images, copy_function=shutil.copyfile)
        for folder in [images, *images.iterdir()]:
            folder.chmod(0o755)
        self.hub_port, port = free_port(), free_port()
        flags = ("--weights", str(weights), "--port", str(port), "--name", "valley")
        call("fieldfed-server", "init", str(self.server), *flags)
        settings = self.server / "server.toml"
        hub = {"hub": {"port": self.hub_port, "names": ["localhost"]}}
        settings.write_text(settings.read_text() + toml(hub))
        flags = ("--data", str(images), "--per-class", str(PER_CLASS), "--threads", "2")
        call("fieldfed-client", "init", str(self.farm), *flags)
        self.images = images

    def join(self) -> None:
        """By files, as an operator and a farmer do it."""
        request, member = self.root / "apple.csr", self.root / "apple.member"
        call("fieldfed-client", "request", str(self.farm), "--out", str(request))
        call("fieldfed-server", "certify", str(self.server), str(request), "--out", str(member))
        said = call("fieldfed-client", "join", str(self.farm), str(member))
        assert f"member of network valley, models come from localhost:{self.hub_port}" in said

    def publish(self, model: VisionTransformer, spec: ModelSpec) -> int:
        """A version, and the channel names it."""
        with Registry.open(self.server) as registry:
            version = add_version(registry, model, spec).counter
        call("fieldfed-server", "registry", "promote", str(self.server), str(version), STABLE)
        return version

    def update(self) -> str:
        """The farm looks once."""
        return call("fieldfed-client", "update", str(self.farm))

    def version(self) -> int:
        """What the farm serves with."""
        said = call("fieldfed-client", "serving", str(self.farm), "--json")
        return int(json.loads(said)["version"])

    def folder(self) -> FarmFolder:
        """The farm's images."""
        return open_folder(self.images, per_class=PER_CLASS)

    def outcomes(self, version: int) -> list[str]:
        """What the hub heard."""
        with Registry.open(self.server) as registry:
            return [row.outcome for row in registry.rows.installs(version)]


@pytest.fixture
def place(tmp_path: Path, photographs: Path, plant_weights: Path) -> Iterator[Place]:
    made = Place(tmp_path, photographs, plant_weights)
    with ExitStack() as stack:
        children = [start("up", command("fieldfed-server", "up", str(made.server)), tmp_path)]
        stack.callback(lambda: tell(children))
        stack.callback(lambda: stop_all(children, 15))
        wait_for_port("127.0.0.1", made.hub_port, 90, children[0])
        yield made


def noisy(model: VisionTransformer, spec: ModelSpec, level: float) -> VisionTransformer:
    """The same with noise on its weights, relative to their spread."""
    copy, draw = backbone.build(spec), torch.Generator().manual_seed(0)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn(weight.shape, generator=draw) * level * weight.std())
    return copy


def in_the_field(place: Place) -> Part:
    """Photographs that the farm has never had: those that are labelled later."""
    classes = place.folder().classes
    chosen = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((place.photographs / "test" / name).iterdir())[: WINDOW // len(classes)]
    ]
    labels = torch.tensor([label for _, label in chosen]).numpy()
    return Part(tuple(path for path, _ in chosen), labels)


def hidden_fault(place: Place, model: VisionTransformer, spec: ModelSpec) -> VisionTransformer:
    """A version that the farm's few decide images pass, and photographs of later do not."""
    folder, field = place.folder(), in_the_field(place)
    good = try_out(model, spec, folder)

    def later(candidate: VisionTransformer, classifier: torch.nn.Linear) -> Judged:
        found = fit.evaluate(classifier, *fit.extract(candidate, field, spec))
        return Judged(found.accuracy, found.f1)

    reference = later(model, good.classifier)
    for level in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
        candidate = noisy(model, spec, level)
        trial = try_out(candidate, spec, folder)
        passes = trial.judged.f1 >= good.judged.f1 - MAX_DROP
        if passes and turned_bad(reference, later(candidate, trial.classifier), len(field)):
            return candidate
    pytest.fail("no level of noise passes the decide part and fails later")


def test_worse_stays_out_better_comes_in_bad_goes_again(place: Place, plant_weights: Path) -> None:
    place.join()
    spec = backbone.dense_spec(NAME, SIDE)
    model = backbone.load_pretrained(spec, str(plant_weights))
    poor = noisy(model, spec, 0.7)

    assert place.publish(poor, spec) == 1
    assert "version 1 is in use" in place.update()

    assert place.publish(model, spec) == 2
    assert "version 2 is in use" in place.update()  # a better one

    assert place.publish(noisy(model, spec, 0.65), spec) == 3
    said = place.update()  # a worse one
    assert "macro-F1" in said
    assert place.version() == 2
    assert "version 3 stays out" in place.update()

    assert place.publish(hidden_fault(place, model, spec), spec) == 4
    assert "version 4 is in use" in place.update()
    field = in_the_field(place)
    classes = place.folder().classes
    labelled = 0
    # in the order in which a person walks past: one of each class after the other
    for index in torch.randperm(len(field), generator=torch.Generator().manual_seed(0)).tolist():
        name = classes[int(field.labels[index])]
        call("fieldfed-client", "label", str(place.farm), str(field.paths[index]), name)
        labelled += 1
        if labelled >= LEAST_LABELS and labelled % 4 == 0:
            said = place.update()
            if "is in use again" in said:
                break
    assert "version 2 is in use again" in said
    assert labelled <= WINDOW
    assert place.version() == 2
    assert place.outcomes(4) == ["committed", "rolled_back"]
    assert place.outcomes(3) == ["rejected"]

    serving = Serving(place.farm / "state" / "serving")
    bundle = serving.current()
    assert bundle is not None
    part, known = Labels(place.farm / "state" / "labels.jsonl", place.images).since(
        bundle.about.committed, WINDOW
    )
    assert judge(bundle, part, known).f1 > 0.5
