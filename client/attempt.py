"""One try at what a channel names, in a process of its own (client/lookout.py starts it)."""

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from client.device import Device
from client.hub import HubClient, Offer
from client.lookout import Tried, offer_file, tried_file
from client.updater import Done
from common.config import FarmConfig
from common.errors import FieldfedError, StateError
from common.files import write_atomically
from common.logs import start_logging
from common.processes import terminate_like_interrupt
from common.settings import load_settings

log = logging.getLogger(__name__)


def main() -> int:
    """The program ``attempt SETTINGS STATE``: returns its exit status."""
    start_logging()
    config_path, state_dir = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        with terminate_like_interrupt():
            attempt(load_settings(FarmConfig, config_path), state_dir)
    except FieldfedError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def attempt(config: FarmConfig, state_dir: Path) -> None:
    """Check what serves, try what was offered, and write down what came of both.

    Raises:
        FieldfedError: as the updater does; or there is no offer.
    """
    device, done = Device(config, state_dir), list[Done]()
    with device.alone(), device.hub() as hub:
        try:
            _work(device, hub, _offer(state_dir), config.farm.link == "metered", done)
        finally:
            _write(state_dir, done)


def _work(device: Device, hub: HubClient, offer: Offer, compress: bool, done: list[Done]) -> None:
    updater = device.updater()
    back = updater.check(hub)
    if back is not None:
        done.append(back)
    done.append(updater.update(hub, compress=compress, offer=offer))


def _offer(state_dir: Path) -> Offer:
    path = offer_file(state_dir)
    try:
        return Offer(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StateError(f"'{path}' holds no offer: {error}; the hub is asked again") from error


def _write(state_dir: Path, done: Sequence[Done]) -> None:
    """Leave word of what has changed, or was decided; nothing new is no news."""
    tries = [
        Tried(outcome=one.outcome, version=one.version, words=one.words[:500], gain=_gain(one))
        for one in done
        if one.outcome is not None
    ]
    with contextlib.suppress(OSError):
        tried_file(state_dir).unlink(missing_ok=True)
    if tries:
        body = json.dumps([one.model_dump() for one in tries])
        write_atomically(tried_file(state_dir), body.encode())


def _gain(done: Done) -> float | None:
    """By how much a version is more often right than what served, on the same images."""
    if done.before is None or done.after is None:
        return None
    return round(done.after.accuracy - done.before.accuracy, 4)
