"""Children are started, watched, started again, and ended with all that they started."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common import processes, programs
from common.errors import ConfigError, LaunchError
from common.processes import (
    Child,
    Supervisor,
    free_port,
    is_loopback,
    port_is_free,
    require_free_port,
    require_loopback,
    rotate,
    stop_all,
    terminate_like_interrupt,
    wait_for_port,
)

LOCAL = "127.0.0.1"
# A program that starts another one in a session of its own, as Flower does, and ignores SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time;"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"], start_new_session=True)
print("started", child.pid, flush=True)
time.sleep(600)
"""


def python(code: str, tmp_path: Path, name: str = "child") -> Child:
    return Child(name, lambda: [sys.executable, "-c", code], tmp_path / f"{name}.log")


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server((LOCAL, 0)) as server:
        yield server.getsockname()[1]


# --- ports ---------------------------------------------------------------------------------------


def test_ports(listener: int) -> None:
    assert not port_is_free(LOCAL, listener)
    port = free_port()
    assert port != listener
    assert port_is_free(LOCAL, port)


def test_a_port_in_use_is_named_with_what_to_do(listener: int) -> None:
    with pytest.raises(LaunchError, match=rf"port {listener} .*\[server\] port") as info:
        require_free_port(LOCAL, listener, "[server] port")
    assert str(os.getpid()) in str(info.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9", "::1"])
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "farm.example", "", "::"])
def test_other_machines_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"\[server\] host .*not encrypted"):
        require_loopback(host, "[server] host")


def test_waiting_for_a_port(listener: int, tmp_path: Path) -> None:
    wait_for_port(LOCAL, listener, 5)
    with pytest.raises(LaunchError, match="nothing listens"):
        wait_for_port(LOCAL, free_port(), 0.2)
    child = python("print('no space left'); raise SystemExit(3)", tmp_path, "superlink")
    child.start()
    with pytest.raises(LaunchError, match=r"superlink ended.*no space left"):
        wait_for_port(LOCAL, free_port(), 30, child)


# --- children ------------------------------------------------------------------------------------


def test_a_child_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = python(STUBBORN, tmp_path)
    child.start()
    until(lambda: "started" in child.log_file.read_text())
    grandchild = int(child.log_file.read_text().split()[1])
    assert child.pid is not None
    assert os.getsid(child.pid) == child.pid
    assert not gone(grandchild)
    stop_all([child], seconds=0.3)
    assert gone(grandchild)
    assert child.returncode == -signal.SIGKILL


def test_what_outlives_the_child_is_ended_too(tmp_path: Path) -> None:
    child = python(STUBBORN, tmp_path)
    child.start()
    until(lambda: "started" in child.log_file.read_text())
    grandchild = int(child.log_file.read_text().split()[1])
    assert len(child.observe()) == 2
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: child.returncode is not None)
    stop_all([child], seconds=0.3)
    assert gone(grandchild)


def test_a_polite_child_is_not_killed(tmp_path: Path) -> None:
    child = python("import time\ntry: time.sleep(600)\nfinally: pass", tmp_path)
    child.start()
    stop_all([child, python("", tmp_path, "never-started")])
    assert child.returncode == -signal.SIGTERM


def test_a_missing_program(tmp_path: Path) -> None:
    child = Child("superlink", lambda: ["flower-nonsense"], tmp_path / "log")
    with pytest.raises(LaunchError, match=r"'flower-nonsense' is not installed.*extra"):
        child.start()
    assert child.returncode is None
    stop_all([child])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends them for us")
def test_children_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from common.processes import Child\n"
        "c = Child('c', lambda: [sys.executable, '-c', 'import time; time.sleep(600)'],"
        f" Path({str(tmp_path)!r}) / 'c.log'); c.start(); print(c.pid, flush=True); time.sleep(600)"
    )
    root = Path(processes.__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    ) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert not gone(pid)
        launcher.kill()
    until(lambda: gone(pid))


def test_large_logs_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 5)
    log_file = tmp_path / "logs" / "a.log"
    rotate(log_file)
    log_file.write_text("12345")
    rotate(log_file)
    assert log_file.exists()
    log_file.write_text("123456")
    rotate(log_file)
    assert not log_file.exists()
    assert (log_file.parent / "a.log.1").read_text() == "123456"


# --- supervision ---------------------------------------------------------------------------------


def test_a_child_that_ends_is_started_again_with_its_new_command(tmp_path: Path) -> None:
    starts: list[int] = []

    def command() -> list[str]:
        starts.append(len(starts))
        code = f"print('start', {len(starts)}, flush=True); import time; time.sleep(600)"
        return [sys.executable, "-c", code if len(starts) > 2 else "raise SystemExit(9)"]

    child = Child("node", command, tmp_path / "node.log")
    with Supervisor(watch_seconds=0.02, first_delay_seconds=0.02) as supervisor:
        supervisor.start(child)
        until(lambda: "start 3" in child.log_file.read_text())
        pid = child.pid
        assert child.returncode is None
    assert pid is not None
    assert gone(pid)
    assert len(starts) == 3


def test_a_child_that_never_gets_ready_ends_the_context(tmp_path: Path) -> None:
    child = python("import time; time.sleep(600)", tmp_path)
    with pytest.raises(LaunchError), Supervisor() as supervisor:
        supervisor.start(child, ready=lambda: wait_for_port(LOCAL, free_port(), 0.1, child))
    assert child.returncode is not None


def test_delays_grow_with_jitter_and_stay_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[float] = []

    def no_delay(_low: float, high: float) -> float:
        bounds.append(high)
        return 0.0

    monkeypatch.setattr(processes._random, "uniform", no_delay)
    child = python("raise SystemExit(1)", tmp_path)
    monkeypatch.setattr(processes, "LONGEST_DELAY_SECONDS", 0.05)
    with Supervisor(watch_seconds=0.01, first_delay_seconds=0.01) as supervisor:
        supervisor.start(child)
        until(lambda: len(bounds) >= 4)
    assert bounds[:4] == [0.01, 0.02, 0.04, 0.05]


def test_sigterm_runs_cleanup_like_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminate_like_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_does_not_break_off_the_cleanup(tmp_path: Path) -> None:
    child = python(STUBBORN, tmp_path)
    child.start()
    until(lambda: "started" in child.log_file.read_text())
    impatient = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    impatient.start()
    stop_all([child], seconds=0.5)
    impatient.join()
    assert child.returncode is not None


# --- programs ------------------------------------------------------------------------------------


def test_our_module_runs_whatever_lies_in_the_working_directory(tmp_path: Path) -> None:
    for package in ("common", "client"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("print('theirs')")
        (tmp_path / package / "errors.py").write_text("main = lambda: print('theirs')")
    program, log_file = tmp_path / "with space" / "it's a program", tmp_path / "a log"
    programs.write_program(program, "common.errors", log_file)
    env = {**os.environ, "PYTHONPATH": f".{os.pathsep}{os.pathsep}/nowhere"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", env)
        env = programs.child_environment(program.parent)
    assert env["PYTHONPATH"] == "/nowhere"
    done = subprocess.run(["it's a program"], env=env, cwd=tmp_path, check=False)
    text = log_file.read_text()
    assert "theirs" not in text
    assert "has no attribute 'main'" in text  # common.errors is ours, and it is not a program
    assert str(Path(processes.__file__).parent.parent) not in env.get("PYTHONPATH", "")
    assert done.returncode == 1


def test_flower_is_kept_quiet_and_below_the_state_folder(tmp_path: Path) -> None:
    env = programs.flower_environment(tmp_path / "state")
    assert env["FLWR_HOME"].startswith(str(tmp_path))
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["PATH"].startswith(str(tmp_path))
    assert Path(env["FLWR_HOME"]).stat().st_mode & 0o077 == 0
