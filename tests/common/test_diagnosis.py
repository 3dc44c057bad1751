"""Findings: one line each, whatever a check does."""

import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.diagnosis import Finding, Level, fault, looked, of_error, ok, tell, warn
from common.errors import DiagnosisError, LinkError


def test_an_error_becomes_what_is_wrong_and_what_to_do() -> None:
    found = of_error("door", LinkError("it is closed; open it, or wait; it opens at eight"))
    assert (found.found, found.do) == ("it is closed", "open it, or wait; it opens at eight")
    assert of_error("door", LinkError("it is closed"), "wait").do == "wait"


def test_what_a_check_raises_is_a_finding_behind_those_that_it_made() -> None:
    def check() -> Iterator[Finding]:
        yield ok("one", "well")
        raise ZeroDivisionError("of all things")

    first, second = looked("two", check)
    assert first.level is Level.OK
    assert (second.level, second.what) == (Level.FAULT, "two")
    assert "ZeroDivisionError: of all things" in second.found


@given(st.text(), st.text(), st.text(min_size=1))
def test_a_finding_is_one_line_and_one_object(what: str, found: str, do: str) -> None:
    finding = fault(what, found, do)
    assert len(finding.line.splitlines()) == 1
    assert len(finding.text.splitlines()) == 1
    told = json.loads(finding.text)
    assert told["level"] == "FAULT"
    assert told["found"] == " ".join(found.split())


def test_warnings_are_no_fault_and_nothing_is_logged_in_between(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def noisy() -> Iterator[Finding]:
        logging.getLogger("client").error("noise")
        yield warn("a", "soon over", "hurry")
        yield ok("b", "well")

    assert tell(noisy(), as_json=False) == 0
    assert tell([*noisy(), fault("c", "broken", "mend")], as_json=False) == DiagnosisError.exit_code
    assert capsys.readouterr().out.startswith("warn   a: soon over; do: hurry\nok     b: well\n")
    logging.getLogger("client").error("again")
    assert [record.message for record in caplog.records].count("again") == 1
