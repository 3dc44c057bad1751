"""The hub and a device's side of it, over real connections with mutual TLS."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from client import hub as device
from client.hub import HubClient
from common import hub_pb2, hub_pb2_grpc
from common.assembly import assemble
from common.backbone import digest
from common.errors import AbsentError, LaunchError, LinkError, RefusalError, RefuseReason
from common.manifest import InstallReport, Manifest, read_channel, read_manifest
from common.objects import Objects
from common.signing import KeySet, first_keys
from server import hub as module
from server.hub import CHUNK_BYTES, serve_hub
from server.registry import STABLE, Registry
from tests.lab.hub import LabHub
from tests.lab.versions import add_version, model_of, pruned, random_object, two_versions

ROOT = Path(__file__).parent.parent.parent
NOW = datetime.now(UTC)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with two_versions(tmp_path / "server") as opened:
        opened.promote(STABLE, 1)
        yield opened


@pytest.fixture
def hub(registry: Registry, tmp_path: Path) -> Iterator[LabHub]:
    with LabHub(tmp_path / "server").running() as running:
        yield running


def stub(hub: LabHub, farm: str = "apple") -> hub_pb2_grpc.HubStub:
    return stub_on(channel(hub, farm))


def stub_on(opened: grpc.Channel) -> hub_pb2_grpc.HubStub:
    return hub_pb2_grpc.HubStub(opened)  # type: ignore[no-untyped-call]


def channel(hub: LabHub, farm: str = "apple") -> grpc.Channel:
    files = hub.files(farm)
    credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)
    return grpc.secure_channel(hub.address, credentials)


def offered(client: HubClient, keys: KeySet | None = None) -> tuple[KeySet, Manifest]:
    offer = client.latest(STABLE)
    known = first_keys(offer.keys, NOW) if keys is None else keys.follow(offer.keys, NOW)
    named = read_channel(offer.channel, known, NOW)
    found, manifest = read_manifest(offer.manifest, known, NOW)
    assert found == named.manifest
    return known, manifest


# --- the way of a version --------------------------------------------------------------------


def test_a_device_gets_a_version_whole(hub: LabHub, registry: Registry, tmp_path: Path) -> None:
    objects = Objects(tmp_path / "device")
    with hub.client() as client:
        _, manifest = offered(client)
        fetched = client.fetch(manifest.objects, objects)
        assert fetched.bytes == sum(manifest.objects.values())
        assert digest(assemble(manifest, objects), manifest.spec) == manifest.backbone
        assert client.fetch(manifest.objects, objects).bytes == 0


def test_a_long_fetch_says_how_far_it_is(
    hub: LabHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "TELL_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), hub.client() as client:
        _, manifest = offered(client)
        client.fetch(manifest.weights, Objects(tmp_path / "device"))
    whole = f"{sum(manifest.weights.values()) / 1e6:.1f}"
    assert f"{whole} of {whole} MB have come" in caplog.text


def test_only_what_changed_travels(hub: LabHub, registry: Registry, tmp_path: Path) -> None:
    objects = Objects(tmp_path / "device")
    model, spec = pruned(*model_of())
    add_version(registry, model, spec)
    with hub.client() as client:
        keys, first = offered(client)
        client.fetch(first.weights, objects)
        registry.promote(STABLE, 3)
        for offer in client.watch(STABLE):  # the hub looks every second
            if read_channel(offer.channel, keys, NOW).version == 3:
                break
        _, third = offered(client, keys)
        fetched = client.fetch(third.weights, objects)
    assert 0 < fetched.bytes < 0.1 * sum(third.weights.values())
    assemble(third, objects)


def test_bytes_that_are_dear_are_compressed(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = registry.objects.add(b"leaf " * 200_000)
    sizes = []
    real = device._bytes

    def counting(chunk: hub_pb2.Chunk, wanted: dict[str, int]) -> bytes:
        sizes.append(len(chunk.data))
        return real(chunk, wanted)

    monkeypatch.setattr(device, "_bytes", counting)
    with LabHub(tmp_path / "server").running() as hub, hub.client() as client:
        client.fetch({name: 1_000_000}, Objects(tmp_path / "one"), compress=True)
        assert sum(sizes) < 20_000
        sizes.clear()
        client.fetch({name: 1_000_000}, Objects(tmp_path / "two"))
        assert sum(sizes) == 1_000_000


def test_a_watcher_hears_of_every_change(hub: LabHub, registry: Registry) -> None:
    keys = registry.keys.keys
    heard: list[int] = []
    with hub.client() as client:
        for offer in client.watch(STABLE):
            named = read_channel(offer.channel, keys, NOW)
            heard.append(named.version)
            if len(heard) == 1:
                registry.promote(STABLE, 2)
            else:
                break
        again = client.watch(STABLE, named.counter)

        def roll_back() -> None:
            with Registry.open(hub.folder) as opened:  # as another process does
                opened.roll_back(STABLE)

        timer = threading.Timer(1.5, roll_back)
        timer.start()
        heard.append(read_channel(next(again).channel, keys, NOW).version)
        timer.join()
    assert heard == [1, 2, 1]


def test_a_report_is_kept_under_the_name_in_the_certificate(
    hub: LabHub, registry: Registry
) -> None:
    report = InstallReport(
        device="pi-3",
        version=1,
        outcome="rejected",
        detail="macro-F1 .81 against .86",
        accuracy_before=0.9,
        accuracy_after=0.8,
    )
    with hub.client("rice") as client:
        client.report(report)
    (kept,) = registry.rows.installs(1)
    assert (kept.farm, kept.device, kept.outcome) == ("rice", "pi-3", "rejected")
    assert (kept.accuracy_before, kept.accuracy_after) == (0.9, 0.8)


def test_a_report_that_makes_no_sense_is_refused(hub: LabHub) -> None:
    with pytest.raises(grpc.RpcError, match="outcome") as caught:
        stub(hub).Report(hub_pb2.InstallReport(device="pi", version=1, outcome="eaten"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- lines that are cut ----------------------------------------------------------------------


def test_a_server_that_goes_half_way_costs_one_chunk(registry: Registry, tmp_path: Path) -> None:
    data = random_object(20 * CHUNK_BYTES + 17)
    name = registry.objects.add(data)
    objects, hub = Objects(tmp_path / "device"), LabHub(tmp_path / "server")
    stopped, cuts = threading.Event(), 3

    def held() -> int:
        return objects.lacking({name: len(data)}).get(name, len(data))

    def wait_for_server(_seconds: float) -> None:
        stopped.set()

    client = HubClient(hub.address, hub.files(), seed=0, sleep=wait_for_server)
    came = 0
    for _ in range(cuts):
        start = held()
        with hub.running():
            # the server ends once the device has a third of what was left
            call = client._stub.Fetch(
                hub_pb2.FetchRequest(wants=[hub_pb2.Want(digest=name, offset=start)])
            )
            for chunk in call:
                came += len(chunk.data)
                objects.receive(name, chunk.offset, chunk.data, len(data))
                if held() - start > (len(data) - start) / 3:
                    break
            call.cancel()
    with hub.running():
        came += client.fetch({name: len(data)}, objects).bytes
    assert objects.load(name, len(data)) == data
    assert came <= len(data) + cuts * CHUNK_BYTES


def test_a_fetch_goes_on_when_the_server_is_back(registry: Registry, tmp_path: Path) -> None:
    data = random_object(4 * CHUNK_BYTES)
    name = registry.objects.add(data)
    objects, hub = Objects(tmp_path / "device"), LabHub(tmp_path / "server")
    pauses: list[float] = []

    with ExitStack() as stack:

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                stack.enter_context(hub.running())
            time.sleep(1.0)  # gRPC itself waits before it tries again

        client = stack.enter_context(HubClient(hub.address, hub.files(), seed=0, sleep=pause))
        fetched = client.fetch({name: len(data)}, objects)
    assert fetched.bytes == len(data)
    assert fetched.cuts >= 3
    assert pauses[0] < pauses[2]  # longer each time, drawn at random


def test_a_fetch_gives_up_in_the_end(registry: Registry, tmp_path: Path) -> None:
    hub = LabHub(tmp_path / "server")
    pauses: list[float] = []
    client = HubClient(hub.address, hub.files(), seed=0, sleep=pauses.append)
    with pytest.raises(LinkError, match=rf"hub at {hub.address}: unavailable"):
        client.fetch({"a" * 64: 10}, Objects(tmp_path / "device"))
    assert len(pauses) == device.TRIES - 1


def test_a_device_that_stops_reading_is_let_go(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 1.0)
    name = registry.objects.add(random_object(200 * CHUNK_BYTES))
    with LabHub(tmp_path / "server", streams_per_farm=1).running() as hub:
        wants = hub_pb2.FetchRequest(wants=[hub_pb2.Want(digest=name)])
        call = stub(hub).Fetch(wants)
        next(call)
        threading.Event().wait(2.5)  # a device that was suspended
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing was taken for 1 s" in caught.value.details()
        next(stub(hub).Fetch(wants))  # its place is free again


# --- what is refused -------------------------------------------------------------------------


def refused(hub: LabHub, digest: str, offset: int = 0) -> tuple[grpc.StatusCode, str]:
    wants = [hub_pb2.Want(digest=digest, offset=offset)]
    with pytest.raises(grpc.RpcError) as caught:
        list(stub(hub).Fetch(hub_pb2.FetchRequest(wants=wants)))
    return caught.value.code(), caught.value.details()


def test_what_cannot_be_fetched(hub: LabHub, registry: Registry) -> None:
    name, size = next(iter(registry.manifest(1).objects.items()))
    code, words = refused(hub, name, size + 1)
    assert code is grpc.StatusCode.OUT_OF_RANGE
    assert f"has {size} bytes; {size + 1} is beyond its end" in words
    code, words = refused(hub, "f" * 64)
    assert code is grpc.StatusCode.NOT_FOUND
    assert "ask for the channel again" in words
    for path in ("../../signing/keys.json", "/etc/passwd", "F" * 64, ""):
        code, words = refused(hub, path)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is no sha256" in words


def test_an_unknown_channel_names_those_that_are(hub: LabHub) -> None:
    with (
        hub.client() as client,
        pytest.raises(AbsentError, match="no channel 'cannery'; there are: stable"),
    ):
        client.latest("cannery")


def test_a_channel_that_is_not_there_yet_is_waited_for(hub: LabHub, registry: Registry) -> None:
    with hub.client() as client, ThreadPoolExecutor(1) as thread:
        first = thread.submit(next, client.watch("canary"))
        with pytest.raises(TimeoutError):
            first.result(1.5)  # the hub looks every second
        registry.promote("canary", 2)
        named = read_channel(first.result(30).channel, registry.keys.keys, NOW)
    assert (named.name, named.version) == ("canary", 2)


def test_a_tampered_object_is_never_kept(hub: LabHub, registry: Registry, tmp_path: Path) -> None:
    name = registry.objects.add(b"leaves")
    registry.objects.path(name).write_bytes(b"thorns")
    objects = Objects(tmp_path / "device")
    client = HubClient(hub.address, hub.files(), seed=0, sleep=lambda _: None)
    with pytest.raises(RefusalError, match="is not what its name says") as caught:
        client.fetch({name: 6}, objects)
    assert caught.value.reason is RefuseReason.DAMAGED
    assert not objects.has(name)


def test_a_disk_without_room_fetches_nothing(hub: LabHub, tmp_path: Path) -> None:
    with hub.client() as client, pytest.raises(RefusalError, match="make room"):
        client.fetch({"e" * 64: 10**15}, Objects(tmp_path / "device"))


def test_a_disk_that_fills_half_way_keeps_what_came(
    hub: LabHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.errors import DiskError

    data = random_object(6 * CHUNK_BYTES)
    name = registry.objects.add(data)
    objects = Objects(tmp_path / "device")
    real, pieces = objects.receive, [0]

    def receive(name: str, offset: int, piece: bytes, size: int) -> int:
        pieces[0] += 1
        if pieces[0] == 4:
            raise DiskError("cannot write 'x': No space left on device; make room")
        return real(name, offset, piece, size)

    monkeypatch.setattr(objects, "receive", receive)
    with hub.client() as client:
        with pytest.raises(DiskError, match="No space left"):
            client.fetch({name: len(data)}, objects)
        assert objects.lacking({name: len(data)}) == {name: 3 * CHUNK_BYTES}
        # the three that are missing, and the last that is here: it might have been spoilt
        assert client.fetch({name: len(data)}, objects).bytes == 4 * CHUNK_BYTES


def test_more_fetches_of_a_farm_than_it_may_have(registry: Registry, tmp_path: Path) -> None:
    name = registry.objects.add(random_object(40 * CHUNK_BYTES))
    wants = hub_pb2.FetchRequest(wants=[hub_pb2.Want(digest=name)])
    with LabHub(tmp_path / "server", streams_per_farm=2).running() as hub:
        calls = [stub(hub).Fetch(wants) for _ in range(2)]
        for call in calls:
            next(call)
        with pytest.raises(grpc.RpcError, match="apple fetches 2 times at once") as caught:
            next(stub(hub).Fetch(wants))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        next(stub(hub, "rice").Fetch(wants))  # another farm is not held up by that


def test_a_thousand_fetches_at_once(registry: Registry, tmp_path: Path) -> None:
    name = registry.objects.add(random_object(CHUNK_BYTES))
    wants = hub_pb2.FetchRequest(wants=[hub_pb2.Want(digest=name)])

    def fetch(calls: hub_pb2_grpc.HubStub) -> str:
        try:
            return "whole" if sum(len(c.data) for c in calls.Fetch(wants, timeout=60)) else "?"
        except grpc.RpcError as error:
            return str(error.code().name)

    with LabHub(tmp_path / "server", streams=20, streams_per_farm=20).running() as hub:
        calls = stub(hub)
        with ThreadPoolExecutor(64) as pool:
            outcomes = list(pool.map(fetch, [calls] * 1000))
        assert set(outcomes) <= {"whole", "RESOURCE_EXHAUSTED"}
        assert outcomes.count("whole") >= 20
        assert fetch(calls) == "whole"  # and it is none the worse for it


def test_a_farm_gets_no_more_than_its_rate(registry: Registry, tmp_path: Path) -> None:
    name = registry.objects.add(random_object(6 * CHUNK_BYTES))
    with LabHub(tmp_path / "server", bytes_per_second=4.0 * CHUNK_BYTES).running() as hub:
        begin = datetime.now(UTC)
        with hub.client() as client:
            client.fetch({name: 6 * CHUNK_BYTES}, Objects(tmp_path / "device"))
        # the first piece at once, five more at four a second
        assert (datetime.now(UTC) - begin).total_seconds() >= 1.2


def test_who_has_no_certificate_of_the_network_hears_nothing(hub: LabHub, tmp_path: Path) -> None:
    foreign = LabHub(tmp_path / "elsewhere").files("apple")
    ours = hub.files()
    for files in (
        grpc.ssl_channel_credentials(ours.ca),
        grpc.ssl_channel_credentials(ours.ca, foreign.key, foreign.certificate),
    ):
        with grpc.secure_channel(hub.address, files) as opened:
            with pytest.raises(grpc.RpcError) as caught:
                stub_on(opened).Latest(hub_pb2.ChannelRequest(channel=STABLE), timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with (
        grpc.insecure_channel(hub.address) as opened,
        pytest.raises(grpc.RpcError),
    ):
        stub_on(opened).Latest(hub_pb2.ChannelRequest(channel=STABLE), timeout=20)


def test_a_port_that_is_taken(registry: Registry, tmp_path: Path) -> None:
    with LabHub(tmp_path / "server").running() as hub:
        again = serve_hub(
            hub.config, hub.folder, hub.authority.server_credentials(), asyncio.Event()
        )
        with pytest.raises(LaunchError, match=r"choose another port in \[hub\]"):
            asyncio.run(again)


# --- what a stock client sees ----------------------------------------------------------------


def test_health_and_reflection(hub: LabHub) -> None:
    with channel(hub) as opened:
        health = health_pb2_grpc.HealthStub(opened)
        for service in ("", "fieldfed.hub.v1.Hub"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(
            iter([asked]), timeout=20
        )
        names = {one.name for one in next(answers).list_services_response.service}
        assert {"fieldfed.hub.v1.Hub", "grpc.health.v1.Health"} <= names


def test_the_generated_files_are_those_of_the_proto(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    arguments = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *arguments, "common/hub.proto"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    for name in ("hub_pb2.py", "hub_pb2.pyi", "hub_pb2_grpc.py"):
        made = (tmp_path / "common" / name).read_text()
        assert made == (ROOT / "common" / name).read_text(), f"common/{name} is not of hub.proto"


# --- who is revoked --------------------------------------------------------------------------


def test_a_revoked_farm_gets_nothing_more_not_even_what_it_waits_for(
    hub: LabHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    with hub.client("apple") as apple, hub.client("rice") as rice:
        news = apple.watch(STABLE)
        next(news)
        assert hub.authority.revoke("apple") >= 1
        with pytest.raises(LinkError, match=r"permission denied: .*farm apple is revoked"):
            next(news)
        with pytest.raises(LinkError, match="is revoked"):
            apple.latest(STABLE)
        with pytest.raises(LinkError, match="is revoked"):
            apple.fetch({"a" * 64: 100}, Objects(hub.folder / "device"))
        rice.latest(STABLE)
