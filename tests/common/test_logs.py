"""Log lines: text for people, JSON for machines, with run, round and farm."""

import json
import logging

import pytest

from common.logs import bound, start_logging


def test_json_lines_carry_run_round_and_farm(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("json")
    with bound(run=3, farm="oak"), bound(round=2):
        logging.getLogger("client.farm").info("accuracy %.1f", 0.5)
    logging.getLogger("server.rounds").warning("outside")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["run"], first["round"], first["farm"]) == (3, 2, "oak")
    assert first["message"] == "accuracy 0.5"
    assert second["level"] == "warning"
    assert "run" not in second


def test_text_lines_name_the_level_only_where_it_matters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging("text")
    logging.getLogger("server").info("hello")
    logging.getLogger("server").error("broken")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" hello")
    assert second.endswith(" error broken")


def test_child_processes_inherit_the_style(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("json")
    start_logging()
    logging.getLogger("common").info("x")
    assert json.loads(capsys.readouterr().err)["message"] == "x"
