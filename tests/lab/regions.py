"""Regions in the lab: each with its own server folder, farms in this process and a desk.

A region plays orders in a thread, or in a forked process that a test may kill. Its centre reaches
the desk directly; every byte that would cross the wire passes through :class:`DeskLine`.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import backbone, codec
from common.config import FarmConfig, NetworkConfig, RoundConfig, ServerConfig
from common.errors import LinkError
from common.mask import Mask
from common.messages import Array, EvaluateReply, EvaluateRequest, HelloReply, Reply
from common.services import RegionConfig
from common.spec import ModelSpec
from common.trainable import trainable_set
from server.centre import Orders, run_centre
from server.keys import SigningKeys
from server.region_desk import Desk
from server.region_link import Region, RegionLink
from server.region_play import play_orders
from server.region_record import HELLO, Order, RegionReply, sealed
from server.settings import RunSettings
from server.store import Store
from tests.lab.link import LabClock, LabLink
from tests.lab.network import Lab

CENTRE = "coop"
Farms = Sequence[tuple[FarmConfig, Path]]
Spoil = Callable[[str, bytes], bytes]


class PatientClock(LabClock):
    """A clock on which a second takes ten milliseconds at most: others have to get on, too."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        time.sleep(0.01)


class LabRegion:
    """One region: folder, settings, signing keys, farms."""

    def __init__(self, name: str, folder: Path, config: ServerConfig, farms: Farms) -> None:
        self.name, self.folder, self.farms = name, folder, list(farms)
        rules = RoundConfig(deadline_seconds=60, grace_seconds=0, min_farms=len(self.farms))
        self.config = config.model_copy(
            update={
                "server": NetworkConfig(name=name),
                "region": RegionConfig(centre=CENTRE, port=1, fewest=2),
                "rounds": rules,
            }
        )
        self.keys = SigningKeys.create(folder / "signing", name)

    def play(self, waiting: Callable[[], bool] = lambda: True) -> LabLink:
        """Play orders while ``waiting`` says so; returns the link to the farms."""
        link = LabLink(self.farms)
        play_orders(self.config, link, self.folder, PatientClock(), waiting)
        return link

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Play in a thread while the context is open."""
        over, failed = threading.Event(), []

        def play() -> None:
            try:
                self.play(lambda: not over.is_set())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(120)
            assert not thread.is_alive()
        assert not failed, failed

    def fork(self) -> int:
        """Play in another process until it is killed; returns its number."""
        return forked(self.play)

    def store(self) -> Store:
        """Its store, read-only."""
        return Store.open(self.folder / "fieldfed.db", read_only=True)

    def known(self, line: "DeskLine") -> Region:
        """The region as its centre knows it."""
        return Region(self.name, self.keys.keys, line)


class DeskLine:
    """The way to a desk in the same machine.

    Args:
        folder: of the region.
        spoil: changes what is taken, by the key of the question.
    """

    def __init__(self, folder: Path, spoil: Spoil | None = None) -> None:
        self._folder, self._spoil = folder, spoil
        self.given: list[bytes] = []
        self.taken: dict[str, bytes] = {}

    def give(self, order: bytes) -> None:
        self.given.append(order)
        with Desk.at(self._folder) as desk:
            desk.give(order)

    def take(self, key: str, attempt: int) -> bytes | None:
        with Desk.at(self._folder) as desk:
            data = desk.take(key, attempt)
        if data is not None:
            data = self._spoil(key, data) if self._spoil else data
            self.taken[key] = data
        return data

    def close(self) -> None:
        pass


class CutLine:
    """A line that is never there."""

    def give(self, order: bytes) -> None:
        raise LinkError("cut")

    def take(self, key: str, attempt: int) -> bytes | None:
        raise LinkError("cut")

    def close(self) -> None:
        pass


class Regions:
    """A lab network whose farms are spread over regions, and its centre.

    Args:
        root: folder of everything.
        sizes: farms of each region.
        settings: of the lab, by section.
        plan: settings of the plan.
    """

    def __init__(
        self,
        root: Path,
        sizes: Sequence[int] = (3, 2),
        settings: dict[str, dict[str, Any]] | None = None,
        **plan: Any,
    ) -> None:
        self.lab = Lab(root, sum(sizes), settings, **plan)
        self.folder = self.lab.server_dir
        rules = RoundConfig(deadline_seconds=250, grace_seconds=0, min_farms=len(sizes))
        self.config = self.lab.config.model_copy(
            update={"server": NetworkConfig(name=CENTRE), "rounds": rules}
        )
        self.regions, farms = [], iter(self.lab.farms)
        for number, size in enumerate(sizes):
            mine = [next(farms) for _ in range(size)]
            name = ("north", "south", "west")[number]
            self.regions.append(LabRegion(name, root / name, self.config, mine))
        self.lines = {one.name: DeskLine(one.folder) for one in self.regions}
        self._fresh = root.with_name(f"{root.name}-fresh")
        shutil.copytree(root, self._fresh)

    def restore(self) -> None:
        """Everything as it was before the first run."""
        shutil.rmtree(self.lab.root)
        shutil.copytree(self._fresh, self.lab.root)
        self.lines = {one.name: DeskLine(one.folder) for one in self.regions}

    @property
    def settings(self) -> RunSettings:
        return RunSettings(config=self.config, probe=False)

    def lead(self) -> int:
        """The centre plays its run to the end; the regions have to be playing."""
        known = [one.known(self.lines[one.name]) for one in self.regions]
        with ExitStack() as stack:

            def reach(orders: Orders) -> RegionLink:
                link = RegionLink(known, CENTRE, orders.describe, ask_seconds=0.02, seed=0)
                return stack.enter_context(link)

            return run_centre(reach, self.folder, self.settings)

    def run(self) -> None:
        """Regions and centre from the first line to the last."""
        with ExitStack() as stack:
            for one in self.regions:
                stack.enter_context(one.playing())
            self.lead()

    def store(self) -> Store:
        """The centre's store, read-only."""
        return Store.open(self.folder / "fieldfed.db", read_only=True)

    def candidates(self) -> list[str]:
        """Digests of the centre's candidates, by round."""
        with self.store() as store:
            return [row.digest for row in store.candidates(1).values()]


def forked(work: Callable[[], object]) -> int:
    """Do something in another process; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)


def kill(child: int) -> None:
    """SIGKILL, and wait until it is gone."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class Puppet:
    """A region without farms: what it answers is made up, sealed, and there at once.

    Args:
        name: of the region.
        folder: for its keys.
        dense: the backbone before any cut.
        twist: may change what is taken, by the order and the sealed record.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        dense: ModelSpec,
        twist: Callable[[Order, bytes], bytes] | None = None,
    ) -> None:
        self.name, self.keys = name, SigningKeys.create(folder / name, name)
        self._dense, self._twist = dense, twist
        self._answers: dict[str, bytes] = {}
        self.orders: list[Order] = []

    @property
    def region(self) -> Region:
        """As the centre knows it."""
        return Region(self.name, self.keys.keys, self)

    def give(self, data: bytes) -> None:
        order = Order.from_bytes(data)
        self.orders.append(order)
        if order.key not in self._answers:
            record = self.seal(order, self.reply(order))
            self._answers[order.key] = self._twist(order, record) if self._twist else record

    def take(self, key: str, attempt: int) -> bytes | None:
        if key == HELLO:
            hello = HelloReply(farm=self.name, examples=30, classes=9)
            return sealed(hello, self.name, CENTRE, HELLO, self.keys)
        return self._answers.get(key)

    def close(self) -> None:
        pass

    def seal(self, order: Order, reply: Reply) -> bytes:
        """A record in answer to an order."""
        return sealed(reply, self.name, CENTRE, order.key, self.keys)

    def reply(self, order: Order, **changes: Any) -> RegionReply | EvaluateReply:
        """Something plausible."""
        asked = order.request
        about = {**asked.identity(), "farm": self.name, "examples": 30, "accuracy": 0.5, "f1": 0.5}
        if isinstance(asked, EvaluateRequest):
            return EvaluateReply(**about, label=asked.label, seconds=1.0)
        sums = self._sums(order) if asked.criterion is not None else {}
        values = {
            "loss": 1.0,
            "dal": 0.0,
            "steps": 3,
            "train_seconds": 1.0,
            "seconds": 2.0,
            "farms": 3,
            "update": self._update(order),
        }
        return RegionReply(**(about | values | sums | changes))

    def _update(self, order: Order) -> Array:
        asked, spec = order.request, Mask.from_json(order.terms.mask).apply_to(self._dense)
        with torch.device("meta"):
            trained = trainable_set(backbone.build(spec), asked.train.trainable, asked.train.rank)
        values = self._rng(order).normal(0, 1e-4, trained.layout.count).astype(np.float32)
        return codec.encode(values, asked.base, bits=32, rank=trained.rank)

    def _sums(self, order: Order) -> dict[str, Array]:
        spec, rng = Mask.from_json(order.terms.mask).apply_to(self._dense), self._rng(order)
        made = {
            f"{kind}_mean": rng.random(sum(counts)).astype(np.float32)
            for kind, counts in (("head", spec.heads), ("neuron", spec.neurons))
        }
        most = {f"{kind}_most": 2 * made[f"{kind}_mean"] for kind in ("head", "neuron")}
        shift = rng.random(sum(spec.heads)).astype(np.float32)
        return {**made, **most, "shift": shift, "totals": np.array([9.0, 3.0], np.float32)}

    def _rng(self, order: Order) -> np.random.Generator:
        return np.random.default_rng([order.request.round, len(self.name)])
