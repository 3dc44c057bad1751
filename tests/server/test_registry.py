"""The registry: versions share tensors, never change, and go only when nobody needs them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from common import backbone
from common.assembly import assemble, require_buildable
from common.errors import ConfigError, DiskError, RefusalError, RefuseReason, StateError
from common.export import require_parity
from common.files import only_one
from common.manifest import Channel, Manifest, read_channel, read_manifest
from common.runtime import Runtime
from common.signing import KeySet, parsed, read
from server import publish as publishing
from server import registry as module
from server.difference import difference
from server.keys import SigningKeys
from server.publish import load, write_files
from server.registry import STABLE, Registry
from tests.lab.versions import (
    NETWORK,
    add_version,
    learnt,
    model_of,
    pruned,
    registry_in,
    two_versions,
)

NOW = datetime.now(UTC)


def seen(registry: Registry, counter: int) -> Manifest:
    return read_manifest(registry.row(counter).document, registry.keys.keys, NOW)[1]


# --- versions --------------------------------------------------------------------------------


def test_a_version_gives_back_the_backbone(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    model, spec = model_of()
    row = add_version(registry, model, spec)
    manifest = seen(registry, row.counter)
    assert (row.counter, manifest.network, manifest.parent) == (1, NETWORK, None)
    assert manifest.farms["apple"].accuracy == 0.9
    again, _ = load(registry, 1)
    assert backbone.digest(again, spec) == manifest.backbone == backbone.digest(model, spec)


def test_a_child_shares_what_did_not_change(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    first, second = seen(registry, 1), seen(registry, 2)
    assert second.parent == registry.row(1).digest
    fresh = set(second.weights) - set(first.weights)
    changed = {one.digest for one in second.tensors if one.name.endswith("bias")}
    assert fresh == changed
    assert registry.check() == []


def test_the_same_backbone_is_one_version(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    model, spec = model_of()
    assert add_version(registry, model, spec) == add_version(registry, model, spec)


def test_a_crash_before_the_manifest_leaves_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_in(tmp_path)
    model, spec = model_of()
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "digest_of", lambda _body: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add_version(registry, model, spec)
    assert registry.rows.versions() == []
    left = registry.collect()
    assert left.objects > 0
    assert add_version(registry, model, spec).counter == 1
    assert registry.check() == []


def test_a_full_disk_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_in(tmp_path)
    add, room = registry.objects.add, [3]

    def fill(data: bytes) -> str:
        room[0] -= 1
        if room[0] < 0:
            raise DiskError("cannot write 'x': No space left on device")
        return add(data)

    monkeypatch.setattr(registry.objects, "add", fill)
    with pytest.raises(DiskError):
        add_version(registry, *model_of())
    assert registry.rows.versions() == []


def test_two_processes_do_not_publish_at_once(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    lock = only_one(tmp_path / "registry" / "objects.lock")
    with lock, pytest.raises(StateError, match="another process works"):
        add_version(registry, *model_of())


def test_an_unknown_version_names_those_that_are_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no version 7; the newest that are here: 1, 2"):
        two_versions(tmp_path).manifest(7)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    first, second = sorted(set(seen(registry, 1).objects) - set(seen(registry, 2).objects))[:2]
    registry.objects.path(first).write_bytes(b"x")
    registry.objects.path(second).unlink()
    assert sorted(registry.check()) == sorted(
        [
            f"version 1: object {first[:12]} is damaged",
            f"version 1: object {second[:12]} is missing",
        ]
    )
    with pytest.raises(StateError, match="version 1: object"):
        load(registry, 1)
    load(registry, 2)


def test_a_changed_manifest_is_found(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    document = registry.row(1).document
    registry.rows.replace_document(1, document.replace("0.9", "1.0"))
    assert any("version 1" in line and "changed on its way" in line for line in registry.check())


def test_an_export_needs_no_registry(tmp_path: Path) -> None:
    registry = two_versions(tmp_path / "server")
    write_files(registry, 2, tmp_path / "out")
    model, spec = backbone.load_backbone(tmp_path / "out" / "model.safetensors")
    assert backbone.digest(model, spec) == seen(registry, 2).backbone
    graph = (tmp_path / "out" / "model-fp32.onnx").read_bytes()
    require_parity(model, spec.image_size, Runtime(graph, tmp_path / "nowhere"))
    keys = json.loads((tmp_path / "out" / "keys.json").read_text())["body"]
    document = (tmp_path / "out" / "manifest.json").read_text()
    assert read_manifest(document, KeySet.model_validate_json(keys), NOW)[1].counter == 2


def test_the_difference_is_told_in_words(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    model, spec = model_of()
    add_version(registry, model, spec)
    smaller, smaller_spec = pruned(model, spec)
    add_version(registry, smaller, smaller_spec, 0.88)
    lines = difference(seen(registry, 1), seen(registry, 2))
    assert "block 0: 4 to 3 heads" in lines
    assert "accuracy, mean over 2 farms: -2.0 points" in lines
    assert any(line.startswith("MACs: ") and "(-" in line for line in lines)
    (fetch,) = [line for line in lines if line.startswith("to fetch")]
    needed = set(seen(registry, 2).objects) - set(seen(registry, 1).objects)
    # of the cut block what heads are made of, and what their outputs go through
    names = {one.name for one in seen(registry, 2).tensors if one.digest in needed}
    assert names == {f"blocks.0.attn.{one}" for one in ("qkv.weight", "qkv.bias", "proj.weight")}
    assert float(fetch.split()[2]) < 0.2 * float(fetch.split()[5])


# --- channels --------------------------------------------------------------------------------


def named(registry: Registry, channel: str = STABLE) -> Channel:
    return read_channel(registry.named(channel).document, registry.keys.keys, NOW)


def test_a_channel_goes_forward_and_back(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    registry.promote(STABLE, 1)
    registry.promote(STABLE, 2)
    before = named(registry)
    registry.roll_back(STABLE)
    after = named(registry)
    assert (before.version, after.version) == (2, 1)
    assert after.counter > before.counter  # a device takes it although the version is older
    assert registry.named(STABLE).why == "rolled back from 2"
    assert after.manifest == registry.row(1).digest


def test_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    registry.promote(STABLE, 2)
    with pytest.raises(ConfigError, match="never named another version than 2"):
        registry.roll_back(STABLE)
    with pytest.raises(ConfigError, match="no channel 'canary'; there are: stable"):
        registry.roll_back("canary")


def test_channels_are_signed_again_before_they_expire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = two_versions(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "CHANNEL_DAYS", 10.0)
        registry.promote(STABLE, 2)
    first = named(registry)
    (renewed,) = registry.renew()
    assert renewed.version == 2
    assert named(registry).expires > first.expires
    assert named(registry).counter > first.counter
    assert registry.renew() == []


def test_a_registry_out_of_a_backup_is_not_behind_its_devices(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    assert registry.promote(STABLE, 1).counter >= int(NOW.timestamp())


@pytest.mark.parametrize(
    ("asked", "network", "counter", "later", "reason", "words"),
    [
        ("canary", NETWORK, 0, 0, RefuseReason.FOREIGN, "asked for channel 'canary'"),
        (STABLE, "hill", 0, 0, RefuseReason.FOREIGN, "belongs to network 'valley', this device to"),
        (STABLE, NETWORK, 2**50, 0, RefuseReason.OLDER, "an old state of the server"),
        (STABLE, NETWORK, 0, 31, RefuseReason.EXPIRED, "set its clock if that is wrong"),
    ],
)
def test_what_a_device_says_of_a_channel(
    tmp_path: Path,
    asked: str,
    network: str,
    counter: int,
    later: int,
    reason: RefuseReason,
    words: str,
) -> None:
    registry = two_versions(tmp_path)
    registry.promote(STABLE, 1)
    named(registry).require(NETWORK, STABLE, named(registry).counter, NOW)
    with pytest.raises(RefusalError, match=words) as caught:
        named(registry).require(network, asked, counter, NOW + timedelta(days=later))
    assert caught.value.reason is reason


def test_what_a_device_says_of_a_manifest(tmp_path: Path) -> None:
    manifest = seen(two_versions(tmp_path), 1)
    manifest.require(NETWORK, NOW)
    with pytest.raises(RefusalError, match="version 1 has expired on"):
        manifest.require(NETWORK, NOW + timedelta(days=1000))
    with pytest.raises(RefusalError, match="belongs to network 'valley'"):
        manifest.require("hill", NOW)


def test_a_manifest_with_a_field_that_nobody_knows(tmp_path: Path) -> None:
    class Wider(Manifest):
        run_this: str = "rm"

    registry = two_versions(tmp_path)
    wider = Wider(**seen(registry, 1).model_dump())
    document = registry.keys.sign("manifest", wider)
    with pytest.raises(RefusalError, match="run_this: Extra inputs are not permitted") as caught:
        read_manifest(document, registry.keys.keys, NOW)
    assert caught.value.reason is RefuseReason.MALFORMED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counter": 0}, "counter"),
        ({"tensors": []}, "tensors"),
        ({"macs": "many"}, "macs"),
        ({"expires": "2020-01-01T00:00:00Z"}, "it expires before it was made"),
        ({"network": "a/b"}, "network"),
    ],
)
def test_a_manifest_that_makes_no_sense(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    values = json.loads(seen(two_versions(tmp_path), 1).model_dump_json()) | changes
    with pytest.raises(RefusalError, match=words):
        parsed(Manifest, json.dumps(values), "manifest")


def test_a_tensor_that_is_named_twice(tmp_path: Path) -> None:
    values = json.loads(seen(two_versions(tmp_path), 1).model_dump_json())
    values["tensors"].append(dict(values["tensors"][0]))
    with pytest.raises(RefusalError, match="is named 2 times"):
        parsed(Manifest, json.dumps(values), "manifest")
    values["tensors"][-1]["name"] = "other"
    values["tensors"][-1]["shape"] = [1]
    with pytest.raises(RefusalError, match="has two lengths"):
        parsed(Manifest, json.dumps(values), "manifest")


# --- what cannot be built --------------------------------------------------------------------


def test_tensors_of_another_spec_are_refused_before_any_is_fetched(tmp_path: Path) -> None:
    manifest = seen(two_versions(tmp_path), 1)
    require_buildable(manifest)
    for changed, words in (
        ({"spec": manifest.spec.with_units((3, 4, 4), manifest.spec.neurons)}, "its spec needs"),
        ({"tensors": manifest.tensors[1:]}, "its manifest names none"),
        ({"spec": manifest.spec.model_copy(update={"name": "vit_next_week"})}, "unknown backbone"),
    ):
        with pytest.raises(RefusalError, match=words) as caught:
            require_buildable(manifest.model_copy(update=changed))
        assert caught.value.reason is RefuseReason.INCOMPATIBLE


def test_tensors_that_are_not_the_backbone_are_refused(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    first, second = seen(registry, 1), seen(registry, 2)
    mixed = first.model_copy(update={"tensors": second.tensors})
    with pytest.raises(RefusalError, match="is not the backbone that its manifest says"):
        assemble(mixed, registry.objects)


def test_a_manifest_of_a_tensor_of_100_gb_is_read_and_weighed(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    manifest = seen(registry, 1)
    changes = {"dtype": "F32", "shape": (250_000, 100_000), "digest": "e" * 64}
    large = manifest.tensors[0].model_copy(update=changes)
    bloated = manifest.model_copy(update={"tensors": (large, *manifest.tensors[1:])})
    with pytest.raises(RefusalError, match="its spec needs"):
        require_buildable(bloated)
    assert bloated.objects["e" * 64] == 10**11
    with pytest.raises(RefusalError, match="MB are to be fetched") as caught:
        registry.objects.require_room(1000 * bloated.objects["e" * 64])
    assert caught.value.reason is RefuseReason.TOO_LARGE


# --- keys ------------------------------------------------------------------------------------


def test_after_an_exchange_old_devices_and_new_ones_believe_the_same(tmp_path: Path) -> None:
    registry = two_versions(tmp_path)
    registry.promote(STABLE, 2)
    old = registry.keys.keys
    registry.exchange_keys()
    new = Registry.open(tmp_path).keys.keys
    assert old.follow(registry.keys.text, NOW) == new
    for keys in (old, new):
        assert read_channel(registry.named(STABLE).document, keys, NOW).version == 2
        assert read_manifest(registry.row(1).document, keys, NOW)[1].counter == 1
    later = NOW + timedelta(days=400)
    with pytest.raises(RefusalError, match="counts no longer"):
        old_only = new.model_copy(update={"keys": new.keys[:1]})
        read_channel(registry.named(STABLE).document, old_only, later)
    assert read_channel(registry.named(STABLE).document, new, later)


def test_keys_are_private_and_never_made_twice(tmp_path: Path) -> None:
    keys = SigningKeys.create(tmp_path, NETWORK)
    (private,) = tmp_path.glob("*.pem")
    assert private.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError, match="nothing was changed"):
        SigningKeys.create(tmp_path, NETWORK)
    private.chmod(0o644)
    with pytest.raises(StateError, match="chmod 600"):
        SigningKeys.open(tmp_path)
    private.chmod(0o600)
    assert SigningKeys.open(tmp_path).keys == keys.keys
    private.unlink()
    with pytest.raises(StateError, match="restore it from a backup"):
        SigningKeys.open(tmp_path)


def test_lost_keys_are_not_replaced_by_others(tmp_path: Path) -> None:
    registry_in(tmp_path).close()
    for path in (tmp_path / "signing").iterdir():
        path.unlink()
    (tmp_path / "signing").rmdir()
    with pytest.raises(StateError, match="no signing keys"):
        Registry.create(tmp_path, NETWORK)


# --- upkeep ----------------------------------------------------------------------------------


def test_what_a_channel_needs_or_may_go_back_to_stays(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    model, spec = model_of()
    for seed in range(6):
        add_version(registry, learnt(model, seed), spec)
    for version in (2, 1, 3):
        registry.promote(STABLE, version)
    gone = registry.collect(keep=1)
    assert gone.versions == (2, 4, 5)
    assert [row.counter for row in registry.rows.versions()] == [1, 3, 6]
    assert registry.check() == []
    assert gone.bytes > 0
    registry.roll_back(STABLE)
    load(registry, registry.named(STABLE).version)
    with pytest.raises(ConfigError, match="version 4 was removed"):
        registry.promote(STABLE, 4)
    assert registry.collect(keep=1).objects == 0


def test_the_last_version_stays_when_it_is_the_only_one(tmp_path: Path) -> None:
    registry = registry_in(tmp_path)
    with torch.no_grad():
        add_version(registry, *model_of())
    assert registry.collect(keep=1).versions == ()
    assert read(KeySet, "keys", registry.keys.text, registry.keys.keys, NOW).network == NETWORK
