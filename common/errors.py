"""Every error an operator can meet.

FieldfedError            exit 1
├── ConfigError          exit 2   a setting, flag or budget is wrong
├── DataError            exit 3   an image folder cannot be used
├── ModelError           exit 4   an unknown backbone, or weights that do not match it
├── ProtocolError        exit 5   a message or a coded update is not what it should be
├── StateError           exit 6   what is on disk is missing, damaged or of another version
│   └── DiskError                 the disk is full or cannot be written
├── LaunchError          exit 7   a process did not start or died (port in use, ...)
├── QualityError         exit 8   the result is below what was asked for
├── RefusalError         exit 9   a version of the model that this device does not take
├── LinkError            exit 10  the other side cannot be reached, or says no
│   └── AbsentError               it has not what it was asked for
└── DiagnosisError       exit 11  'doctor' has found a fault

Each says what is wrong, where, and what to do next. Ctrl-C exits with 130.
"""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class FieldfedError(Exception):
    """An error without a kind of its own.

    Base of all expected errors; commands print it as one line and exit with ``exit_code``.
    """

    exit_code = 1


class ConfigError(FieldfedError):
    """A setting, flag or budget is wrong."""

    exit_code = 2


class DataError(FieldfedError):
    """An image folder is missing, empty or has fewer than two classes."""

    exit_code = 3


class ModelError(FieldfedError):
    """A backbone is unknown, not a plain vision transformer, or its weights do not match."""

    exit_code = 4


class RejectReason(StrEnum):
    """Why a reply was put into quarantine: bounded, so that it can label a metric."""

    MALFORMED = "malformed"
    PROTOCOL = "protocol"
    STALE = "stale"
    FOREIGN_BASE = "foreign_base"
    FOREIGN_MASK = "foreign_mask"
    SHAPE = "shape"
    NOT_FINITE = "not_finite"
    OVERSIZED = "oversized"
    DUPLICATE = "duplicate"
    REFUSED = "refused"
    LATE = "late"
    LOST = "lost"


class ProtocolError(FieldfedError):
    """A message or a coded update is not what it should be."""

    exit_code = 5

    def __init__(self, message: str, reason: RejectReason = RejectReason.MALFORMED) -> None:
        super().__init__(message)
        self.reason = reason


class StateError(FieldfedError):
    """What is on disk is missing, damaged or of another version."""

    exit_code = 6


class DiskError(StateError):
    """The disk is full or cannot be written: a matter of the machine, not of what was to be kept.

    A run that meets it has not failed: it goes on where it was once there is room.
    """


class LaunchError(FieldfedError):
    """A process did not start or died."""

    exit_code = 7


class QualityError(FieldfedError):
    """The result is below what was asked for."""

    exit_code = 8


class LinkError(FieldfedError):
    """The other side cannot be reached, or says no."""

    exit_code = 10


class AbsentError(LinkError):
    """The other side was reached, and has not (or not yet) what it was asked for."""


class DiagnosisError(FieldfedError):
    """What keeps a server or a farm from working; the doctor commands say what, line by line."""

    exit_code = 11


class RefuseReason(StrEnum):
    """Why a device does not take a version: bounded, so that it can label a metric."""

    MALFORMED = "malformed"
    UNSIGNED = "unsigned"
    WRONG_KEY = "wrong_key"
    TAMPERED = "tampered"
    EXPIRED = "expired"
    OLDER = "older"
    FOREIGN = "foreign"
    INCOMPATIBLE = "incompatible"
    TOO_LARGE = "too_large"
    DAMAGED = "damaged"


class RefusalError(FieldfedError):
    """A version, or what names it, that this device does not take."""

    exit_code = 9

    def __init__(self, message: str, reason: RefuseReason) -> None:
        super().__init__(message)
        self.reason = reason


def first_fault(error: "ValidationError", whole: str = "the whole") -> str:
    """What is wrong in the first place, and where; without the value, which somebody else chose.

    Args:
        error: of pydantic.
        whole: what to call the place where it is no field.
    """
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"
