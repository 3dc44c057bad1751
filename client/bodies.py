"""A body that a request only names, fetched from the hub: a cut line costs one piece of it.

This belongs to the process that speaks with Flower, not to the one that computes: that one is a
fork, and gRPC does not outlive a fork.
"""

import logging
from pathlib import Path

import numpy as np

from client import traffic
from client.device import Device
from client.state import FarmState
from common.config import FarmConfig
from common.errors import FieldfedError, LinkError
from common.membership import Membership
from common.messages import Request, Work
from common.objects import Objects

log = logging.getLogger(__name__)


def can_fetch(state_dir: Path) -> bool:
    """Whether this farm is a member of a network that has a hub."""
    path = state_dir / "membership.json"
    try:
        return path.is_file() and Membership.load(path).hub is not None
    except FieldfedError as error:
        log.warning("%s", error)
        return False


def with_body(request: Request, config: FarmConfig, state_dir: Path) -> Request:
    """The request with the body that it names, where the farm needs it; otherwise as it is.

    Raises:
        LinkError: it did not come, for whatever reason; the log has it. What came is kept.
    """
    if not isinstance(request, Work) or request.body_kind != "hub":
        return request
    name, size = request.body_object, request.body_bytes
    if request.base in FarmState(state_dir).held():
        return request
    if name is None or size is None:
        raise LinkError("the request names no object to fetch")
    try:
        body = np.frombuffer(_fetch(name, size, Device(config, state_dir), state_dir), np.uint8)
    except FieldfedError as error:
        log.error("%s", error)  # its text may name folders, which the server has not to know
        raise LinkError(f"backbone {request.base[:12]} did not come from the hub") from error
    return request.model_copy(update={"body_kind": "full", "body": body})


def _fetch(name: str, size: int, device: Device, state_dir: Path) -> bytes:
    objects = Objects(state_dir / "bodies")
    if not objects.has(name):
        objects.keep_only([name])  # others, also half of them, are of candidates that are past
        with device.hub() as hub:
            fetched = hub.fetch({name: size}, objects)
        traffic.fetched(state_dir, fetched.bytes)
        log.info("a backbone of %.1f MB came from the hub, %d cuts", size / 1e6, fetched.cuts)
    return objects.load(name, size)
