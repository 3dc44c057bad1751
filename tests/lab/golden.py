"""Messages of a real run as they travel, kept for later releases to read.

    python -m tests.lab.golden

writes what the present protocol says into tests/common/golden/protocol-N: the schema of every
message, and one message of every kind and shape from a run in the lab of a very small network. Once
a release has spoken a protocol its messages stay as they are.
"""

import base64
import hashlib
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common import protocols
from common.messages import (
    KINDS,
    AlignReply,
    AlignRequest,
    EvaluateRequest,
    HelloRequest,
    Lesson,
    Refusal,
    Reply,
    Request,
)
from common.wire import to_record
from server.models import Models
from tests.lab.network import Lab

FOLDER = Path(__file__).parents[1] / "common" / "golden"
LARGE = 200_004
"""Bytes of an array that does not lie beside the JSON."""
SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
LEFT_OUT = {"title", "description", "default", "required", "additionalProperties"}
"""Of a schema: words, and what a sender fills in before it sends."""

Schema = dict[str, Any]


# --- schemas -------------------------------------------------------------------------------------


def schema_of(protocol: int) -> Schema:
    """Every field of every message in that protocol, as today's classes and ADDED say."""
    return {name: _of_kind(name, protocol) for name in sorted(KINDS)}


def digest_of(schema: Schema) -> str:
    """What common/protocols.py pins."""
    return hashlib.sha256(text_of(schema).encode()).hexdigest()


def text_of(schema: Schema) -> str:
    """As a file holds it."""
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _of_kind(name: str, protocol: int) -> Schema:
    found = KINDS[name].model_json_schema()
    fields: Schema = plain(found, found.get("$defs", {}))["properties"]
    for one in protocols.additions(name, protocol):
        *parts, last = one.path
        within = fields
        for part in parts:
            within = _option(within[part], "properties")
        if one.value is None:
            del within[last]
        else:
            _option(within[last], "enum").remove(one.value)
    return fields


def _option(schema: Schema, key: str) -> Any:
    """What a field says under that key, or one of its options where it may be absent."""
    return next(one[key] for one in (schema, *schema.get("anyOf", [])) if key in one)


def plain(node: Any, parts: Schema) -> Any:
    """A schema without words, and with its parts in their places."""
    if isinstance(node, list):
        return [plain(one, parts) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return plain(parts[node["$ref"].rpartition("/")[2]], parts)
    if "properties" in node:
        fields = {name: plain(one, parts) for name, one in node["properties"].items()}
        return {"properties": fields}
    return {key: plain(one, parts) for key, one in node.items() if key not in LEFT_OUT | {"$defs"}}


# --- messages ------------------------------------------------------------------------------------


def as_json(record: RecordDict) -> Schema:
    """A record of common/wire.py as a file holds it."""
    message = record.config_records["message"]
    arrays: Mapping[str, Array] = record.array_records.get("arrays", {})
    return {
        "message": {
            name: {"base64": _packed(value)} if isinstance(value, bytes) else value
            for name, value in message.items()
        },
        "arrays": {
            name: {
                "dtype": array.dtype,
                "shape": list(array.shape),
                "stype": array.stype,
                "data": _packed(array.data),
            }
            for name, array in arrays.items()
        },
    }


def as_record(found: Schema) -> RecordDict:
    """Inverse of :func:`as_json`."""
    values = {
        name: _unpacked(value["base64"]) if isinstance(value, dict) else value
        for name, value in found["message"].items()
    }
    record = RecordDict({"message": ConfigRecord(values)})
    arrays = {
        name: Array(one["dtype"], tuple(one["shape"]), one["stype"], _unpacked(one["data"]))
        for name, one in found["arrays"].items()
    }
    if arrays:
        record["arrays"] = ArrayRecord(arrays)
    return record


def read(protocol: int) -> dict[str, RecordDict]:
    """The messages of a protocol by name, in the order in which they were said."""
    lines = (FOLDER / f"protocol-{protocol}" / "messages.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {one.pop("name"): as_record(one) for one in found}


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


# --- a run ---------------------------------------------------------------------------------------


def recorded(root: Path) -> Iterator[tuple[str, Request | Reply]]:
    """All messages of a run with a prune event, in their order, and those it has no need of."""
    options = {"options": SMALL, "anchor_images": 16, "epochs": 1}
    lab = Lab(root, 1, {"backbone": options}, prune_heads=0.5, rounds=4, moments="farms")
    heard: list[Request | Reply] = [HelloRequest()]

    def listen(_node: int, request: Request, reply: Reply) -> None:
        heard.extend([reply] if isinstance(request, HelloRequest) else [request, reply])

    lab.run(fault=listen)
    heard += _others([one for one in heard if isinstance(one, AlignRequest)], lab.server_dir)
    for number, message in enumerate(heard, start=1):
        yield f"{number:02} {shape_of(message)}", message


def _others(asked: list[AlignRequest], server: Path) -> Iterator[Request | Reply]:
    """What such a run does not say by itself."""
    first, *_, last = asked
    way = Models(server).way({first.base}, last.base)
    assert way is not None
    fields = {name: getattr(last, name) for name in AlignRequest.model_fields}
    fields |= {"attempt": 2, "steps": 2, "body_kind": way.kind, "body_from": way.start}
    yield AlignRequest(**{**fields, "body": way.body, "anchors_digest": None})
    plain = {"body_kind": "none", "body_from": None, "body": None}
    private = {"clip": 0.5, "noise": 1.0, "score_noise": 1.0}
    yield AlignRequest(**{**fields, **plain, "privacy": private})
    yield AlignRequest(**{**fields, "body_kind": "full", "body": np.zeros(LARGE, np.uint8)})
    taught = {**fields, **plain, "base_kind": "student", "base": last.mask, "criterion": None}
    yield AlignRequest(**{**taught, "lesson": Lesson(teacher=last.base, beta=0.5)})
    of_report = {name: taught[name] for name in EvaluateRequest.model_fields if name in taught}
    yield EvaluateRequest(**{**of_report, "kind": "evaluate", "label": "student"})
    yield Refusal(reason="missing_base", detail="this farm holds no such backbone")


def shape_of(message: Request | Reply) -> str:
    """What tells a message from others of its kind."""
    words: list[str] = [message.kind]
    if isinstance(message, AlignRequest | EvaluateRequest):
        words.append(message.body_kind)
        words += ["student"] if message.base_kind == "student" else []
        words += ["large"] if message.body is not None and len(message.body) == LARGE else []
    if isinstance(message, AlignRequest):
        parts = ("anchors", "criterion", "privacy", "lesson")
        words += [name for name in parts if getattr(message, name) is not None]
    if isinstance(message, AlignReply) and message.head_importance is not None:
        words.append("scores")
    return " ".join(words)


def main() -> None:
    """Write the files of the present protocol."""
    folder = FOLDER / f"protocol-{protocols.PROTOCOL}"
    schema = schema_of(protocols.PROTOCOL)
    if folder.exists():
        sys.exit(f"'{folder}' is there already; a protocol that was spoken does not change")
    with tempfile.TemporaryDirectory() as root:
        lines = [
            json.dumps({"name": name, **as_json(to_record(message))}, sort_keys=True)
            for name, message in recorded(Path(root))
        ]
    folder.mkdir(parents=True)
    (folder / "messages.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "schema.json").write_text(text_of(schema))
    print(f"wrote '{folder}'; its number in common/protocols.py: {digest_of(schema)}")


if __name__ == "__main__":
    main()
