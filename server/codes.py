"""The codes with which farms may join: made by an operator, good for one key, until they expire.

    STATE/identity/codes.json   of each farm its newest code: what checks it, never the code

A code is used up by the first key that joins with it. The same key may join with it again until
it expires: the answer may have been lost on its way. After ``MOST_FAILURES`` wrong tries for a farm
its code is void.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from common import certificates
from common.code import LONGEST_HOURS, Secret, Verifier, new_code
from common.errors import ConfigError, StateError
from common.files import append, write_atomically

MOST_FAILURES = 100
KEPT = timedelta(days=30)
"""How long a code that is over is still listed."""


class Code(BaseModel):
    """One farm's code; ``key`` is the fingerprint of the key that joined with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    public: str
    mac_key: str
    made: AwareDatetime
    expires: AwareDatetime
    key: str | None = None
    failures: int = Field(default=0, ge=0)

    @property
    def verifier(self) -> Verifier:
        """Checks proofs."""
        return Verifier(bytes.fromhex(self.public), bytes.fromhex(self.mac_key))

    def state(self, now: datetime) -> str:
        """In a word: used, void, expired or open."""
        if self.key is not None:
            return "used"
        if self.failures >= MOST_FAILURES:
            return "void"
        return "expired" if now >= self.expires else "open"

    def admits(self, key: str, now: datetime) -> bool:
        """Whether a key may join with it."""
        return now < self.expires and (self.key == key or self.state(now) == "open")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    codes: dict[str, Code] = Field(default_factory=dict)


class Codes:
    """The list in the authority's folder; any number of processes may use it."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / "codes.json", folder / "codes.lock"

    def new(self, farm: str, hours: float, now: datetime) -> str:
        """A code for a farm, in place of the one it has.

        Raises:
            ConfigError: the farm's name is none, or the hours are out of range.
            StateError: the list is damaged.
            DiskError: the disk is full.
        """
        if not certificates.is_name(farm):
            raise ConfigError(f"farm {farm!r}: a name has 1-40 letters, digits, '_' or '-'")
        if not 0 < hours <= LONGEST_HOURS:
            raise ConfigError(f"a code for {hours:g} hours: choose up to {LONGEST_HOURS:g}")
        code = new_code()
        verifier = Secret.of(code, farm).verifier
        made = Code(
            public=verifier.public.hex(),
            mac_key=verifier.mac_key.hex(),
            made=now,
            expires=now + timedelta(hours=hours),
        )
        with self._changing() as codes:
            for other in [one for one, old in codes.items() if old.expires + KEPT < now]:
                del codes[other]
            codes[farm] = made
        return code

    def all(self) -> dict[str, Code]:
        """The newest code of each farm; StateError for a damaged list."""
        return self._read().codes

    def of(self, farm: str) -> Code | None:
        """A farm's code; StateError for a damaged list."""
        return self.all().get(farm)

    def use(self, farm: str, key: str, now: datetime) -> bool:
        """Use a farm's code up for a key; whether it may join with it."""
        with self._changing() as codes:
            code = codes.get(farm)
            if code is None or not code.admits(key, now):
                return False
            codes[farm] = code.model_copy(update={"key": key})
        return True

    def failed(self, farm: str) -> None:
        """Somebody has tried a wrong code for a farm."""
        with self._changing() as codes:
            if farm in codes:
                tries = codes[farm].failures + 1
                codes[farm] = codes[farm].model_copy(update={"failures": tries})

    def remove(self, farm: str) -> None:
        """Forget a farm's code, if it has one."""
        with self._changing() as codes:
            codes.pop(farm, None)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Code]]:
        append(self._lock, b"")  # makes the folder, or says why it cannot
        with self._lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            found = self._read()
            before = found.model_dump_json()
            yield found.codes
            if (after := found.model_dump_json()) != before:
                write_atomically(self._path, after.encode())

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _File()
        except (OSError, ValidationError) as error:
            raise StateError(
                f"'{self._path}' cannot be read; remove it, and make the codes of farms that have "
                "not joined yet anew"
            ) from error
