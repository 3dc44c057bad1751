"""Accounts for every byte that farms and server really exchanged.

A proxy between SuperNodes and the SuperLink keeps the body of every request and response
(proxy.py). ``inspect`` puts Flower's objects together again and passes each message through
common.wire. It is content-addressed bookkeeping: an object is named by the sha256 of its bytes, and
the decoded message, taken apart again, must yield exactly the objects that travelled. So a byte
that is not part of a typed message, wherever it hides, is an error.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError, Message

from common import codec
from common.compress import expand
from common.errors import FieldfedError
from common.messages import AlignReply, Reply, Request, Work
from common.programs import CHUNK_BYTES
from common.wire import from_record, size_of
from tests.system.proxy import PREFIX, Exchange

Direction = Literal["down", "up"]
MAX_ERROR_BYTES = 20_000
MAX_UPDATE_BYTES = 100_000_000
MAX_BUNDLE_BYTES = 2_000
MAX_REPLY_TEXT_BYTES = 6_000

SCHEMA: dict[str, tuple[type[Message], type[Message]]] = {
    "register-node": (fleet_pb2.RegisterNodeFleetRequest, fleet_pb2.RegisterNodeFleetResponse),
    "activate-node": (fleet_pb2.ActivateNodeRequest, fleet_pb2.ActivateNodeResponse),
    "deactivate-node": (fleet_pb2.DeactivateNodeRequest, fleet_pb2.DeactivateNodeResponse),
    "unregister-node": (
        fleet_pb2.UnregisterNodeFleetRequest,
        fleet_pb2.UnregisterNodeFleetResponse,
    ),
    "send-node-heartbeat": (
        heartbeat_pb2.SendNodeHeartbeatRequest,
        heartbeat_pb2.SendNodeHeartbeatResponse,
    ),
    "get-run": (run_pb2.GetRunRequest, run_pb2.GetRunResponse),
    "get-fab": (fab_pb2.GetFabRequest, fab_pb2.GetFabResponse),
    "pull-messages": (fleet_pb2.PullMessagesRequest, fleet_pb2.PullMessagesResponse),
    "push-messages": (fleet_pb2.PushMessagesRequest, fleet_pb2.PushMessagesResponse),
    "pull-object": (message_pb2.PullObjectRequest, message_pb2.PullObjectResponse),
    "push-object": (message_pb2.PushObjectRequest, message_pb2.PushObjectResponse),
    "confirm-message-received": (
        message_pb2.ConfirmMessageReceivedRequest,
        message_pb2.ConfirmMessageReceivedResponse,
    ),
}


class LeakError(AssertionError):
    """Bytes travelled that are not part of a typed message."""


@dataclass(frozen=True)
class WireMessage:
    """A message as it travelled; ``size`` is what the server counts for it."""

    direction: Direction
    kind: str
    size: int
    message: Request | Reply


# --- inspect -------------------------------------------------------------------------------------


def inspect(
    recording: Sequence[Exchange], max_bundle_bytes: int = MAX_BUNDLE_BYTES
) -> list[WireMessage]:
    """Every message of a recording, in order.

    Args:
        recording: what passed between the SuperLink and ALL its SuperNodes: what two farms say
            alike travels once.
        max_bundle_bytes: of the Flower app; ours has no code in it.

    Raises:
        LeakError: something does not decode, or bytes belong to no message.
    """
    parsed = [_parse(exchange, max_bundle_bytes) for exchange in recording]
    objects = _objects_of(parsed)
    accounted: set[str] = set()
    asked: dict[str, Any] = {}
    messages = []
    with _cut_as_on_the_wire():
        for direction, head, tree in _heads_of(parsed):
            _check_envelope(direction, head, asked)
            wire, used = _assemble(direction, head, tree, objects)
            accounted |= used
            messages.append(wire)
    if stray := objects.keys() - accounted:
        size = sum(len(objects[name]) for name in stray)
        raise LeakError(f"{len(stray)} objects ({size} bytes) belong to no message")
    return messages


def _parse(exchange: Exchange, max_bundle_bytes: int) -> tuple[str, Any, Any]:
    name = exchange.name
    if name not in SCHEMA or not exchange.path.startswith(PREFIX):
        raise LeakError(f"'{exchange.path}' is not a path that farms use")
    request_type, response_type = SCHEMA[name]
    request = _exactly(request_type, exchange.request)
    if exchange.status != 200:
        if len(exchange.response) > MAX_ERROR_BYTES:
            raise LeakError(f"{name}: an error of {len(exchange.response)} bytes")
        return name, request, response_type()
    response = _exactly(response_type, exchange.response)
    if name == "get-fab" and len(response.fab.content) > max_bundle_bytes:
        raise LeakError(f"the bundle has {len(response.fab.content)} bytes: does it carry code?")
    return name, request, response


def _exactly(kind: type[Message], data: bytes) -> Any:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise LeakError(f"not a {kind.__name__}: {error}") from None
    message.DiscardUnknownFields()
    if message.ByteSize() != len(data):
        raise LeakError(f"{len(data) - message.ByteSize()} stray bytes in a {kind.__name__}")
    return message


def _objects_of(parsed: Sequence[tuple[str, Any, Any]]) -> dict[str, bytes]:
    objects: dict[str, bytes] = {}
    for name, request, response in parsed:
        content = b""
        if name == "push-object":
            content = request.object_content
        elif name == "pull-object" and response.object_available:
            content = response.object_content
        if content:
            if hashlib.sha256(content).hexdigest() != request.object_id:
                raise LeakError("an object is not what its name says")
            objects[request.object_id] = content
    return objects


def _heads_of(parsed: Sequence[tuple[str, Any, Any]]) -> Iterator[tuple[Direction, Any, Any]]:
    for name, request, response in parsed:
        if name == "pull-messages":
            direction: Direction = "down"
            body = response
        elif name == "push-messages":
            direction, body = "up", request
        else:
            continue
        if len(body.messages_list) != len(body.message_object_trees):
            raise LeakError("messages and object trees differ in number")
        for head, tree in zip(body.messages_list, body.message_object_trees, strict=True):
            yield direction, head, tree


def _check_envelope(direction: Direction, head: Any, asked: dict[str, Any]) -> None:
    """Flower's own fields: no content, no free text that the server did not send."""
    if head.content.ByteSize():
        raise LeakError("a message carries its content outside of its objects")
    if head.HasField("error"):
        raise LeakError(f"an error travels instead of a message: {head.error.reason[:200]}")
    data = head.metadata
    if direction == "down":
        asked[data.message_id] = data
        return
    question = asked.get(data.reply_to_message_id)
    if question is None:
        raise LeakError("a reply to nothing that was asked")
    if (data.group_id, data.message_type) != (question.group_id, question.message_type):
        raise LeakError("a reply whose labels are not those of its request")


def _assemble(
    direction: Direction, head: Any, tree: Any, objects: dict[str, bytes]
) -> tuple[WireMessage, set[str]]:
    used = _reachable(tree.object_id, objects)
    if set(_names_in(tree)) != used:
        raise LeakError("an object tree names other objects than its message")
    try:
        contents = {name: objects[name] for name in used}
        whole = inflate_object_from_contents(tree.object_id, contents)
    except Exception as error:
        raise LeakError(f"not a Flower message: {error!r}") from error
    if not isinstance(whole, FlowerMessage) or not whole.has_content():
        raise LeakError("the root of an object tree is not a message with content")
    if set(get_all_nested_objects(whole)) != used:
        raise LeakError("taken apart again, a message is not what travelled")
    record = whole.content
    try:
        message = from_record(record)
    except FieldfedError as error:
        raise LeakError(f"{direction}: {error}") from error
    if direction == "up":
        _check_reply(message, record)
    size = sum(len(objects[name]) for name in used - {tree.object_id})
    assert size == size_of(record)
    return WireMessage(direction, message.kind, size, message), used


def _check_reply(message: Request | Reply, record: RecordDict) -> None:
    """What a farm says: an update is a coded update to its last byte, text stays short."""
    if isinstance(message, Work) or message.kind == "hello":
        raise LeakError("a farm sent a request")
    if len(str(record["message"]["json"])) > MAX_REPLY_TEXT_BYTES:
        raise LeakError(f"a '{message.kind}' with long text")
    if isinstance(message, AlignReply):
        try:
            update = expand(message.update, MAX_UPDATE_BYTES)
            header = codec.read_header(update)
            codec.decode(update, base=message.base, count=header.count)
        except FieldfedError as error:
            raise LeakError(f"align_reply.update: {error}") from error


def _reachable(name: str, objects: dict[str, bytes]) -> set[str]:
    if name not in objects:
        raise LeakError(f"object {name[:12]} of a message did not travel")
    try:
        _, children, _ = get_object_head_values_from_object_content(objects[name])
    except ValueError as error:
        raise LeakError(f"object {name[:12]} has no Flower header: {error}") from error
    return {name}.union(*(_reachable(child, objects) for child in children))


def _names_in(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _names_in(child)


@contextmanager
def _cut_as_on_the_wire() -> Iterator[None]:
    """Flower reads its chunk size once, from the environment of the process that imports it."""
    with mock.patch("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK_BYTES):
        yield
