"""Typed messages <-> Flower records: one obvious mapping, checked strictly on the way in.

A message becomes a RecordDict of

    message   ConfigRecord {protocol: int, kind: str, json: str, FIELD: bytes, ...}: every field
              that is not an array as canonical JSON (sorted keys, no spaces), so that one value
              has one encoding; arrays of at most ``SMALL_BYTES`` as they lie in memory
    arrays    ArrayRecord {field: flat array}: larger ones, uint8 or float32; absent without any

Flower sends every record, array and piece of an array by an HTTP request of its own, with a
kilobyte of headers; hence small arrays lie beside the JSON. Larger ones are cut into pieces, each
of which can be sent again.

Nothing else is let in: no further record, key or array, no second spelling of the same JSON, no
byte behind an array. Large arrays are .npy bytes, but nothing of them is parsed, let alone
unpickled: their header must be the one that numpy writes for a flat array of that type and length,
and the length is compared with the bytes that are there before anything is made of them.
"""

import io
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias, get_args, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from numpy.lib import format as npy
from pydantic import ValidationError

from common import protocols
from common.errors import ProtocolError, RejectReason
from common.messages import Bytes, Floats, Message, Refusal, Reply, Request

MAX_ARRAY_BYTES = 2_000_000_000
MAX_JSON_BYTES = 1_000_000
SMALL_BYTES = 200_000
"""A minute on a link of 32 kbit/s, which Flower waits for."""

MESSAGE, ARRAYS = "message", "arrays"
_ENVELOPE = {"protocol", "kind"}
_NUMPY = "numpy.ndarray"

Kind: TypeAlias = type[Message]
Dtype: TypeAlias = np.dtype[Any]

_KINDS: dict[str, Kind] = {
    kind.model_fields["kind"].default: kind for kind in (*get_args(Request), *get_args(Reply))
}
_DTYPES: dict[str, Dtype] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}


# --- encode --------------------------------------------------------------------------------------


def to_record(message: Request | Reply) -> RecordDict:
    """The record of a message; its arrays are copied."""
    arrays = {name: getattr(message, name) for name in _array_fields(type(message))}
    present = {name: array for name, array in arrays.items() if array is not None}
    present = protocols.without(message.kind, present, message.protocol)
    small = {name: a.tobytes() for name, a in present.items() if a.nbytes <= SMALL_BYTES}
    large = {name: Array(array) for name, array in present.items() if name not in small}
    text = _text_of(message)
    record = RecordDict(
        {
            MESSAGE: ConfigRecord(
                {"protocol": message.protocol, "kind": message.kind, "json": text, **small}
            )
        }
    )
    if large:
        record[ARRAYS] = ArrayRecord(large)
    return record


def message_type(request: Request) -> str:
    """Flower's type of a request; it selects the function that answers on the farm."""
    return {
        "hello": "query.hello",
        "align": "train.align",
        "evaluate": "evaluate.report",
    }[request.kind]


def size_of(record: RecordDict) -> int:
    """Bytes of all objects that Flower sends for a record; what the server counts as traffic.

    Objects are the records, arrays and array chunks, each with its header; equal chunks of one
    message travel once. Flower's own envelope (ids, times, object trees) is not counted.
    """
    with no_object_id_recompute():
        return sum(len(item.deflate()) for item in get_all_nested_objects(record).values())


def _text_of(message: Message) -> str:
    left_out = _ENVELOPE | set(_array_fields(type(message)))
    values = message.model_dump(mode="json", exclude=left_out)
    values = protocols.without(_kind_name(type(message)), values, message.protocol)
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


@cache
def _array_fields(kind: Kind) -> Mapping[str, Dtype]:
    """Names of a message's array fields and what they hold."""
    found: dict[str, Dtype] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        options = (hint, *get_args(hint))  # the field's type itself, or one of a union
        if Bytes in options:
            found[name] = _DTYPES["uint8"]
        elif Floats in options:
            found[name] = _DTYPES["float32"]
    return found


# --- decode --------------------------------------------------------------------------------------


def from_record(record: RecordDict, max_array_bytes: int = MAX_ARRAY_BYTES) -> Request | Reply:
    """The message of a record. Its arrays are read-only views of the record's bytes.

    Raises:
        ProtocolError: PROTOCOL for a number that is not spoken, OVERSIZED for an array or text that
            is too large, MALFORMED for anything else that is not exactly a message; names the
            record, key or field.
    """
    envelope = _envelope(record)
    kind = _kind_of(envelope)
    values = _values_of(envelope)
    arrays = _small_arrays_of(envelope, kind, max_array_bytes)
    large = _arrays_of(record, kind, max_array_bytes)
    if twice := arrays.keys() & large.keys():
        raise ProtocolError(f"{_kind_name(kind)}: '{min(twice)}' is there twice")
    arrays |= large
    if clash := (_ENVELOPE | arrays.keys()) & values.keys():
        raise ProtocolError(f"{_kind_name(kind)}: '{min(clash)}' does not belong into the JSON")
    protocols.require_known(_kind_name(kind), {**values, **arrays}, envelope["protocol"])
    try:
        message = kind.model_validate(
            {**values, **arrays, "protocol": envelope["protocol"], "kind": envelope["kind"]}
        )
    except ValidationError as error:
        raise ProtocolError(f"{_kind_name(kind)}: {_first(error)}") from None
    if _text_of(message) != envelope["json"]:
        raise ProtocolError(f"{_kind_name(kind)}: its JSON is not in canonical form")
    assert isinstance(message, Request | Reply)
    return message


def _envelope(record: RecordDict) -> Mapping[str, Any]:
    """The ConfigRecord, its protocol checked before anything else is looked at."""
    envelope = record.get(MESSAGE)
    if not isinstance(envelope, ConfigRecord):
        raise ProtocolError(f"there is no ConfigRecord '{MESSAGE}': not a fieldfed message")
    protocol = envelope.get("protocol")
    if type(protocol) is not int:
        raise ProtocolError(f"record '{MESSAGE}' has no protocol number")
    if envelope.get("kind") != _kind_name(Refusal):
        protocols.require_spoken(protocol)
    _refuse_unknown("record", record.keys(), {MESSAGE, ARRAYS})
    return envelope


def _kind_of(envelope: Mapping[str, Any]) -> Kind:
    name = envelope.get("kind")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"unknown kind of message {_short(name)}")
    return kind


def _values_of(envelope: Mapping[str, Any]) -> dict[str, Any]:
    text = envelope.get("json")
    if not isinstance(text, str):
        raise ProtocolError(f"record '{MESSAGE}' has no JSON text")
    if len(text) > MAX_JSON_BYTES:
        raise ProtocolError(
            f"the JSON of a message has {len(text)} characters, at most {MAX_JSON_BYTES} pass",
            RejectReason.OVERSIZED,
        )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"record '{MESSAGE}' does not hold JSON: {error}") from None
    if not isinstance(values, dict):
        raise ProtocolError(f"the JSON of a message is an object, not {type(values).__name__}")
    return values


def _small_arrays_of(envelope: Mapping[str, Any], kind: Kind, limit: int) -> dict[str, Any]:
    fields = _array_fields(kind)
    _refuse_unknown(
        f"key of record '{MESSAGE}':", envelope.keys(), {"protocol", "kind", "json", *fields}
    )
    found = {}
    for name in envelope.keys() & fields.keys():
        data, where = envelope[name], f"{_kind_name(kind)}.{name}"
        if not isinstance(data, bytes) or len(data) % fields[name].itemsize:
            raise ProtocolError(f"{where} is not the bytes of a flat {fields[name]}")
        if len(data) > min(limit, SMALL_BYTES):
            raise ProtocolError(
                f"{where} has {len(data)} bytes, at most {min(limit, SMALL_BYTES)} pass there",
                RejectReason.OVERSIZED,
            )
        found[name] = np.frombuffer(data, fields[name])
    return found


def _arrays_of(record: RecordDict, kind: Kind, limit: int) -> dict[str, Any]:
    arrays = record.get(ARRAYS)
    if arrays is None:
        return {}
    if not isinstance(arrays, ArrayRecord) or not arrays:
        raise ProtocolError(f"record '{ARRAYS}' is not an ArrayRecord that holds something")
    fields = _array_fields(kind)
    _refuse_unknown(f"array of {_kind_name(kind)}:", arrays.keys(), set(fields))
    return {
        name: _parse(array, fields[name], f"{_kind_name(kind)}.{name}", limit)
        for name, array in arrays.items()
    }


def _parse(array: Array, dtype: Dtype, where: str, limit: int) -> np.ndarray[Any, Any]:
    """One flat array from .npy bytes; refused before anything is allocated."""
    if len(array.data) > limit:
        raise ProtocolError(
            f"{where} has {len(array.data)} bytes, at most {limit} pass", RejectReason.OVERSIZED
        )
    if array.stype != _NUMPY:
        raise ProtocolError(f"{where} is serialised as {_short(array.stype)}, not as {_NUMPY}")
    flat = len(array.shape) == 1 and type(array.shape[0]) is int and array.shape[0] >= 0
    if _DTYPES.get(array.dtype) != dtype or not flat:
        raise ProtocolError(
            f"{where} is {_short(array.dtype)} {_short(array.shape)}, a flat {dtype} is expected"
        )
    (count,) = array.shape
    header = _npy_header(dtype, count)
    if not array.data.startswith(header):
        raise ProtocolError(f"{where} does not start as the .npy bytes of {count} {dtype} do")
    if len(array.data) != len(header) + count * dtype.itemsize:
        found = len(array.data) - len(header)
        raise ProtocolError(f"{where}: {count} {dtype} announced, {found} bytes found")
    if count * dtype.itemsize <= SMALL_BYTES:
        raise ProtocolError(f"{where}: {count} {dtype} belong beside the JSON")
    return np.frombuffer(array.data, dtype, count=count, offset=len(header))


def _npy_header(dtype: Dtype, count: int) -> bytes:
    """The one header that numpy writes for such an array: compared, so never parsed."""
    stream = io.BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    npy.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _refuse_unknown(what: str, found: Any, known: set[str]) -> None:
    if unknown := set(found) - known:
        raise ProtocolError(f"unknown {what} {_short(min(unknown))}")


def _first(error: ValidationError) -> str:
    item = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in item["loc"]) or "message"
    return f"'{field[:80]}': {item['msg'][:200]}"


def _kind_name(kind: Kind) -> str:
    return str(kind.model_fields["kind"].default)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
