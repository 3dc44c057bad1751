"""Guides say what exists: every command of ours parses, every file and heading named is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

from client.cli import app as client_app
from common import codec, protocols, scores
from server.cli import app as server_app

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "deploy" / "guides"
PAGES = ["../README.md", *sorted(path.name for path in GUIDES.glob("*.md"))]
OURS: dict[str, click.Command] = {
    "fieldfed-server": get_command(server_app),
    "fieldfed-client": get_command(client_app),
}
OTHERS = {
    *(
        "apt-get",
        "cd",
        "chown",
        "cp",
        "docker",
        "echo",
        "editor",
        "install",
        "journalctl",
        "mkdir",
        "mv",
    ),
    *("nginx", "pip", "prometheus", "python3", "python3.11", "reboot", "rpicam-still", "sha256sum"),
    *("mosquitto", "mosquitto_passwd", "sed"),
    *("systemctl", "systemd-sysusers", "tar", "tee", "timedatectl", "trtexec"),
}
MADE_LATER = {"deploy/secrets/grafana"}
"""Files that an operator makes where a guide says so."""

each = pytest.mark.parametrize("name", PAGES)


def commands(text: str) -> Iterator[list[str]]:
    """Each command of the blocks for a shell, without what asks for rights."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for piece in line.split(" | "):
                words = shlex.split(piece, comments=True)
                if words[:1] == ["sudo"]:
                    words = words[3:] if words[1] == "-u" else words[1:]
                if words and not re.match(r"\w+=", words[0]):
                    yield words


def parse(words: list[str]) -> None:
    """Have the command's own parser read the words.

    Raises:
        click.ClickException: there is no such command, option or argument.
    """
    command, rest = OURS[words[0]], words[1:]
    context = click.Context(command, info_name=words[0])
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
    command.make_context(words[0], rest, parent=context)


@each
def test_every_command_exists(name: str) -> None:
    seen = list(commands((GUIDES / name).read_text()))
    assert seen
    for words in seen:
        program = Path(words[0]).name
        if program in OURS:
            parse([program, *words[1:]])
            continue
        assert program in OTHERS, words
        for n, word in enumerate(words):  # what a container of ours is told
            image = word.split(":")[0]
            if image in OURS and image != word and words[1] == "run" and words[n + 1 :]:
                parse([image, *words[n + 1 :]])


@pytest.mark.parametrize(
    "line",
    [
        "fieldfed-client enrol farms/apple",
        "fieldfed-client join farms/apple --code 1234",
        "fieldfed-server registry burn network",
        "fieldfed-client load farms/apple",
    ],
)
def test_a_command_that_does_not_exist_would_be_noticed(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(line.split())


@each
def test_every_file_of_ours_that_is_named_is_there(name: str) -> None:
    text = (GUIDES / name).read_text()
    for path in re.findall(
        r"(?<![\w/])(?:/opt/fieldfed/)?((?:deploy|common|server)/[\w./@-]+)", text
    ):
        assert path in MADE_LATER or (ROOT / path.rstrip(".")).exists(), path


@each
def test_every_link_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (GUIDES / name).read_text()):
        page, _, heading = target.partition("#")
        found = ((GUIDES / name).parent / page).resolve() if page else GUIDES / name
        assert found.is_file(), target
        headings = re.findall(r"(?m)^#+ (.+)$", found.read_text())
        assert not heading or heading in {one.lower().replace(" ", "-") for one in headings}


def test_the_numbers_of_formats_are_those_of_the_code() -> None:
    text = (GUIDES / "upgrade.md").read_text()
    spoken = " and ".join(str(one) for one in sorted(protocols.SCHEMAS, reverse=True))
    assert f"| protocol, {spoken} |" in text
    assert f"| update format, {codec.VERSION} |" in text
    assert f"| score format, {scores.VERSION} |" in text
    version = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert version is not None
    assert f"| release, `{version[1]}` |" in text
