"""The updater: what is worse stays out, what is better comes in, what turns bad goes again."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from client import updater as module
from client.hub import HubClient
from client.labels import Labels
from client.ledger import FILE, Ledger
from client.serving import Serving
from client.shadow import Judged, best_temperature, sure_from, try_out
from client.trust import Trust
from client.updater import Updater, compared, turned_bad
from common import backbone
from common.errors import DataError, DiskError, LinkError, RefusalError
from common.images import FarmFolder, open_folder
from common.spec import ModelSpec
from server.pretrain import pretrain
from server.registry import STABLE, Registry
from tests.lab.hub import LabHub
from tests.lab.network import draw_folder, server_config
from tests.lab.versions import NETWORK, add_version, registry_in

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionTransformer, ModelSpec]:
    """A tiny backbone that can tell stripes apart."""
    root = tmp_path_factory.mktemp("pretrained")
    config = server_config(root)
    trained = config.backbone.model_copy(update={"epochs": 6})
    pretrain(config.model_copy(update={"backbone": trained}), root)
    return backbone.load_backbone(root / "base.safetensors")


def blind(model: VisionTransformer, spec: ModelSpec, seed: int = 0) -> VisionTransformer:
    """The same, but every image looks alike to it."""
    copy = backbone.build(spec)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.patch_embed.proj.weight.mul_(1e-7)
        copy.patch_embed.proj.bias.add_(seed / 1000)
    return copy


def nudge(model: VisionTransformer) -> None:
    """Change one small tensor, and with it hardly any answer."""
    model.get_parameter("norm.bias").add_(1e-4)


class Farm:
    """A farm's device beside a hub that listens."""

    def __init__(self, root: Path, registry: Registry, hub: LabHub) -> None:
        self.root, self.registry, self.hub = root, registry, hub
        self.images = draw_folder(root / "images", 3, 40, 100)
        self.now = NOW
        self.serving = Serving(root / "serving")
        self.labels = Labels(root / "labels.jsonl", self.images)

    def folder(self) -> FarmFolder:
        return open_folder(self.images)

    def updater(self, channel: str = STABLE) -> Updater:
        """As a new process finds it."""
        return Updater(
            device="pi-1",
            channel=channel,
            folder=self.folder,
            serving=Serving(self.root / "serving"),
            trust=Trust(self.root / "trust.json", self.registry.keys.text, self.now),
            labels=self.labels,
            clock=lambda: self.now,
        )

    def publish(self, model: VisionTransformer, spec: ModelSpec) -> int:
        """Publish, and let the channel name it; the hub hears of it before this returns."""
        version = add_version(self.registry, model, spec).counter
        self.promote(version)
        return version

    def promote(self, version: int) -> None:
        counter = self.registry.promote(STABLE, version).counter
        with self.hub.client() as client:
            next(client.watch(STABLE, counter - 1))

    def update(self) -> module.Done:
        with self.hub.client() as client:
            return self.updater().update(client)

    @property
    def version(self) -> int | None:
        bundle = Serving(self.root / "serving").current()
        return None if bundle is None else bundle.about.manifest.counter


@pytest.fixture
def farm(tmp_path: Path, good: tuple[VisionTransformer, ModelSpec]) -> Iterator[Farm]:
    with registry_in(tmp_path / "server") as registry:
        add_version(registry, *good)
        registry.promote(STABLE, 1)
        with LabHub(tmp_path / "server").running() as hub:
            yield Farm(tmp_path / "farm", registry, hub)


# --- what comes in and what stays out --------------------------------------------------------


def test_what_is_said_to_the_hub_is_in_the_ledger(farm: Farm, tmp_path: Path) -> None:
    client = HubClient(
        farm.hub.address, farm.hub.files(), seed=0, ledger=Ledger.open(tmp_path / FILE)
    )
    with client as hub:
        assert farm.updater().update(hub).outcome == "committed"
        assert farm.updater().update(hub).outcome is None
    objects = len(farm.registry.manifest(1).weights)
    with Ledger.open(tmp_path / FILE) as ledger:
        report, asked = ledger.totals()
    assert {report.destination, asked.destination} == {f"hub {farm.hub.address}"}
    assert (report.kind, report.messages) == ("install report", 1)
    assert 20 < report.bytes < 200
    assert (asked.kind, asked.messages) == ("request", 3), "the channel, objects, the channel"
    assert 64 * objects < asked.bytes < 80 * objects + 100


def test_the_first_version_is_put_in_use(farm: Farm) -> None:
    done = farm.update()
    assert (done.outcome, done.version, farm.version) == ("committed", 1, 1)
    bundle = farm.serving.current()
    assert bundle is not None
    assert bundle.about.classes == ("class0", "class1", "class2")
    assert bundle.about.f1 > 0.6
    assert 0 < bundle.about.threshold <= 1
    (report,) = farm.registry.rows.installs(1)
    assert (report.device, report.outcome) == ("pi-1", "committed")
    assert report.accuracy_after == bundle.about.accuracy
    assert farm.update().outcome is None  # nothing new


def test_a_worse_version_stays_out_and_is_never_tried_again(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    farm.update()
    farm.publish(blind(*good), good[1])
    done = farm.update()
    assert (done.outcome, farm.version) == ("rejected", 1)
    assert "on this farm's images" in done.words
    again = farm.update()
    assert again.outcome is None
    assert again.words.startswith("version 2 stays out: macro-F1")
    assert [one.outcome for one in farm.registry.rows.installs(2)] == ["rejected"]
    # and what was fetched for it is gone
    kept = farm.serving.current()
    assert kept is not None
    wanted = set(kept.about.manifest.weights)
    assert {path.name for path in (farm.root / "serving" / "objects").glob("??/*")} == wanted


def test_a_better_version_takes_over_from_a_bad_one(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    farm.publish(blind(*good), good[1])
    assert farm.update().version == 2
    farm.promote(1)
    done = farm.update()
    assert (done.outcome, farm.version) == ("committed", 1)
    assert done.before is not None
    assert done.after is not None
    assert done.after.f1 > done.before.f1 + 0.2


def test_what_changed_is_all_that_is_fetched(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    farm.update()
    model, spec = good
    near = backbone.build(spec)
    near.load_state_dict(model.state_dict())
    with torch.no_grad():
        nudge(near)
    farm.publish(near, spec)
    done = farm.update()
    assert done.outcome == "committed"
    assert done.fetched is not None
    assert done.fetched.bytes == 4 * spec.width


def test_an_older_state_of_the_server_is_refused(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    farm.update()
    old = farm.registry.named(STABLE)
    farm.publish(blind(*good), good[1])
    farm.update()
    trust = Trust(farm.root / "trust.json", farm.registry.keys.text, NOW)
    with pytest.raises(RefusalError, match="somebody shows it an old state"):
        trust.accept(
            farm.registry.keys.text, old.document, farm.registry.row(1).document, STABLE, NOW
        )
    # but an operator may go back: that is a newer state
    farm.registry.roll_back(STABLE)
    farm.promote(1)
    assert farm.update().outcome in ("committed", None)


def test_a_manifest_that_the_channel_does_not_name(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    other = add_version(farm.registry, blind(*good), good[1])
    trust = Trust(farm.root / "trust.json", farm.registry.keys.text, NOW)
    channel = farm.registry.named(STABLE).document
    with pytest.raises(RefusalError, match="names version 1, but version 2 came with it"):
        trust.accept(farm.registry.keys.text, channel, other.document, STABLE, NOW)


def test_a_clock_that_is_ahead_refuses_and_says_what_to_do(farm: Farm) -> None:
    farm.now = NOW + timedelta(days=200)
    done = farm.update()
    assert done.outcome == "refused"
    assert "set its clock if that is wrong" in done.words
    assert farm.version is None
    farm.now = NOW
    assert farm.update().outcome == "committed"


def test_a_machine_without_memory_refuses_before_it_fetches(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Small)
    done = farm.update()
    assert done.outcome == "refused"
    assert "needs a smaller version" in done.words
    assert not list((farm.root / "serving").glob("objects/??/*"))
    (report,) = farm.registry.rows.installs(1)
    assert report.outcome == "refused"


# --- the way back ----------------------------------------------------------------------------


def shots(farm: Farm, count: int) -> list[tuple[Path, str]]:
    """New images of the farm's classes."""
    drawn = draw_folder(farm.root / "new", 3, count, 100)
    return [(path, path.parent.name) for path in sorted(drawn.glob("test/*/*.png"))]


def turn_bad(farm: Farm, good: tuple[VisionTransformer, ModelSpec]) -> None:
    """What is in use looked as good as before when it was tried, and is blind in the field."""
    farm.update()
    farm.publish(blind(*good), good[1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "compared", lambda _before, _after: None)
        assert farm.update().outcome == "committed"
    assert farm.version == 2


def test_a_version_that_turns_bad_is_given_up(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    turn_bad(farm, good)
    later = NOW + timedelta(hours=1)
    done = None
    for number, (image, name) in enumerate(shots(farm, 10), 1):
        farm.labels.add(image, name, now=later + timedelta(seconds=number))
        done = farm.updater().check()
        if done is not None:
            break
    assert number <= module.WINDOW
    assert done is not None
    assert (done.outcome, done.version, farm.version) == ("rolled_back", 2, 1)
    assert "on the last" in done.words
    assert farm.update().words.startswith("version 2 stays out")


def test_labels_of_before_are_no_reason(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    turn_bad(farm, good)
    for image, name in shots(farm, 10):
        farm.labels.add(image, name, now=NOW - timedelta(hours=1))
    assert farm.updater().check() is None


def test_a_good_version_stays(farm: Farm, good: tuple[VisionTransformer, ModelSpec]) -> None:
    farm.publish(blind(*good), good[1])
    farm.update()
    farm.promote(1)
    farm.update()
    for image, name in shots(farm, 10):
        farm.labels.add(image, name, now=NOW + timedelta(hours=1))
    assert farm.updater().check() is None
    assert farm.version == 1


def test_errors_in_inference_are_a_reason(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    turn_bad(farm, good)
    bundle = farm.serving.current()
    assert bundle is not None
    with farm.hub.client() as client:
        done = farm.updater().roll_back(bundle, "3 images in a row ended in an error", client)
    assert done is not None
    assert farm.version == 1
    assert [one.outcome for one in farm.registry.rows.installs(2)] == ["committed", "rolled_back"]


def test_there_is_no_way_back_from_the_first(farm: Farm) -> None:
    farm.update()
    bundle = farm.serving.current()
    assert bundle is not None
    assert farm.updater().check() is None
    assert farm.updater().roll_back(bundle, "bad") is None
    assert farm.version == 1


@pytest.mark.parametrize(
    ("before", "now", "images", "bad"),
    [
        (Judged(0.9, 0.9), Judged(0.5, 0.5), 20, True),
        (Judged(0.9, 0.9), Judged(0.8, 0.8), 10, False),  # one image
        (Judged(0.9, 0.9), Judged(0.89, 0.89), 200, False),
        (Judged(0.5, 0.5), Judged(0.9, 0.9), 20, False),
    ],
)
def test_when_a_version_is_bad(before: Judged, now: Judged, images: int, bad: bool) -> None:
    assert (turned_bad(before, now, images) is not None) is bad


def test_when_a_version_is_worse() -> None:
    assert compared(None, Judged(0.1, 0.1)) is None
    assert compared(Judged(0.9, 0.9), Judged(0.9, 0.885)) is None
    assert compared(Judged(0.9, 0.9), Judged(0.9, 0.87)) is not None


# --- damage ----------------------------------------------------------------------------------


def test_any_damaged_file_leaves_a_version_that_serves(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    turn_bad(farm, good)
    paths = [path for path in sorted((farm.root / "serving").rglob("*")) if path.is_file()]
    assert len(paths) > 20
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        copy = farm.root / "copy"
        shutil.copytree(farm.root / "serving", copy)
        bundle = Serving(copy).current()
        shared = path.parent.parent.name == "objects" and all(
            path.name in one.about.manifest.objects
            for one in (farm.serving.current(), farm.serving.previous())
            if one is not None
        )
        # a tensor that both share is fetched again; with any other file gone one of them is whole
        assert bundle is not None or shared, path
        shutil.rmtree(copy)
        path.write_bytes(whole)
        path.parent.mkdir(exist_ok=True)


def test_what_is_damaged_is_fetched_again(farm: Farm) -> None:
    farm.update()
    path = max((farm.root / "serving" / "objects").glob("??/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(b"x")
    assert farm.version is None
    done = farm.update()
    assert done.outcome == "committed"
    assert farm.version == 1
    assert done.fetched is not None
    assert 0 < done.fetched.bytes < 100_000


def test_damaged_beliefs_begin_with_the_membership(farm: Farm) -> None:
    farm.update()
    (farm.root / "trust.json").write_bytes(b"{")
    assert farm.update().outcome is None
    assert farm.version == 1


def test_a_full_disk_keeps_what_serves(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    farm.update()
    model, spec = good
    near = blind(model, spec)
    near.load_state_dict(model.state_dict())
    with torch.no_grad():
        nudge(near)
    farm.publish(near, spec)

    def full(*_: object, **__: object) -> None:
        raise DiskError("cannot write 'x': No space left on device; make room")

    with monkeypatch.context() as patched:
        patched.setattr("client.serving.write_atomically", full)
        with pytest.raises(DiskError):
            farm.update()
    assert farm.version == 1
    done = farm.update()
    assert done.outcome == "committed"
    assert done.fetched is not None
    assert done.fetched.bytes == 0  # it had come before


def test_the_hub_goes_before_the_report(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise LinkError("hub at 127.0.0.1:1: unavailable")

    with farm.hub.client() as client:
        monkeypatch.setattr(client, "report", gone)
        assert farm.updater().update(client).outcome == "committed"
    assert farm.version == 1


# --- labels from the field -------------------------------------------------------------------


def test_a_label_feeds_training(farm: Farm) -> None:
    image, name = shots_again(farm)
    before = farm.folder()
    copy = farm.labels.add(image, name)
    after = farm.folder()
    assert copy.parent.name == name
    total = len(before.fit) + len(before.decide)
    assert len(after.fit) + len(after.decide) == total + 1


def test_a_new_class_is_asked_for(farm: Farm, tmp_path: Path) -> None:
    image, _ = shots(farm, 5)[0]
    with pytest.raises(DataError, match="no class 'rust'; there are class0, class1, class2; --new"):
        farm.labels.add(image, "rust")
    farm.labels.add(image, "rust", new=True)
    assert "rust" in farm.labels.classes
    for wrong in ("../rust", "", ".rust", "a/b"):
        with pytest.raises(DataError):
            farm.labels.add(image, wrong, new=True)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        farm.labels.add(tmp_path / "text.jpg", "rust")


def test_a_class_gets_another_name(farm: Farm) -> None:
    farm.labels.rename("class0", "healthy")
    assert farm.labels.classes == ("class1", "class2", "healthy")
    for old, new in (("class0", "x"), ("class1", "class2"), ("class1", "../x")):
        with pytest.raises(DataError, match="cannot rename"):
            farm.labels.rename(old, new)


def test_a_cut_off_line_is_left_out(farm: Farm) -> None:
    for image, name in shots(farm, 5)[:2]:
        farm.labels.add(image, name)
    path = farm.root / "labels.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    part, _ = farm.labels.since(NOW - timedelta(days=1), 10)
    assert len(part) == 1
    farm.labels.add(*shots_again(farm))
    part, _ = farm.labels.since(NOW - timedelta(days=1), 10)
    assert len(part) == 2


def shots_again(farm: Farm) -> tuple[Path, str]:
    path = farm.root / "another.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path, "class1"


# --- calibration -----------------------------------------------------------------------------


def test_temperature_makes_confidence_honest() -> None:
    torch.manual_seed(0)
    truth = torch.randn(4000, 5)
    labels = torch.multinomial(truth.softmax(1), 1).squeeze(1)
    for scale in (0.2, 1.0, 5.0):
        assert best_temperature(truth * scale, labels) == pytest.approx(scale, rel=0.15)


def test_the_threshold_keeps_what_is_sure() -> None:
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    confidence = logits.softmax(1)[:, 0]
    assert sure_from(logits, torch.tensor([0, 0, 0, 0])) == pytest.approx(float(confidence[3]))
    assert sure_from(logits, torch.tensor([0, 0, 1, 0])) == pytest.approx(float(confidence[1]))
    assert sure_from(logits, torch.tensor([1, 0, 0, 0])) == 1.0


def test_a_trial_measures_what_it_says(
    farm: Farm, good: tuple[VisionTransformer, ModelSpec]
) -> None:
    trial = try_out(*good, farm.folder())
    assert trial.latency_seconds > 0
    assert trial.judged.accuracy > 0.6
    assert farm.registry.network == NETWORK
