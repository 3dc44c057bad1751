"""What devices and the server say to each other over MQTT.

    fieldfed/NETWORK/DEVICE/availability      "online" or "offline", retained   (common/mqtt.py)
    fieldfed/NETWORK/DEVICE/state             :class:`DeviceState`, retained
    fieldfed/NETWORK/DEVICE/telemetry         :class:`Telemetry`
    fieldfed/NETWORK/DEVICE/result            :class:`Result`
    fieldfed/NETWORK/DEVICE/event             :class:`Event`
    fieldfed/NETWORK/DEVICE/command/install   :class:`Install`, to a device
    fieldfed/NETWORK/models/CHANNEL           :class:`ModelNotice`, from the server, retained
    fieldfed/NETWORK/rounds                   :class:`RoundNotice`, from the server

Telemetry, results and events carry ``id`` and ``time`` besides, which the outbox adds. No message
holds an image, a path or the name of a file. A notice proves nothing: a device that gets one asks
the hub, and believes signatures.
"""

from typing import Annotated, Any, Final, Literal, NamedTuple, Self, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ProtocolError, first_fault
from common.manifest import Outcome

SERVER: Final = "server"
"""The name by which the server is on the broker."""
RESERVED: Final = (SERVER, "models", "rounds")
"""Names that no device may have."""
MOST_BYTES: Final = 65_536
"""Of a message that is read."""

Part: TypeAlias = Literal["availability", "state", "telemetry", "event", "result"]
EventKind: TypeAlias = Literal["started", "woken", "asleep", "update", "fault"]
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Bytes: TypeAlias = Annotated[int, Field(ge=0, lt=2**60)]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]

PARTS: Final[tuple[Part, ...]] = get_args(Part)


class Topic(NamedTuple):
    """A topic of a device, taken apart."""

    network: str
    device: str
    part: Part

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The parts of a device's topic; None for any other."""
        match text.split("/"):
            case ["fieldfed", network, device, part] if part in PARTS and device not in RESERVED:
                return cls(network, device, part)
        return None


def models(network: str, channel: str) -> str:
    """Where the newest version of a channel is told."""
    return f"fieldfed/{network}/models/{channel}"


def rounds(network: str) -> str:
    """Where the opening of a round is told."""
    return f"fieldfed/{network}/rounds"


def install(network: str, device: str) -> str:
    """Where a device is told to install what its channel names."""
    return f"fieldfed/{network}/{device}/command/install"


class _Message(BaseModel):
    """Frozen; fields of a later release are let pass."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read a message; raises ProtocolError where it is none of this kind."""
        if len(payload) > MOST_BYTES:
            raise ProtocolError(f"a message of {len(payload)} bytes; at most {MOST_BYTES} are read")
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise ProtocolError(f"no {cls.__name__}: {first_fault(error, 'text')[:300]}") from error

    def body(self) -> dict[str, Any]:
        """Its fields as JSON values; what is not known is left out."""
        return self.model_dump(mode="json", exclude_none=True)


class DeviceState(_Message):
    """What a device is and serves with; told when it changes.

    ``images`` counts labelled images of all parts, ``last_round`` is the newest the farm answered,
    ``latest`` the version that its channel names, ``version`` the one it serves with, ``gain`` by
    how much ``latest`` is more often right than ``version`` on this farm's images, where both were
    judged on the same ones.
    """

    farm: Name
    release: Annotated[str, Field(max_length=40)]
    model: Annotated[str, Field(max_length=100)] = ""
    channel: Annotated[str, Field(max_length=20)] = "stable"
    version: Annotated[int, Field(ge=0)] | None = None
    latest: Annotated[int, Field(ge=0)] | None = None
    gain: Annotated[float, Field(ge=-1, le=1)] | None = None
    accuracy: Ratio | None = None
    f1: Ratio | None = None
    species: Annotated[str, Field(max_length=40)] = ""
    classes: Annotated[int, Field(ge=0)] | None = None
    images: Annotated[int, Field(ge=0)] | None = None
    last_round: Annotated[int, Field(ge=0)] | None = None
    asleep: bool = False


class Telemetry(_Message):
    """How a device is; what it cannot measure is left out.

    ``link_*_bytes`` are over the farm's life, at its socket with the server; ``dropped_messages``
    over that of its outbox.
    """

    uptime_seconds: Annotated[float, Field(ge=0)]
    cpu_ratio: Ratio | None = None
    memory_used_bytes: Bytes | None = None
    memory_bytes: Bytes | None = None
    disk_free_bytes: Bytes | None = None
    temperature_celsius: Annotated[float, Field(ge=-100, le=300)] | None = None
    throttled: bool | None = None
    under_voltage: bool | None = None
    gpu_ratio: Ratio | None = None
    link_sent_bytes: Bytes | None = None
    link_received_bytes: Bytes | None = None
    outbox_messages: Annotated[int, Field(ge=0)] = 0
    outbox_bytes: Bytes = 0
    dropped_messages: Annotated[int, Field(ge=0)] = 0


class Result(_Message):
    """What a photograph of the field shows: never the photograph, nor its name."""

    taken: Annotated[float, Field(ge=0, description="seconds since 1970")]
    label: Annotated[str, Field(max_length=200)]
    share: Ratio
    sure: bool
    version: Annotated[int, Field(ge=0)]


class Event(_Message):
    """Something has happened on a device; ``outcome`` and ``version`` go with an update."""

    kind: EventKind
    words: Annotated[str, Field(max_length=500)]
    outcome: Outcome | None = None
    version: Annotated[int, Field(ge=0)] | None = None


class Install(_Message):
    """Ask a device to install a version: only what its channel names by then, signed, is taken."""

    version: Annotated[int, Field(ge=1)]


class ModelNotice(_Message):
    """A channel names another version, or its document is newer."""

    channel: Annotated[str, Field(max_length=20)]
    counter: Annotated[int, Field(ge=0)]
    version: Annotated[int, Field(ge=0)]
    accuracy: Ratio | None = None


class RoundNotice(_Message):
    """A round is open until ``deadline`` (seconds since 1970)."""

    run: Annotated[int, Field(ge=0)]
    round: Annotated[int, Field(ge=0)]
    deadline: Annotated[float, Field(ge=0)]
