"""The device agent: ``fieldfed-client run``, all that a device of a farm does, in one command.

    training    a SuperNode, always connected or in shifts                     (client/launch.py)
    updates     what the channel names, tried by a process that ends           (client/lookout.py)
    camera      a process that classifies what a camera drops                  (client/camera.py)
    telling     state, telemetry, results, events, over MQTT                   (client/teller.py)
                to Home Assistant                                              (client/discovery.py)
                to Prometheus                                                  (client/figures.py)
    hearing     a round is open, a version is there, install it                (client/notices.py)

Each works without the others: without a broker nothing is told, without a hub the server sends its
bodies inline, without a server photographs are classified all the same. What is heavy has a process
of its own; this one stays light. Training is the main thread's; the follower and the chores have a
thread each, and whatever fails there is logged and tried again.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from client import discovery, health
from client.camera import camera, results_file
from client.chores import Chore
from client.faults import Faults
from client.health import Health
from client.launch import Training
from client.ledger import FILE, Ledger
from client.lookout import Lookout
from client.member import Member
from client.notices import Notices
from client.portrait import Portrait
from client.results import Results
from client.schedule import Follower
from client.shifts import notify as wake
from client.teller import Teller
from common import notify
from common.broker import Broker
from common.config import FarmConfig
from common.errors import ConfigError, FieldfedError
from common.processes import Child, Supervisor, terminate_like_interrupt
from common.release import release
from common.topics import RESERVED, Event

if TYPE_CHECKING:
    from client.figures import DeviceFigures

log = logging.getLogger(__name__)

TICK_SECONDS, WATCH_SECONDS, STATE_SECONDS, TELEMETRY_SECONDS = 1.0, 2.0, 5.0, 60.0
RETRY_SECONDS = 60.0
JOIN_SECONDS = 5.0
NETWORK = "fieldfed"
"""By default a server has this name; what the farm has joined says better."""


def run_device(
    config: FarmConfig,
    config_path: Path,
    state_dir: Path,
    stop: threading.Event | None = None,
) -> None:
    """Do all that a device does until Ctrl-C, SIGTERM or ``stop``; then end all it started.

    Args:
        config: the farm's settings.
        config_path: the file they came from; the programs read it again.
        state_dir: where the farm keeps its state and Flower's files.
        stop: ends the call when set, for use outside the main thread.

    Raises:
        ConfigError: the server is on another machine, the settings file does not exist, or the
            device has a name that no device may have on a broker.
        LaunchError: Flower is not installed.
    """
    agent = Agent(config, config_path, state_dir)
    stop = stop or threading.Event()
    try:
        with terminate_like_interrupt():
            agent.run(stop.wait)
    except KeyboardInterrupt:
        log.info("%s stopped", config.farm.name)


class Agent:
    """All that a device does; see :func:`run_device` for the arguments."""

    def __init__(self, config: FarmConfig, config_path: Path, state_dir: Path) -> None:
        farm = config.farm
        self.device = _name(config)
        self._config, self._config_path, self._state_dir = config, config_path, state_dir
        self._training = Training(config, config_path, state_dir)
        self._member = Member(config, state_dir)
        self._lookout = Lookout(self._member, config_path, state_dir, self._event)
        metered = farm.link == "metered"
        self._follower = Follower(self._lookout, hours=farm.update_hours, metered=metered)
        self._portrait = Portrait(config, state_dir, lambda: self._lookout.offered)
        self._health = Health(state_dir)
        self._shown: DeviceFigures | None = None
        self.network = self._network()
        self._teller = None if config.broker is None else self._make_teller(config.broker)
        self._faults = Faults(self._fault)
        self._supervisor = Supervisor()
        self._camera: Child | None = None
        self._results: Results | None = None
        self._ended = threading.Event()

    @property
    def faults(self) -> tuple[str, ...]:
        """Names of programs that keep dying."""
        return self._faults.names

    # --- its life ----------------------------------------------------------------------------

    def run(self, wait: Callable[[float], bool]) -> None:
        """Run until ``wait`` (so many seconds) says that this is over; ends all that it started."""
        threads = [
            threading.Thread(target=self._follow, name="follower", daemon=True),
            threading.Thread(target=self._do_chores, name="chores", daemon=True),
        ]
        if self._teller is not None:  # it tells "offline" while the programs end
            threads.append(threading.Thread(target=self._close, name="teller", daemon=True))
        with ExitStack() as stack:
            stack.callback(self._join, threads)
            stack.enter_context(self._training)  # the SuperNode signs off through it
            stack.enter_context(self._supervisor)
            stack.callback(self._end)
            notify.ready(f"farm {self._config.farm.name}")
            self._event(
                Event(kind="started", words=f"fieldfed {release()} {health.model()}".strip())
            )
            self._show(stack)
            for thread in threads:
                thread.start()
            self._training.run(self._supervisor, wait, self._shift)

    def _show(self, stack: ExitStack) -> None:
        """Show Prometheus figures of this device, if that is wanted and the port is free."""
        if self._config.metrics is None:
            return
        from client.figures import DeviceFigures, showing

        shown = DeviceFigures()
        try:
            stack.enter_context(showing(self._config.metrics, shown))
        except (FieldfedError, OSError) as error:
            log.error("%s; %s runs without", error, self.device)
            return
        self._shown = shown

    def _end(self) -> None:
        self._ended.set()
        self._lookout.stop()
        self._follower.stop()

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join(JOIN_SECONDS)

    def _close(self) -> None:
        self._ended.wait()
        assert self._teller is not None
        self._teller.close()

    def _follow(self) -> None:
        """Follow the channel, as soon as the farm has joined a network that has one."""
        while not self._lookout.has_hub():
            if self._ended.wait(RETRY_SECONDS):
                return
        if self._teller is not None and self._network() != self.network:
            log.warning(
                "%s joined a network; it is known there once this is restarted", self.device
            )
        self._follower.run()

    # --- what happens ------------------------------------------------------------------------

    def _event(self, event: Event) -> None:
        if self._teller is not None:
            self._teller.event(event)

    def _shift(self, awake: bool) -> None:
        self._portrait.asleep = not awake
        words = "connected to its server" if awake else "not connected until it is woken"
        self._event(Event(kind="woken" if awake else "asleep", words=words))

    def _fault(self, program: str, deaths: int) -> None:
        words = f"{program} has ended {deaths} times within minutes; its log on the device says why"
        log.error("%s", words)
        self._event(Event(kind="fault", words=words))

    def _install(self, version: int) -> None:
        if self._lookout.has_hub():
            self._follower.install(version)
            return
        words = f"version {version} was ordered, but no network that this farm joined delivers any"
        self._event(Event(kind="update", outcome="refused", version=version, words=words))

    # --- chores ------------------------------------------------------------------------------

    def _do_chores(self) -> None:
        chores = self._chores()
        while not self._ended.wait(TICK_SECONDS):
            for chore in chores:
                chore.do()

    def _chores(self) -> list[Chore]:
        chores = [Chore("watching programs", WATCH_SECONDS, self._watch_programs)]
        if self._config.watch is not None:
            chores.append(Chore("the camera", RETRY_SECONDS, self._start_camera))
        if self._teller is not None:
            chores += [
                Chore("telling", RETRY_SECONDS, self._teller.open),
                Chore("telling what happened", 10.0, self._teller.hand_on_events),
            ]
            if self._config.watch is not None:
                chores.append(Chore("telling results", TICK_SECONDS, self._tell_results))
        if self._teller is not None or self._shown is not None:
            chores.append(Chore("looking at itself", STATE_SECONDS, self._look))
            chores.append(Chore("measuring", TELEMETRY_SECONDS, self._measure, jitter=0.1))
        return chores

    def _watch_programs(self) -> None:
        watching = [] if self._camera is None else [self._camera]
        self._faults.look([*self._training.children, *watching])

    def _start_camera(self) -> None:
        if self._camera is None:
            made = camera(self._config_path, self._state_dir)
            self._supervisor.start(made)
            self._camera = made

    def _look(self) -> None:
        """Tell what the device is: its own topic, Home Assistant, Prometheus."""
        state = self._portrait.look()
        if self._shown is not None:
            self._shown.state = state
        if self._teller is not None:
            self._teller.state(state)
            topic = discovery.topic(self.network, self.device)
            said = discovery.payload(self.network, self.device, state, TELEMETRY_SECONDS)
            self._teller.announce(topic, said)

    def _measure(self) -> None:
        telemetry = self._health.measure()
        if self._teller is not None:
            telemetry = self._teller.with_outbox(telemetry)
        if self._shown is not None:
            self._shown.telemetry = telemetry
        if self._teller is not None:
            self._teller.telemetry(telemetry)

    def _tell_results(self) -> bool:
        """Returns whether there are more."""
        assert self._teller is not None
        if self._results is None:
            told = self._teller.told()
            if told is None:  # nowhere to put them yet
                return False
            self._results = Results(results_file(self._state_dir), self._teller.result, told)
        return self._results.hand_on()

    # --- beginnings --------------------------------------------------------------------------

    def _network(self) -> str:
        if not self._member.joined:
            return NETWORK
        try:
            return self._member.membership().network
        except ConfigError as error:
            log.error("%s; on the broker its network is called '%s' meanwhile", error, NETWORK)
            return NETWORK

    def _make_teller(self, broker: Broker) -> Teller:
        notices = Notices(
            self.network,
            self.device,
            self._config.farm.channel,
            wake=self._wake,
            news=self._follower.notice,
            install=self._install,
            seen=lambda: self._lookout.seen,
        )
        path = self._state_dir / "outbox.db"
        ledger = Ledger.open(self._state_dir / FILE)
        return Teller(broker, self.network, self.device, path, notices.topics, notices.take, ledger)

    def _wake(self) -> None:
        if self._config.farm.link == "metered":
            wake(self._state_dir)


def _name(config: FarmConfig) -> str:
    """The device's name; raises ConfigError for one that means something else on a broker."""
    name = config.farm.device or config.farm.name
    if config.broker is not None and name in RESERVED:
        raise ConfigError(
            f"a device on a broker cannot be called '{name}', since topics there are; set 'device' "
            "in [farm] to another name"
        )
    return name
