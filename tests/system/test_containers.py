"""The edge image is built by buildah, and classifies as nobody in particular, writing nothing else.

The base image is this machine's own Python with what it needs, and pip gets a folder of wheels: no
image is fetched from anywhere. The other two images differ by their extra, which brings torch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from client.portable import write_portable
from client.serving import Serving
from tests.lab.bundles import CLASSES, photographs_in, serve
from tests.lab.versions import two_versions
from tests.system.conftest import ROOT

BUILDAH = shutil.which("buildah")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        BUILDAH is None or os.geteuid() != 0 or sys.base_prefix == "/usr",
        reason="needs 'buildah', root, and a Python that lies in a folder of its own",
    ),
]

PROGRAMS = ("sh", "mkdir", "rm", "grep", "cp", "touch", "id")
COMMON_LIBRARIES = (
    *("libgcc_s.so.1", "libstdc++.so.6", "libm.so.6", "librt.so.1", "libdl.so.2"),
    *("libpthread.so.0", "libutil.so.1", "libresolv.so.2"),
)


class Store:
    """Where buildah keeps what it builds."""

    def __init__(self, folder: Path) -> None:
        self._options = ["--root", str(folder / "store"), "--runroot", str(folder / "run")]

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(BUILDAH), *self._options, *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def libraries(files: Iterable[Path]) -> set[Path]:
    """The shared libraries that programs need, and what loads them."""
    done = subprocess.run(
        ["ldd", *map(str, files)], capture_output=True, text=True, check=False, timeout=60
    )
    return {Path(found) for found in re.findall(r"(/\S+) \(0x", done.stdout)}


def fill(root: Path) -> None:
    """A system of the fewest parts: a shell, a few programs, Python."""
    programs = [Path(str(shutil.which(name))) for name in PROGRAMS]
    prefix = Path(sys.base_prefix)
    python = prefix / "bin" / f"python3.{sys.version_info.minor}"
    for path in programs:
        (root / "bin").mkdir(exist_ok=True)
        shutil.copy(path, root / "bin" / path.name)
    leave_out = shutil.ignore_patterns(
        *("test", "tests", "*.a", "__pycache__", "site-packages", "idlelib", "config-*")
    )
    for name in ("bin", "lib"):
        source, target = prefix / name, root / "usr" / "local" / name
        shutil.copytree(source, target, symlinks=True, ignore=leave_out)
    (root / "usr/local/lib" / python.name / "site-packages").mkdir()
    modules = (root / "usr/local/lib" / python.name / "lib-dynload").glob("*.so")
    # what wheels expect of any Linux
    common = [next(Path("/").glob(f"lib/*-linux-gnu*/{name}")) for name in COMMON_LIBRARIES]
    for library in libraries([*programs, python, *modules, *common]) | set(common):
        target = root / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(library, target)
    for name in ("tmp", "etc", "proc", "sys", "dev", "root", "run", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """With the base image in it; afterwards empty again."""
    made = Store(tmp_path_factory.mktemp("images"))
    container = made("from", "scratch").strip()
    try:
        fill(Path(made("mount", container).strip()))
        made("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
        made("commit", "--quiet", container, "local-python:1")
        yield made
    finally:
        made("rm", "--all")
        made("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def edge(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The edge image, made of what would be committed and of wheels."""
    wheels, context = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("context")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels)]
    pins = ["--constraint", str(ROOT / "constraints.txt"), "--only-binary", ":all:"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [*project["dependencies"], *project["optional-dependencies"]["edge"], "setuptools"]
    subprocess.run([*pip, *pins, *names], check=True, timeout=300)
    settings = context.with_name("pip.conf")
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name)
    store(
        *("build", "--isolation", "chroot", "--format", "docker", "--tag", "fieldfed-edge:test"),
        *("--build-arg", "BASE=localhost/local-python:1", "--volume", f"{wheels}:/wheels:ro"),
        *("--secret", f"id=pip,src={settings}"),
        *("--file", str(context / "deploy/containers/edge.Containerfile"), str(context)),
    )
    return "localhost/fieldfed-edge:test"


def test_the_image_says_what_it_is(store: Store, edge: str) -> None:
    about = json.loads(store("inspect", "--type", "image", edge))["Docker"]["config"]
    assert about["User"] == "10001:10001"
    assert about["Entrypoint"] == ["fieldfed-client"]
    assert about["Healthcheck"]["Test"][0] == "CMD"
    assert about["Labels"]["org.opencontainers.image.title"] == "fieldfed-edge"
    assert "pip" not in json.dumps(about["Env"])


def test_it_classifies_without_torch_and_without_rights(
    store: Store, edge: str, tmp_path: Path
) -> None:
    registry, serving = two_versions(tmp_path / "server"), Serving(tmp_path / "serving")
    torch.manual_seed(0)
    classifier = nn.Linear(registry.manifest(2).spec.width, len(CLASSES)).requires_grad_(False)
    serve(serving, registry, 2, classifier)
    given = tmp_path / "given"
    given.mkdir()
    write_portable(serving, given / "farm.bundle")
    photographs_in(given / "camera")
    os.chown(given / "farm.bundle", 10001, 10001)  # bundles are their owner's alone
    container = store("from", edge).strip()
    root = Path(store("mount", container).strip())
    assert not (root / "wheels").exists() or not list((root / "wheels").iterdir())
    assert not (root / "src").exists()
    assert not list((root / "opt/fieldfed").rglob("torch"))
    assert (root / "var/lib/fieldfed").stat().st_uid == 10001

    def run(*command: str, code: int = 0) -> str:
        volume = ["--volume", f"{given}:/given:ro"]
        return store("run", "--isolation", "chroot", *volume, container, "--", *command, code=code)

    assert "uid=10001" in run("id")
    run("touch", "/opt/fieldfed/x", code=1)
    lines = run("fieldfed-client", "classify", "/given/farm.bundle", "/given/camera", "--json")
    assert [Path(json.loads(line)["image"]).name for line in lines.splitlines()] == [
        f"img{n}.png" for n in range(4)
    ]
    # it has what the health check needs; what runs outside is seen too without a proper runtime
    run("python", "-P", "/opt/fieldfed/alive.py", "http", "http://127.0.0.1:9/health", code=1)
