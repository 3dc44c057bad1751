"""What deploy/containers says, read line by line; tests/system/test_containers.py builds one."""

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.processes import free_port

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "deploy" / "containers"
FILES = sorted(path.name for path in CONTAINERS.glob("*.Containerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

each = pytest.mark.parametrize("name", FILES)


def instructions(name: str) -> list[tuple[str, str]]:
    """Each instruction with its arguments, lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (CONTAINERS / name).read_text()).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def last_stage(name: str) -> list[tuple[str, str]]:
    """What becomes the image."""
    found = instructions(name)
    return found[max(n for n, one in enumerate(found) if one[0] == "FROM") :]


def ignored(path: str) -> bool:
    """Whether .containerignore keeps a path out; the last line that matches decides."""
    out = False
    for line in (ROOT / ".containerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = Path(path).parts
            names = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
            names += parts if line.startswith("**/") else []
            if any(fnmatch.fnmatch(name, pattern) for name in names):
                out = not line.startswith("!")
    return out


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert FILES == ["client.Containerfile", "edge.Containerfile", "server.Containerfile"]


@each
def test_an_image_is_nobodys(name: str) -> None:
    stage = dict(last_stage(name))
    assert stage["USER"] == "10001:10001"
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert stage["VOLUME"] == "/var/lib/fieldfed"
    assert not {"RUN", "ADD"} & {word for word, _ in last_stage(name)}
    after = [word for word, _ in last_stage(name)]
    assert "COPY" not in after[after.index("USER") :]


@each
def test_an_image_says_whether_it_is_well(name: str) -> None:
    command = dict(last_stage(name))["HEALTHCHECK"].partition(" CMD ")[2]
    program = json.loads(command)
    assert program[2] == "/opt/fieldfed/alive.py"
    assert program[3] in {"http", "process"}


@each
def test_bases_have_a_version_and_no_index_is_named(name: str) -> None:
    text = (CONTAINERS / name).read_text()
    bases = [rest for word, rest in instructions(name) if word == "FROM"]
    assert bases == ["${BASE} AS build", "${BASE}"]
    base = re.findall(r"(?m)^ARG BASE=(.+)$", text)
    assert len(base) == 1
    assert re.fullmatch(r"python:3\.11-slim-[a-z]+", base[0])
    assert "latest" not in text
    assert not re.search(r"(?i)https?://(?!127)|index-url|password|token", text)


@each
def test_labels_tell_the_version_that_is_built(name: str) -> None:
    assert ("ARG", f"VERSION={PROJECT['version']}") in last_stage(name)
    label = dict(last_stage(name))["LABEL"]
    assert f'licenses="{PROJECT["license"]}"' in label
    assert f'title="fieldfed-{name.split(".")[0]}"' in label


def copied(name: str) -> Iterator[str]:
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            yield from rest.split()[:-1]


@each
def test_what_is_copied_is_there_and_is_not_ignored(name: str) -> None:
    sources = list(copied(name))
    assert "constraints.txt" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


def test_nothing_else_reaches_a_build() -> None:
    for path in (".git", "tests", "demo-output", "bench-output", ".venv", "deploy/compose.yaml"):
        assert ignored(path), path
    assert ignored("common/__pycache__")
    assert not ignored("common/hub_pb2.py")
    assert (ROOT / ".dockerignore").read_bytes() == (ROOT / ".containerignore").read_bytes()


@each
def test_the_extra_and_the_torch_exist(name: str) -> None:
    kind = name.split(".")[0]
    assert kind in PROJECT["optional-dependencies"]
    command = next(rest for word, rest in instructions(name) if "containers/install" not in rest
                   and word == "RUN" and "/opt/fieldfed/install" in rest)  # fmt: skip
    assert command.endswith(f'/opt/fieldfed/install {kind} "${{TORCH}}"')
    torch = next(rest for word, rest in instructions(name) if rest.startswith("TORCH="))
    assert torch == ("TORCH=none" if kind == "edge" else "TORCH=pinned")
    program = json.loads(dict(last_stage(name))["ENTRYPOINT"])[0]
    assert program in PROJECT["scripts"]


def test_a_torch_of_the_base_image_is_pinned_by_nothing_else() -> None:
    pattern = re.search(r"grep -Ev '([^']+)'", (CONTAINERS / "install").read_text())
    assert pattern is not None
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    gone = {pin.split("==")[0] for pin in pins if re.match(pattern[1], pin)}
    assert {"torch", "torchvision", "triton", "nvidia-cublas-cu12", "cuda-bindings"} <= gone
    assert not {"timm", "numpy", "torch-pruning"} & gone


def test_the_installer_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        ["sh", str(CONTAINERS / "install"), "server", "cuda"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "'cuda'" in done.stderr


def alive(*question: str) -> int:
    command = [sys.executable, "-P", str(CONTAINERS / "alive.py"), *question]
    return subprocess.run(command, check=False, timeout=60).returncode


def test_a_process_is_found_by_its_word_until_it_is_stopped() -> None:
    word = "a-word-that-nobody-else-has"
    assert alive("process", word) == 1
    with subprocess.Popen([sys.executable, "-c", "input()", word], stdin=subprocess.PIPE) as child:
        try:
            assert alive("process", word) == 0
            psutil.Process(child.pid).suspend()
            assert alive("process", word) == 1
        finally:
            child.kill()


def test_a_port_where_nobody_listens_is_not_well() -> None:
    assert alive("http", f"http://127.0.0.1:{free_port()}/health") == 1
    assert alive("http", "file:///etc/hostname") == 1
