"""Images are built by buildah, and do their work as nobody in particular, writing nothing else.

The base image is this machine's own Python with what it needs, and pip gets a folder of wheels: no
image is fetched from anywhere. The edge image is built always. The other two bring torch, which is
gigabytes where it comes with CUDA; ``make images`` builds them too:

    FIELDFED_IMAGES   "all": all three
    FIELDFED_WHEELS   a folder that has all the wheels already
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from client.portable import write_portable
from client.serving import Serving
from common.processes import free_port
from tests.lab.bundles import CLASSES, photographs_in, serve
from tests.lab.network import draw_folder
from tests.lab.versions import two_versions
from tests.system.conftest import ROOT
from tests.system.site import site_settings

BUILDAH = shutil.which("buildah")
ALL = os.environ.get("FIELDFED_IMAGES") == "all"
KINDS = ("edge", "client", "server") if ALL else ("edge",)
BUILD_SECONDS = 3600 if ALL else 600

pytestmark = [
    pytest.mark.processes,
    pytest.mark.system,
    pytest.mark.timeout(7200 if ALL else 900),
    pytest.mark.skipif(
        BUILDAH is None or os.geteuid() != 0 or sys.base_prefix == "/usr",
        reason="needs 'buildah', root, and a Python that lies in a folder of its own",
    ),
]

PROGRAMS = ("sh", "mkdir", "rm", "grep", "cp", "touch", "id", "sleep")
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
            timeout=BUILD_SECONDS,
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
    (root / "tmp").chmod(0o1777)


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
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs from."""
    if given := os.environ.get("FIELDFED_WHEELS"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    pins = ["--constraint", str(ROOT / "constraints.txt"), "--only-binary", ":all:"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for kind in KINDS for name in project["optional-dependencies"][kind]]
    names = [*project["dependencies"], *extras, "setuptools"]
    subprocess.run([*pip, *pins, *names], check=True, timeout=BUILD_SECONDS)
    return folder


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be committed."""
    folder = tmp_path_factory.mktemp("context")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@dataclass(frozen=True)
class Made:
    """An image, with a container of it that can be looked into, and what it is given to work on."""

    kind: str
    image: str
    container: str
    root: Path
    given: Path
    store: Store

    def run(self, *command: str, code: int = 0, env: str = "NONE=") -> str:
        """A command in it, as the image's own user; ``given`` is where its state lies."""
        settings = ["--volume", f"{self.given}:/var/lib/fieldfed", "--env", env]
        command = ("run", "--isolation", "chroot", *settings, self.container, "--", *command)
        return self.store(*command, code=code)


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    store: Store,
    wheels: Path,
    context: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Made]:
    """Each image, made of what would be committed and of wheels."""
    kind, name = request.param, f"localhost/fieldfed-{request.param}:test"
    settings = tmp_path_factory.mktemp("pip") / "pip.conf"
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    begin = time.monotonic()
    store(
        *("build", "--isolation", "chroot", "--format", "docker", "--tag", name),
        *("--build-arg", "BASE=localhost/local-python:1", "--volume", f"{wheels}:/wheels:ro"),
        *("--secret", f"id=pip,src={settings}"),
        *("--file", str(context / f"deploy/containers/{kind}.Containerfile"), str(context)),
    )
    took, size = time.monotonic() - begin, json.loads(store("images", "--json", name))[0]["size"]
    print(f"{kind}: built in {took:.0f} s, {size}")
    container = store("from", name).strip()
    given = tmp_path_factory.mktemp(kind)
    yield Made(kind, name, container, Path(store("mount", container).strip()), given, store)
    store("rm", container)
    store("rmi", "--force", name)


def test_an_image_says_what_it_is(made: Made) -> None:
    inspected = made.store("inspect", "--type", "image", made.image)
    about = json.loads(inspected)["Docker"]["config"]
    assert about["User"] == "10001:10001"
    program = "fieldfed-server" if made.kind == "server" else "fieldfed-client"
    assert about["Entrypoint"] == [program]
    assert about["Healthcheck"]["Test"][0] == "CMD"
    assert about["Labels"]["org.opencontainers.image.title"] == f"fieldfed-{made.kind}"
    assert "pip" not in json.dumps(about["Env"])


def test_nothing_of_its_making_is_left_in_it(made: Made) -> None:
    assert not (made.root / "wheels").exists() or not list((made.root / "wheels").iterdir())
    assert not (made.root / "src").exists()
    assert not (made.root / "opt/fieldfed/install").exists()
    assert (made.root / "var/lib/fieldfed").stat().st_uid == 10001
    has_torch = any((made.root / "opt/fieldfed").glob(".venv/lib/*/site-packages/torch"))
    assert has_torch == (made.kind != "edge")


WRITABLE = """
import os
for folder, names, files in os.walk("/"):
    if folder == "/":
        names[:] = set(names) - {"proc", "sys", "dev", "tmp"}
    for path in (folder, *(os.path.join(folder, name) for name in files)):
        if os.access(path, os.W_OK) and not os.path.islink(path):
            print(path)
"""


def test_it_may_write_its_state_and_nothing_else(made: Made) -> None:
    os.chown(made.given, 10001, 10001)
    assert "uid=10001" in made.run("id")
    made.run("touch", "/opt/fieldfed/x", code=1)
    made.run("touch", "/tmp/x", "/var/lib/fieldfed/x")
    (made.given / "x").unlink()
    assert made.run("python", "-P", "-c", WRITABLE).split() == ["/var/lib/fieldfed"]


def test_it_does_its_work(made: Made) -> None:
    TRIES[made.kind](made)
    # it has what the health check needs; what runs outside is seen too without a proper runtime
    made.run("python", "-P", "/opt/fieldfed/alive.py", "http", "http://127.0.0.1:9/health", code=1)


def owned(folder: Path) -> None:
    """As if the image's own user had made all of it."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 10001, 10001)


def classify(made: Made) -> None:
    """A bundle of another machine, and photographs."""
    registry, serving = two_versions(made.given / "other"), Serving(made.given / "serving")
    torch.manual_seed(0)
    classifier = nn.Linear(registry.manifest(2).spec.width, len(CLASSES)).requires_grad_(False)
    serve(serving, registry, 2, classifier)
    write_portable(serving, made.given / "farm.bundle")
    photographs_in(made.given / "camera")
    owned(made.given)
    lines = made.run("fieldfed-client", "classify", "farm.bundle", "camera", "--json")
    assert [Path(json.loads(line)["image"]).name for line in lines.splitlines()] == [
        f"img{n}.png" for n in range(4)
    ]


def farm(made: Made) -> None:
    """All that needs no server: settings, a look at everything, classifying."""
    assert "doctor" in made.run("fieldfed-client", "--help")
    draw_folder(made.given / "images", 3, 16, 7)
    owned(made.given)
    where = ("--superlink", f"127.0.0.1:{free_port()}")
    made.run("fieldfed-client", "init", "farm", "--name", "apple", "--data", "images", *where)
    lines = made.run("fieldfed-client", "doctor", "farm", "--json", code=11).splitlines()
    found = {line["what"]: line for line in map(json.loads, lines)}
    assert found["programs"]["level"] == "ok", found
    assert [name for name in found if found[name]["level"] == "FAULT"] == ["SuperLink"], found
    classify(made)


SERVE = """
fieldfed-server up network >up.log 2>&1 &
up=$!
trap 'kill $up' EXIT
tries=0
until python -P /opt/fieldfed/alive.py http http://127.0.0.1:%FIELDFED_SERVER__PORT:8000%/health
do
  tries=$((tries + 1))
  [ $tries -lt 60 ] && kill -0 $up || exit 9
  sleep 1
done
trap - EXIT
kill $up
wait $up
"""


def network(made: Made) -> None:
    """A network from its first command until it is up, well, and ends when it is told to."""
    assert "pretrain" in made.run("fieldfed-server", "--help")
    source = draw_folder(made.given / "tomato", 3, 16, 7)
    owned(made.given)
    made.run("fieldfed-server", "init", "network", "--source", "tomato")
    settings = site_settings(8000, Path("/var/lib/fieldfed") / source.name, {})
    (made.given / "network" / "server.toml").write_text(settings)
    made.run("fieldfed-server", "pretrain", "network")
    base = made.given / "network" / "base.safetensors"
    assert (base.stat().st_uid, base.stat().st_gid) == (10001, 10001)
    made.run("sh", "-c", SERVE, code=130, env=f"FIELDFED_SERVER__PORT={free_port()}")


TRIES: dict[str, Callable[[Made], None]] = {"edge": classify, "client": farm, "server": network}
