"""Which protocols of training are spoken, and what the newer one added.

A release speaks the protocol it was made with and the one before, so that a server can be upgraded
first and its farms over the following weeks. Nobody announces a number. The server asks in its own;
a farm that is older refuses in *its* number, and is asked again in that (server/requests.py). A
farm answers in the number of the request.

A protocol only adds: fields, whose default means what was done before there were any, and values
of fields. ``ADDED`` names them, so an older message is read with today's classes, and today's is
written as the older protocol has it. Whatever has to go goes when no protocol that has it is
spoken any more.

    a request that needs what the farm's protocol lacks is not sent: the farm sits out
    a reply leaves it out: who asked in the older protocol cannot miss it
    a field that the message's own protocol lacks is unknown, and refused, like any other
    a refusal has one form in all protocols, and is read whatever its number

After a change to a message: the next number with its schema's digest in ``SCHEMAS``, what is new
in ``ADDED``, the oldest number gone from both, and ``python -m tests.lab.golden``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from common.errors import ProtocolError, RejectReason

SCHEMAS: Mapping[int, str] = {
    3: "f9542a2e3c709240db357ad3f49aa8bde6c21f32720fcac16b88351c9de17e32",
    4: "3c1af97b96104a86dd6e4da58592295e228d405ea70f27d9ba7474c3efc20bc2",
}
"""The protocols spoken; sha256 of what tests/common/golden/protocol-N/schema.json says of each."""

ADDED: Mapping[int, tuple[str, ...]] = {
    4: (
        "align.base_kind",
        "align.lesson",
        "align.moments",
        "align.train.self_distil",
        "align.train.self_distil_temperature",
        "align_reply.moments",
        "evaluate.base_kind",
        "evaluate.train.self_distil",
        "evaluate.train.self_distil_temperature",
    ),
}
"""By protocol, what the one before lacks: KIND.FIELD, KIND.FIELD.FIELD, or KIND.FIELD=VALUE."""

PROTOCOL = max(SCHEMAS)
"""What this release speaks by itself."""


def older(protocol: int | None) -> bool:
    """Whether who speaks this, where that is known, is of a release before this one."""
    return protocol is not None and protocol < PROTOCOL


class Addition(NamedTuple):
    """A field of a message, or with ``value`` one value of it."""

    path: tuple[str, ...]
    value: str | None

    @property
    def words(self) -> str:
        """As an operator reads it."""
        name = ".".join(self.path)
        return f"'{name}'" if self.value is None else f"'{name}' = '{self.value}'"


def additions(kind: str, protocol: int) -> list[Addition]:
    """What this kind of message has and, in that protocol, has not."""
    names = [name for number, new in ADDED.items() if number > protocol for name in new]
    found = [_parsed(name) for name in names]
    return [Addition(path[1:], value) for path, value in found if path[0] == kind]


def _parsed(name: str) -> Addition:
    path, _, value = name.partition("=")
    return Addition(tuple(path.split(".")), value or None)


def has(kind: str, field: str, protocol: int) -> bool:
    """Whether this kind of message has that field in that protocol."""
    return all(one.path != (field,) for one in additions(kind, protocol))


def require_spoken(protocol: int) -> None:
    """Raises ProtocolError for a number that this release does not speak; names both sides."""
    if protocol not in SCHEMAS:
        ours = " and ".join(str(one) for one in sorted(SCHEMAS))
        raise ProtocolError(
            f"message of protocol {protocol}, this program speaks {ours}; upgrade the side that "
            f"speaks {protocol if protocol < min(SCHEMAS) else ours}",
            RejectReason.PROTOCOL,
        )


def require_known(kind: str, fields: Mapping[str, Any], protocol: int) -> None:
    """Raises ProtocolError where a message, as it came, has what its protocol lacks."""
    for one in additions(kind, protocol):
        found, value = _at(fields, one.path)
        if found and one.value in (None, value):
            raise ProtocolError(f"{kind}: protocol {protocol} has no {one.words}")


def without(kind: str, fields: Mapping[str, Any], protocol: int) -> dict[str, Any]:
    """The fields of a message that its protocol has."""
    kept = dict(fields)
    for one in additions(kind, protocol):
        if one.value is None:
            _drop(kept, one.path)
    return kept


def _at(fields: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    for name in path:
        if not isinstance(fields, Mapping) or name not in fields:
            return False, None
        fields = fields[name]
    return True, fields


def _drop(fields: dict[str, Any], path: tuple[str, ...]) -> None:
    first, *rest = path
    if not rest:
        fields.pop(first, None)
    elif isinstance(fields.get(first), dict):
        fields[first] = dict(fields[first])
        _drop(fields[first], tuple(rest))
