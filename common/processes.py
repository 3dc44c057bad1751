"""Child processes: start, watch, start again, and stop with everything that they started.

A child lives in its own session, so a Ctrl-C at the terminal reaches only the launcher, which then
stops its children in order. Processes are ended by id, never by name. On Linux a child also gets
SIGTERM when the thread that started it ends, so a launcher killed at any instant leaves nothing
behind: start children from a thread that lives as long as they should.
"""

import contextlib
import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from common import notify
from common.errors import ConfigError, LaunchError
from common.ports import holder_words, refusal

log = logging.getLogger(__name__)

LOG_BYTES = 5_000_000
"""A log file larger than this is set aside when its program starts."""

WATCH_SECONDS = 2.0
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0
HEALTHY_SECONDS = 60.0
STOP_SECONDS = 8.0

_PR_SET_PDEATHSIG = 1
_random = secrets.SystemRandom()


# --- ports ---------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether a host name or address stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_loopback(host: str, setting: str) -> None:
    """Refuse to speak to, or listen for, other machines without encryption.

    Raises:
        ConfigError: ``host`` is not on this machine; names the setting.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"{setting} '{host}' is not on this machine, and connections there are not encrypted; "
            "use 127.0.0.1. Farms on other machines come in by [door]"
        )


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    return refusal(host, port) is None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now; another program may take it before it is used."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def require_free_port(host: str, port: int, setting: str) -> None:
    """Refuse to start a server on a port that is taken.

    Raises:
        LaunchError: it is taken; names the port, who holds it if known, and what to do.
    """
    if not port_is_free(host, port):
        raise LaunchError(
            f"port {port} on {host} is in use{holder_words(port)}; "
            f"stop that program or choose another port in {setting}"
        )


def wait_for_port(host: str, port: int, seconds: float, child: "Child | None" = None) -> None:
    """Wait until something accepts connections there.

    Raises:
        LaunchError: nothing did in time, or ``child``, which should, has ended; quotes its log.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        if child is not None and child.returncode is not None:
            raise LaunchError(f"{child.name} ended while starting; {child.last_words()}")
        time.sleep(0.1)
    words = f"; {child.last_words()}" if child is not None else ""
    raise LaunchError(f"nothing listens on {host}:{port} after {seconds:.0f} s{words}")


# --- one child -----------------------------------------------------------------------------------


class Child:
    """A program that we start, with its log file.

    ``command`` is called for every start, so that a restart may choose, say, another local port.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        log_file: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.log_file = name, log_file
        self._command, self._cwd = command, cwd
        self._env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()

    @property
    def pid(self) -> int | None:
        """Process id, once started."""
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        """Exit status, or ``None`` while it runs or was never started."""
        if self._process is None:
            return None
        if self._process.returncode is None and not _lives(self._own):
            # Until its status is collected its id cannot be given to another process group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return self._process.returncode

    def start(self) -> None:
        """Start the program in a session of its own.

        Raises:
            LaunchError: the program is not installed.
        """
        command = list(self._command())
        if shutil.which(command[0], path=self._env.get("PATH")) is None:
            raise LaunchError(
                f"the program '{command[0]}' is not installed; "
                "install fieldfed with its 'server' or 'client' extra"
            )
        rotate(self.log_file)
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [*_leash(), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
            )
        self._own = psutil.Process(self._process.pid)
        self._seen.add(self._own)

    def observe(self) -> list[psutil.Process]:
        """The living processes of this child and of all that it started.

        What was seen once is remembered, because it may outlive the process that started it.
        """
        for process in list(self._seen):
            with contextlib.suppress(psutil.Error):
                self._seen.update(process.children(recursive=True))
        self._seen = {process for process in self._seen if _lives(process)}
        return list(self._seen)

    def last_words(self, lines: int = 5) -> str:
        """The end of its log, for an error message."""
        try:
            text = self.log_file.read_bytes()[-4000:].decode(errors="replace")
        except OSError:
            text = ""
        tail = " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())
        return f"see '{self.log_file}'" + (f": {tail}" if tail else "")


def _leash() -> list[str]:
    """Prefix of a command that makes Linux end the program together with us."""
    if not sys.platform.startswith("linux"):
        return []
    code = (
        "import ctypes, os, sys; "
        f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}); "
        "os.getppid() == int(sys.argv[1]) or os._exit(1); "
        "os.execvp(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-I", "-S", "-c", code, str(os.getpid())]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def rotate(log_file: Path) -> None:
    """Make room for a log: a large one is set aside as ``NAME.1``."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if log_file.exists() and log_file.stat().st_size > LOG_BYTES:
        log_file.replace(log_file.with_name(log_file.name + ".1"))


def stop_all(children: Sequence[Child], seconds: float = STOP_SECONDS) -> None:
    """SIGTERM to every process of every child, SIGKILL to those that live on; returns when gone."""
    with _undisturbed():
        _end(children, seconds)


def _end(children: Sequence[Child], seconds: float) -> None:
    _signal(children, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(child.observe() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    # Again and again: a process may have started another one just before it was killed.
    deadline = time.monotonic() + seconds
    while _signal(children, signal.SIGKILL) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in children:
        if child.returncode is None and child.pid is not None:
            log.error("process %d (%s) cannot be ended", child.pid, child.name)


def _signal(children: Sequence[Child], number: signal.Signals) -> bool:
    processes = [process for child in children for process in child.observe()]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
    return bool(processes)


# --- signals -------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that cleanup runs."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handlers(interrupt):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, a second Ctrl-C does not interrupt the cleanup of the first."""
    with _handlers(lambda _number, _frame: log.warning("stopping; please wait")):
        yield


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# --- supervision ---------------------------------------------------------------------------------


class Supervisor:
    """Keeps children running while its context is open, and stops them all when it closes.

    A child that ends is started again after a delay with full jitter that doubles from 1 s to
    60 s, and is 1 s again once the child has lived for a minute. A service manager hears of it.
    """

    def __init__(
        self,
        watch_seconds: float = WATCH_SECONDS,
        first_delay_seconds: float = FIRST_DELAY_SECONDS,
    ) -> None:
        self._children: list[Child] = []
        self._watched: list[_Watch] = []
        self._period, self._first_delay = watch_seconds, first_delay_seconds
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop watching, then stop every child with all that it started."""
        notify.stopping()
        with _undisturbed():
            self._ended.set()
            self._thread.join()
            stop_all(self._children)

    def start(self, child: Child, ready: Callable[[], None] | None = None) -> None:
        """Start a child, wait until it is ``ready`` if that is given, and watch it from then on."""
        self._children.append(child)
        child.start()
        if ready is not None:
            ready()
        with self._lock:
            self._watched.append(_Watch(child))

    def stop(self, child: Child, seconds: float = STOP_SECONDS) -> None:
        """Stop one child with all that it started, and watch it no more; it may be started again.

        Ctrl-C interrupts this; the child is then stopped with the others.
        """
        with self._lock:  # not in the middle of a restart
            self._watched = [watch for watch in self._watched if watch.child is not child]
        _end([child], seconds)
        self._children.remove(child)

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            with self._lock:
                for watch in self._watched:
                    watch.child.observe()
                    self._care_for(watch)
            notify.alive()

    def _care_for(self, watch: "_Watch") -> None:
        now = time.monotonic()
        if watch.child.returncode is None:
            if now - watch.since > HEALTHY_SECONDS:
                watch.failures = 0
            return
        if watch.due is None:
            bound = min(LONGEST_DELAY_SECONDS, self._first_delay * 2**watch.failures)
            delay = _random.uniform(0, bound)
            watch.due, watch.failures = now + delay, min(watch.failures + 1, 30)
            words = (watch.child.returncode, delay, watch.child.last_words())
            log.warning("%s ended (status %s), again in %.1f s; %s", watch.child.name, *words)
        if now >= watch.due:
            watch.due, watch.since = None, now
            self._restart(watch.child)

    def _restart(self, child: Child) -> None:
        try:
            child.start()
            log.info("%s started again", child.name)
        except (LaunchError, OSError) as error:
            log.error("%s: %s", child.name, error)


class _Watch:
    """A watched child and its history."""

    def __init__(self, child: Child) -> None:
        self.child, self.failures = child, 0
        self.since = time.monotonic()
        self.due: float | None = None
