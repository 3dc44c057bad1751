"""What a device measures, on the files that a Raspberry Pi, a Jetson and a PC lay out."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import health, traffic
from client.health import Health, gpu_ratio, kind, model, temperature, under_voltage
from client.traffic import Counters
from common.topics import Telemetry

ZONE, CHIP = "sys/class/thermal/thermal_zone", "sys/class/hwmon/hwmon"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
PI4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/device-tree/compatible": "raspberrypi,4-model-b\0brcm,bcm2711\0",
    f"{ZONE}0/type": "cpu-thermal\n",
    f"{ZONE}0/temp": "51608\n",
    f"{CHIP}0/name": "cpu_thermal\n",
    f"{CHIP}0/temp1_input": "52095\n",
    f"{CHIP}1/name": "rpi_volt\n",
    f"{CHIP}1/in0_lcrit_alarm": "0\n",
    FIRMWARE: "0\n",
}
PI5 = {
    "sys/firmware/devicetree/base/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    f"{ZONE}0/type": "cpu-thermal\n",
    f"{ZONE}0/temp": "48250\n",
    f"{CHIP}0/name": "nvme\n",
    f"{CHIP}0/temp1_input": "71850\n",
    f"{CHIP}1/name": "rp1_adc\n",
    f"{CHIP}1/temp1_input": "60100\n",
    f"{CHIP}1/in0_lcrit_alarm": "1\n",  # another chip's alarm is another matter
    f"{CHIP}2/name": "rpi_volt\n",
    f"{CHIP}2/in0_lcrit_alarm": "0\n",
    f"{CHIP}3/name": "pwmfan\n",
}
ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    f"{ZONE}0/type": "cpu-thermal\n",
    f"{ZONE}0/temp": "49187\n",
    f"{ZONE}1/type": "gpu-thermal\n",
    f"{ZONE}1/temp": "53000\n",
    f"{ZONE}2/type": "PMIC-Die\n",
    f"{ZONE}2/temp": "100000\n",
    f"{ZONE}3/type": "cv0-thermal\n",
    f"{ZONE}8/type": "tj-thermal\n",
    f"{ZONE}8/temp": "52500\n",
    "sys/devices/platform/bus@0/17000000.gpu/load": "437\n",
}
PC = {
    "sys/class/dmi/id/product_name": "OptiPlex  3080\n",
    f"{ZONE}0/type": "acpitz\n",
    f"{ZONE}0/temp": "90000\n",
    f"{CHIP}4/name": "coretemp\n",
    f"{CHIP}4/temp1_input": "41000\n",
    f"{CHIP}4/temp2_input": "43000\n",
    f"{CHIP}4/temp3_input": "-128000\n",
}


def lay(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def measured(root: Path, files: Mapping[str, str]) -> Telemetry:
    return Health(root / "state", lay(root, files)).measure()


def special(seen: Telemetry) -> tuple[float | bool | None, ...]:
    """What depends on the machine."""
    return seen.temperature_celsius, seen.throttled, seen.under_voltage, seen.gpu_ratio


@pytest.mark.parametrize(
    ("files", "family", "name", "values"),
    [
        (PI4, "pi", "Raspberry Pi 4 Model B Rev 1.4", (52.095, False, False, None)),
        (PI5, "pi", "Raspberry Pi 5 Model B Rev 1.0", (48.25, None, False, None)),
        (ORIN, "jetson", "NVIDIA Jetson Orin Nano Developer Kit", (52.5, None, None, 0.437)),
        (PC, "other", "OptiPlex 3080", (43.0, None, None, None)),
        ({}, "other", "", (None, None, None, None)),
    ],
    ids=["pi4", "pi5", "orin", "pc", "nothing"],
)
def test_machines(
    tmp_path: Path,
    files: Mapping[str, str],
    family: str,
    name: str,
    values: tuple[float | bool | None, ...],
) -> None:
    assert special(measured(tmp_path, files)) == values
    assert (kind(tmp_path), model(tmp_path)) == (family, name)


@pytest.mark.parametrize(
    ("said", "throttled", "low"),
    [
        ("0", False, False),
        ("1", False, True),
        ("4", True, False),
        ("5", True, True),
        ("50000", False, False),  # both have happened since the last boot
        ("0x50005", True, True),
        ("a", False, False),  # capped, and near the limit of temperature
        ("?", None, False),
    ],
)
def test_the_bits_of_a_raspberry(
    tmp_path: Path, said: str, throttled: bool | None, low: bool
) -> None:
    seen = measured(tmp_path, {**PI4, FIRMWARE: f"{said}\n"})
    assert (seen.throttled, seen.under_voltage) == (throttled, low)


def test_under_voltage_is_told_by_either_file(tmp_path: Path) -> None:
    alarm = {f"{CHIP}1/in0_lcrit_alarm": "1\n"}
    assert under_voltage(lay(tmp_path / "both", PI4 | alarm)) is True
    without = {name: text for name, text in (PI4 | alarm).items() if name != FIRMWARE}
    assert under_voltage(lay(tmp_path / "chip", without)) is True
    other = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    assert under_voltage(lay(tmp_path / "firmware", {other: "1"})) is True
    assert kind(tmp_path / "firmware") == "pi", "a container may lack the device tree"


@pytest.mark.parametrize(
    "place",
    [
        "sys/devices/gpu.0/load",
        "sys/devices/platform/gpu.0/load",
        "sys/devices/platform/17000000.gpu/load",
        "sys/class/devfreq/17000000.gpu/device/load",
        "sys/class/devfreq/17000000.ga10b/device/load",
        "sys/class/devfreq/17000000.gv11b/device/load",
    ],
)
def test_the_gpu_of_every_release(tmp_path: Path, place: str) -> None:
    assert gpu_ratio(lay(tmp_path, {place: "1000"})) == 1.0


def test_a_board_is_asked_where_the_processor_says_nothing(tmp_path: Path) -> None:
    board = {name: text for name, text in PC.items() if "hwmon" not in name}
    assert temperature(lay(tmp_path, board)) == 90.0


@pytest.mark.parametrize("said", ["-256000", "-40000", "130000", "255000", "hot", ""])
def test_what_no_processor_has_is_not_believed(tmp_path: Path, said: str) -> None:
    zone = {f"{ZONE}0/type": "cpu-thermal", f"{ZONE}0/temp": said}
    assert temperature(lay(tmp_path, zone)) is None
    other = {f"{ZONE}1/type": "soc-thermal", f"{ZONE}1/temp": "40000"}
    assert temperature(lay(tmp_path, other)) == 40.0


def test_a_sensor_that_fails_is_left_out(tmp_path: Path) -> None:
    lay(tmp_path, ORIN)
    (tmp_path / f"{ZONE}8/temp").unlink()
    (tmp_path / f"{ZONE}8/temp").mkdir()  # reading fails, as where a sensor is off
    assert temperature(tmp_path) == 49.187


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=12), min_size=1, max_size=4), st.sampled_from([PI4, ORIN, PC]))
def test_whatever_files_say_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, said: list[bytes], files: Mapping[str, str]
) -> None:
    root = lay(tmp_path_factory.mktemp("root"), files)
    for number, name in enumerate(files):
        (root / name).write_bytes(said[number % len(said)])
    seen = Health(root, root).measure()
    assert Telemetry.model_validate(seen.body()) == seen
    assert kind(root) in ("pi", "jetson", "other")
    assert len(model(root)) <= 100
    assert model(root).isprintable()
    shutil.rmtree(root)


# --- what every machine has ----------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    traffic.keep(tmp_path, Counters(sent=7, received=40))
    traffic.fetched(tmp_path, 2)
    seen = Health(tmp_path).measure()
    assert seen.uptime_seconds > 0
    assert seen.memory_used_bytes is not None
    assert seen.memory_bytes == psutil.virtual_memory().total > seen.memory_used_bytes > 0
    assert seen.disk_free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert (seen.link_sent_bytes, seen.link_received_bytes) == (7, 42)


def test_the_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert Health(tmp_path / "a" / "b").measure().disk_free_bytes
    assert not os.listdir(tmp_path)  # noqa: PTH208


def test_the_share_is_that_since_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(10.0, 100.0), (13.0, 104.0), (13.0, 104.0), (13.0, 108.0), (12.0, 109.0)])
    monkeypatch.setattr(health, "_cpu_seconds", lambda: next(times))
    device = Health(tmp_path)
    shares = [device.measure().cpu_ratio for _ in range(4)]
    assert shares == [0.75, 0.75, 0.0, 0.0]


def test_work_is_seen(tmp_path: Path) -> None:
    device = Health(tmp_path)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    share = device.measure().cpu_ratio
    assert share is not None
    assert share > 0


def test_what_cannot_be_measured_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no /proc here")

    for name in ("virtual_memory", "disk_usage", "cpu_times"):
        monkeypatch.setattr(psutil, name, fails)
    (tmp_path / traffic.FILE).write_text("damaged")
    seen = Health(tmp_path, tmp_path).measure()
    assert seen.body().keys() == {
        *("uptime_seconds", "outbox_messages", "outbox_bytes", "dropped_messages")
    }
