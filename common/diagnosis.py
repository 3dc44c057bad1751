"""What the doctor commands say: a finding of each thing that they looked at.

    ok     membership: farm apple of network orchard
    warn   temperature: the processor has 82 degrees; do: give it air, or a fan
    FAULT  key: '...' is open to other users (mode 640); do: run: chmod 600 '...'

A check yields findings and changes nothing. What it raises is a finding as well, so whatever is
damaged, the others go on.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TypeAlias

from common.errors import DiagnosisError, FieldfedError


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found there and, unless all is well, what to do."""

    level: Level
    what: str
    found: str
    do: str = ""

    @property
    def words(self) -> str:
        """What was found and what to do, in one line."""
        return _plain("; ".join(part for part in (self.found, self.do) if part))

    @property
    def line(self) -> str:
        """As people read it."""
        remedy = f"; do: {self.do}" if self.do else ""
        return f"{self.level:<6} {_plain(f'{self.what}: {self.found}{remedy}')}"

    @property
    def text(self) -> str:
        """As programs read it: JSON."""
        return json.dumps({key: _plain(value) for key, value in asdict(self).items()})


Check: TypeAlias = Callable[[], Iterable[Finding]]


def ok(what: str, found: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, what, found)


def warn(what: str, found: str, do: str) -> Finding:
    """It works, but not for long, or not as it should."""
    return Finding(Level.WARN, what, found, do)


def fault(what: str, found: str, do: str) -> Finding:
    """It does not work."""
    return Finding(Level.FAULT, what, found, do)


def of_error(what: str, error: FieldfedError, otherwise: str = "") -> Finding:
    """A fault in the words of an error: what is wrong; what to do, or else ``otherwise``."""
    found, _, remedy = str(error).partition("; ")
    return fault(what, found, remedy or otherwise)


def looked(what: str, check: Check) -> Iterator[Finding]:
    """What a check finds; what it raises is one more finding."""
    try:
        yield from check()
    except FieldfedError as error:
        yield of_error(what, error)
    except Exception as error:  # whatever damage does to one check, the others go on
        why = f"{type(error).__name__}: {error}"
        yield fault(what, f"it cannot be looked at: {why}", "tell the maintainers this line")


def tell(findings: Iterable[Finding], as_json: bool) -> int:
    """Print each finding as it comes; returns the exit code of the command."""
    worst = 0
    with _quiet():
        for finding in findings:
            print(finding.text if as_json else finding.line, flush=True)
            if finding.level is Level.FAULT:
                worst = DiagnosisError.exit_code
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, nothing is logged: what there is to say is a finding."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _plain(text: str) -> str:
    return " ".join(text.split())
