"""What crosses between machines beside the messages of training, as schemas: golden/documents.json.

    python -m tests.lab.documents

Signed documents and those of joining are read strictly, so a change of one is a change for every
device in the field: it needs another ``format``. Over MQTT and at the hub fields may be added.
"""

from typing import Any

from pydantic import BaseModel

from common import hub_pb2, topics
from common.code import JoinAnswer, JoinRequest
from common.door import Checked
from common.manifest import Channel, Manifest
from common.membership import Membership
from common.portable import PortableAbout
from common.signing import KeySet
from tests.lab.golden import FOLDER, Schema, plain, text_of

PATH = FOLDER / "documents.json"
STRICT: tuple[type[BaseModel], ...] = (
    *(Channel, Checked, JoinAnswer, JoinRequest, KeySet, Manifest, Membership, PortableAbout),
)
TOLD: tuple[type[BaseModel], ...] = (
    *(topics.DeviceState, topics.Event, topics.Install, topics.ModelNotice),
    *(topics.Result, topics.RoundNotice, topics.Telemetry),
)


def described() -> dict[str, Schema]:
    """All of it, as it is now."""
    return {
        "strict": {kind.__name__: schema_of(kind) for kind in STRICT},
        "mqtt": {kind.__name__: schema_of(kind) for kind in TOLD},
        "hub": {name: _fields(message) for name, message in _hub().items()},
    }


def schema_of(kind: type[BaseModel]) -> Schema:
    """Fields, and which of them have to be there."""
    found = kind.model_json_schema()
    return {
        "fields": plain(found, found.get("$defs", {}))["properties"],
        "required": sorted(found.get("required", [])),
    }


def _hub() -> dict[str, Any]:
    return dict(hub_pb2.DESCRIPTOR.message_types_by_name)


def _fields(message: Any) -> Schema:
    return {f"{one.number}": f"{one.name}, type {one.type}" for one in message.fields}


if __name__ == "__main__":
    PATH.write_text(text_of(described()))
    print(f"wrote '{PATH}'")
