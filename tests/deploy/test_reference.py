"""The reference is what the programs say, and they say it of everything."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from prometheus_client.metrics_core import Metric
from rich.text import Text

from common.command import command_of
from deploy import reference
from deploy.grafana import names
from tests.deploy.test_guides import parse

COMMANDS = dict(reference.commands())
SECTIONS = [
    (file, path, said, keys)
    for file, kind in reference.FILES.items()
    for path, said, keys in reference.settings(kind)
]
ROOT = Path(__file__).parents[2]


def test_the_file_is_what_the_program_makes() -> None:
    same = reference.FILE.read_text() == reference.text()
    assert same, "deploy/reference.md is not what the programs say: give 'make reference'"


def test_it_is_the_same_in_any_terminal_and_process() -> None:
    code = "from deploy.reference import text; print(text(), end='')"
    env = os.environ | {
        "COLUMNS": "30",
        "TERM": "dumb",
        "PYTHONHASHSEED": "3",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-P", "-c", code]
    made = subprocess.run(
        command, env=os.environ | env, check=True, capture_output=True, timeout=90
    )
    assert made.stdout.decode() == reference.FILE.read_text()


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_says_what_it_does_and_what_each_word_is_for(path: str) -> None:
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{path}: {parameter.name} says nothing"


@pytest.mark.parametrize("path", COMMANDS)
def test_its_examples_are_of_it_and_right(path: str) -> None:
    found = reference.examples(COMMANDS[path])
    assert found
    for line in found:
        assert line.startswith(f"{path} ") or line == path
        parse(line.split())


@pytest.mark.parametrize("path", COMMANDS)
def test_nothing_is_taken_for_markup_and_left_out(path: str) -> None:
    command = COMMANDS[path]
    said = [command.help, *(getattr(parameter, "help", "") for parameter in command.params)]
    for text in said:
        assert Text.from_markup(text or "").plain == text


@pytest.mark.parametrize("program", reference.PROGRAMS)
def test_help_shows_what_arguments_are_for(program: str) -> None:
    command = command_of(reference.PROGRAMS[program])
    assert isinstance(command, click.Group)
    with command.commands["init"].make_context("init", [], resilient_parsing=True) as context:
        (argument,) = (one for one in context.command.params if isinstance(one, click.Argument))
        record = argument.get_help_record(context)
    assert record is not None
    assert "folder" in record[1]


@pytest.mark.parametrize(("file", "path", "said", "keys"), SECTIONS)
def test_a_setting_says_what_it_is(file: str, path: str, said: str, keys: list[list[str]]) -> None:
    assert said, f"{file} [{path}] says nothing"
    for name, kind, _, what in keys:
        assert kind
        assert what, f"{file} [{path}] {name} has no description"


def test_exit_codes_are_told_once() -> None:
    codes = reference.exit_codes()
    assert list(codes) == [*range(12), 130]
    assert len(set(codes.values())) == len(codes)


def test_every_metric_is_there_and_says_what_it_is() -> None:
    found = {name: one for of in reference.metrics().values() for one in of for name in series(one)}
    assert {str(one) for one in (*names.Server, *names.Device)} <= set(found)
    assert all(one.documentation for one in found.values())


def series(family: Metric) -> list[str]:
    name = reference.full_name(family)
    ends = ("_bucket", "_count", "_sum") if family.type == "histogram" else ("",)
    return [name + end for end in ends]
