"""A farm takes settings from a run, and no code."""

import io
import logging
import zipfile
from pathlib import Path

import pytest

from client.bundle import MAX_BYTES, guarded, require_no_code
from common.errors import ProtocolError

OURS = """
[project]
name = "fieldfed"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
"""


def bundle(project: str | None = OURS, **files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        if project is not None:
            file.writestr("pyproject.toml", project)
        file.writestr(".info/CONTENT", "pyproject.toml,0,0")
        for name, text in files.items():
            file.writestr(name.replace("__", "/").replace("_py", ".py"), text)
    return data.getvalue()


def test_settings_alone_are_taken() -> None:
    require_no_code(bundle())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bundle(evil_py="import os"), "carries 'evil.py'"),
        (bundle(client__app_py=""), "carries 'client/app.py'"),
        (bundle(README=""), "carries 'README'"),
        (bundle(**{".info__x_py": ""}), "carries '.info/x.py'"),
        (bundle(**{"..__x_py": ""}), "carries '../x.py'"),
        (bundle(None), "too much"),
        (bundle(OURS.replace("client.app:app", "evil:app")), "names 'evil:app'"),
        (bundle(OURS.replace('"fieldfed"', '"x"\ndependencies = ["evil"]')), "needs .*evil"),
        (bundle("[project]\nname = 'x'"), "names no app"),
        (bundle("project = 3\ntool = 4"), "names no app"),
        (bundle("not toml"), "cannot be read"),
        (bundle("#" * (MAX_BYTES + 1)), "more than"),
        (b"no zip", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_all_else_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        require_no_code(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_of_a_name_are_refused() -> None:
    data = io.BytesIO(bundle())
    with zipfile.ZipFile(data, "a") as file:
        file.writestr("pyproject.toml", OURS.replace("client.app:app", "evil:app"))
    with pytest.raises(ProtocolError):
        require_no_code(data.getvalue())


def test_nothing_is_unpacked_before_it_is_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unpacked = list[bytes]()

    def install(content: bytes, *, skip_prompt: bool) -> Path:
        unpacked.append(content)
        return tmp_path

    (tmp_path / "pyproject.toml").write_text(OURS)
    plain = bundle()
    assert guarded(install)(plain, skip_prompt=True) == tmp_path
    caplog.set_level(logging.ERROR)
    with pytest.raises(ProtocolError):
        guarded(install)(bundle(evil_py=""), skip_prompt=True)
    assert unpacked == [plain]
    assert "ran nothing of it" in caplog.text
    (tmp_path / "left.py").touch()  # by a release that unpacked whatever came
    with pytest.raises(ProtocolError, match=r"left\.py"):
        guarded(install)(plain, skip_prompt=True)
